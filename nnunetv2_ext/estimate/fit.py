"""Fitting a calibration on the folds' own validation cases, each predicted by the fold that has not seen it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_ext import __version__
from nnunetv2_ext.core.files import atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.cache import file_hash
from nnunetv2_ext.data.find import as_model, find_checkpoint
from nnunetv2_ext.data.preprocessed import Preprocessed, open_preprocessed
from nnunetv2_ext.data.split import read_split
from nnunetv2_ext.data.subjects import subjects_from_table, subjects_of_dataset
from nnunetv2_ext.estimate.calibration import Calibration, Row, calibrate
from nnunetv2_ext.estimate.features import NAMES, OPTIONAL
from nnunetv2_ext.estimate.mirroring import open_predictor
from nnunetv2_ext.estimate.validation import Source, rows_of

FORMAT = 2
FILE = "nnunetv2_ext_estimate.json"
_PARTIAL = ".nnunetv2_ext_estimate_rows.jsonl"  # of a fit that was interrupted
_FEWEST = 6  # validation cases
NOT_A_MEASUREMENT = "an estimate, not a measurement"


@dataclass(frozen=True)
class Fitted:
    """A fit as its file holds it.

    Attributes:
        checkpoint: name of the checkpoint files.
        hashes: SHA-256 of each fold's, by fold.
        structures: names in the order of the heads.
        mirrored: axes along which predictions are mirrored.
        saved: fitted on probabilities that nnU-Net saved, on the grid of the images.
    """

    calibration: Calibration
    checkpoint: str
    hashes: dict[str, str]
    structures: list[str]
    mirrored: list[int]
    saved: bool = False

    @property
    def optional(self) -> list[str]:
        """Optional features of the fit."""
        return [name for name in OPTIONAL if name in self.calibration.line.names]

    def save(self, model: Path) -> Path:
        """Write the file into the model folder."""
        content = {
            "format": FORMAT,
            "version": __version__,
            "what": NOT_A_MEASUREMENT,
            "checkpoint": self.checkpoint,
            "sha256": self.hashes,
            "structures": self.structures,
            "mirrored": self.mirrored,
            "saved": self.saved,
            "calibration": self.calibration.as_dict(),
        }
        atomic_write_text(model / FILE, json.dumps(content, indent=1) + "\n")
        return model / FILE

    @staticmethod
    def load(model: Path) -> "Fitted":
        """Read it. ValueError: there is none, another version wrote it, or a checkpoint has changed since."""
        if not (model / FILE).is_file():
            raise ValueError(f"{model} has no {FILE}: run `nnUNetv2_ext estimate fit {model}` first")
        content = read_json(model / FILE)
        if content.get("format", 0) > FORMAT:
            raise ValueError(f"{model / FILE} was written by a newer nnunetv2-ext: pip install -U nnunetv2-ext")
        if content.get("format") != FORMAT:
            raise ValueError(f"{model / FILE} is of an older form: run `nnUNetv2_ext estimate fit {model}` again")
        found = Fitted(
            Calibration.from_dict(content["calibration"]),
            content["checkpoint"],
            content["sha256"],
            content["structures"],
            content["mirrored"],
            content["saved"],
        )
        for fold, digest in found.hashes.items():
            file = find_checkpoint(model, fold, found.checkpoint)
            if file_hash(file) != digest:
                raise ValueError(
                    f"{file} is not the checkpoint of the fit: run `nnUNetv2_ext estimate fit {model}` again"
                )
        return found


def fit(
    model_folder: Path,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    groups: Path | None = None,
    corrupted: bool = True,
    optional: Sequence[str] = (),
    saved: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Fitted:
    """Predict every validation case by its own fold, clean and as a corrupted copy, and fit the calibration.

    An interrupted fit goes on where it was. What nnU-Net preprocessed is read; nothing is written but the result.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION`` with finished folds.
        folds: default: all that are finished.
        groups: table of the cases' subjects; default: as dataset.json records them, else each case its own.
        corrupted: fit on corrupted copies too, which widens the intervals and makes them hold on worse images.
        optional: features of `features.OPTIONAL`; ``tta`` is left out, with a sentence, where nothing is mirrored.
        saved: take the probabilities of nnU-Net's validation (``nnUNetv2_train ... --val --npz``); no model is run,
            so that there are no corrupted copies and no optional features.

    Raises:
        ValueError: no finished fold but ``all``, no split, too few cases, a case without truth, a cascade without its
            previous stage, ``ens`` of one fold, or ``tta`` with an ignore label.
    """
    model = as_model(model_folder.resolve())
    if model is None:
        raise ValueError(f"{model_folder} is not a model folder named TRAINER__PLANS__CONFIGURATION")
    there = [f for f in model.folds() if (model.folder / f"fold_{f}" / checkpoint).is_file()]
    wanted = list(folds) if folds else [f for f in there if f != "all"]
    if not wanted or "all" in wanted:
        raise ValueError(
            f"{model.folder} has no numbered fold with {checkpoint}" + (", only fold all" if "all" in there else "")
            + ": fold all has no unseen cases; train the folds 0 to 4, or give -chk"
        )  # fmt: skip
    if unnumbered := [fold for fold in wanted if not fold.isdecimal()]:
        raise ValueError(f"-f takes the numbers of folds, got {unnumbered[0]}")
    checkpoints = {fold: find_checkpoint(model.folder, fold, checkpoint) for fold in wanted}
    if "ens" in optional and len(wanted) < 2:
        raise ValueError(f"the feature ens compares folds, and there is one (fold {wanted[0]}): leave +ens away")
    if saved and optional:
        raise ValueError(f"saved probabilities tell nothing of {optional[0]}: leave +{optional[0]} or --npz away")
    require_writable(model.folder)
    plans_name = str(read_json(model.folder / "plans.json")["plans_name"])
    data = open_preprocessed(model.dataset, model.configuration, plans_name)
    cases = validation_cases(data, wanted)
    if len(set().union(*cases.values())) < _FEWEST:
        raise ValueError(f"the folds {', '.join(wanted)} have fewer than {_FEWEST} validation cases: fit on more folds")
    names = sorted(set().union(*cases.values()))
    subjects = subjects_from_table(names, groups) if groups else subjects_of_dataset(data.dataset_json, names, None)
    hashes = {fold: file_hash(file) for fold, file in checkpoints.items()}
    predictor = open_predictor(model.folder, [int(f) for f in wanted], checkpoint, device, "tta" in optional)
    if "tta" in optional and predictor.labels.ignore_label is not None:
        raise ValueError("the feature tta would count voxels under the ignore label: leave +tta away")
    if "tta" in optional and len(predictor.mirrored) < 2:
        say(f"tta is left out: predictions of this model are mirrored along {len(predictor.mirrored)} axes")
        optional = [name for name in optional if name != "tta"]
    source = Source(model, data, predictor, corrupted and not saved, optional, saved)
    rows: list[Row] = []
    key = {"sha256": hashes, "corrupted": source.corrupted, "features": [*NAMES, *optional], "saved": saved}
    with _Partial(model.folder / _PARTIAL, key) as partial:
        for fold in wanted:
            for case in progress_bar(cases[fold], f"fold {fold}"):
                place = f"{fold}/{case}"  # splits of one's own may let two folds validate on a case
                if place not in partial.rows:
                    partial.add(place, list(rows_of(case, int(fold), source)))
                rows += [Row(**{**row, "subject": (subjects or {}).get(case, case)}) for row in partial.rows[place]]
        if not rows:
            raise ValueError(f"no validation case of the folds {', '.join(wanted)} has a structure: nothing to fit")
        fitted = Fitted(calibrate(rows), checkpoint, hashes, list(predictor.structures), predictor.mirrored, saved)
    fitted.save(model.folder)
    partial.remove()
    if too_few := [s for s, q in fitted.calibration.quantile.items() if q is None]:
        say(f"no interval for {', '.join(too_few)}: fewer than 9 cases have it")
    return fitted


def validation_cases(data: Preprocessed, folds: Sequence[str]) -> dict[str, list[str]]:
    """Of each fold. ValueError: no split, or one without a fold."""
    if not data.splits_file.is_file():
        raise ValueError(
            f"{data.splits_file} is missing: without the split nobody knows which cases a fold has not seen"
        )
    split = read_split(data.splits_file)
    if unknown := [fold for fold in folds if int(fold) >= len(split)]:
        raise ValueError(
            f"{data.splits_file} has {len(split)} folds, and the model has fold {unknown[0]}: restore the split"
        )
    return {fold: list(split[int(fold)]["val"]) for fold in folds}


class _Partial:
    """Rows of the cases that are done, in a file that a second start goes on with."""

    def __init__(self, file: Path, key: dict[str, Any]) -> None:
        self.file, self.key = file, key
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> "_Partial":
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        if lines and _parsed(lines[0]) == self.key:
            for content in filter(None, map(_parsed, lines[1:])):  # the last line may be cut short
                self.rows[content["key"]] = content["rows"]
        else:
            self.file.write_text(json.dumps(self.key) + "\n", encoding="utf-8")
        self._open = self.file.open("a", encoding="utf-8")
        return self

    def add(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of a case of a fold."""
        self.rows[key] = rows
        self._open.write(json.dumps({"key": key, "rows": rows}) + "\n")
        self._open.flush()

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def remove(self) -> None:
        """Delete the file."""
        self.file.unlink(missing_ok=True)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
