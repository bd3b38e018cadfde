"""Labelling the cases of a pool one by one; what is done stays, so that an interrupted run goes on."""

import hashlib
import io
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_ext.core.files import atomic_write, atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.pool import Pool
from nnunetv2_ext.parts.prediction import FoldPredictor
from nnunetv2_ext.pseudo_label.verdict import judge

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Labelled:
    """A case of the pool.

    Attributes:
        agreement: of the folds; NaN where nothing was found.
        foreground, doubtful: numbers of voxels.
        file: with ``label`` and ``doubtful``, on the image's grid.
    """

    agreement: float
    foreground: int
    doubtful: int
    file: Path

    def read(self) -> tuple[Array, Array]:
        """Label (X, Y, Z) and what of it is in doubt, bool."""
        with np.load(self.file) as content:
            return content["label"], content["doubtful"]


def label_pool(pool: Pool, predictor: FoldPredictor, hashes: dict[str, str], threshold: float) -> dict[str, Labelled]:
    """Every case of the pool, labelled by the same folds with the same threshold now or before.

    Args:
        pool: preprocessed for the model.
        predictor: its folds.
        hashes: of their checkpoints, by fold.
        threshold: see `verdict.judge`.

    Raises:
        ValueError: a damaged case, a network's output that is not finite, no right to write, or a full disk.
    """
    asked = json.dumps([hashes, threshold, pool.key], sort_keys=True)
    folder = pool.folder.parents[1] / "pseudo_label" / hashlib.sha256(asked.encode()).hexdigest()[:12]
    require_writable(folder)
    cases = infer_dataset_class(str(pool.data_folder))(str(pool.data_folder), sorted(pool.cases))
    found = {}
    for case in progress_bar(sorted(pool.cases), "labelling"):
        note, file = folder / f"{case}.json", folder / f"{case}.npz"
        record = read_json(note) if note.is_file() else {}
        content = list(pool.cases[case].sha256)
        if record.get("content") != content:
            try:
                data, _, _, properties = cases.load_case(case)
                data = np.asarray(data[:])
            except Exception as error:  # blosc2 and pickle have their own
                raise ValueError(
                    f"case {case} of the pool cannot be read ({type(error).__name__}): remove its files in "
                    f"{pool.data_folder}, and run nnUNetv2_ext unlabelled again"
                ) from error
            try:
                verdict = judge(data, properties, predictor, threshold)
            except ValueError as error:
                raise ValueError(f"case {case}: {error}") from error
            record = {
                "content": content,
                "agreement": None if math.isnan(verdict.agreement) else verdict.agreement,
                "foreground": int((verdict.label > 0).sum()),
                "doubtful": int(verdict.doubtful.sum()),
            }
            packed = io.BytesIO()
            np.savez_compressed(packed, label=verdict.label.astype(np.int16), doubtful=verdict.doubtful)
            try:
                atomic_write(file, partial(_put, packed.getvalue()))
                atomic_write_text(note, json.dumps(record) + "\n")  # last: who has it has the other
            except OSError as error:
                raise ValueError(
                    f"case {case}: its label cannot be written to {folder} ({error.strerror}): look at the free space "
                    "there, and run the same command again, which goes on"
                ) from error
        score = math.nan if record["agreement"] is None else float(record["agreement"])
        found[case] = Labelled(score, record["foreground"], record["doubtful"], file)
    return found


def _put(content: bytes, to: BinaryIO) -> None:
    to.write(content)
