"""A second stream of patches, without labels, beside nnU-Net's batches."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_ext.core.files import atomic_write
from nnunetv2_ext.data.loaders import PlacedDataLoader
from nnunetv2_ext.data.subjects import divided


class UnlabelledLoader(PlacedDataLoader):
    """Patches anywhere in their case, or where a network found foreground; labels never decide.

    Args:
        data: nnU-Net's dataset.
        arguments: of nnUNetDataLoader.
        found: a file of `write_found`, looked at before each case; ``oversample_foreground_percent`` of the patches
            then lie on what it names. None: all lie anywhere.
    """

    def __init__(self, data: Any, *arguments: Any, found: Path | None = None, **named: Any) -> None:
        self.of_cases = data
        anywhere = {} if found else {"oversample_foreground_percent": 0.0, "probabilistic_oversampling": False}
        super().__init__(_Unseen(data, _mark(named["label_manager"]), found), *arguments, **named | anywhere)
        self.has_ignore = False  # nnU-Net's then centres patches on annotated voxels


class UnlabelledStream:
    """A training loader whose batches also carry patches of other cases.

    A batch of the first loader gets the key ``unlabelled`` with the second loader's batch: ``data`` (B', C, *S),
    ``keys``, B' case ids, ``boxes``, and instead of a target ``inside``, bool (B', 1, *S): false where the augmentation
    brought in what is not of the scan, and in its empty surroundings. A method takes it as
    ``batch.stream("unlabelled")``.

    Args:
        labelled: nnU-Net's loader or one of its kind; its batches are otherwise left as they are.
        unlabelled: an `UnlabelledLoader`.
    """

    def __init__(self, labelled: Iterator[dict[str, Any]], unlabelled: UnlabelledLoader) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def __iter__(self) -> UnlabelledStream:
        return self

    def __next__(self) -> dict[str, Any]:
        other = dict(next(self.unlabelled))
        target = other.pop("target")
        top: torch.Tensor = target[0] if isinstance(target, list) else target
        return next(self.labelled) | {"unlabelled": {**other, "inside": (top > 0).any(1, keepdim=True)}}

    def set_thread_id(self, thread_id: int) -> None:
        """What nnU-Net's worker processes call first."""
        for loader in (self.labelled, self.unlabelled):
            if hasattr(loader, "set_thread_id"):
                loader.set_thread_id(thread_id)


def with_unlabelled(
    labelled: Any,
    dataset: Any,
    cases: Collection[str],
    subjects: Mapping[str, str] | None = None,
    held_out: Collection[str] = (),
    folder: Path | None = None,
    found: Path | None = None,
    **nnunet_arguments: Any,
) -> UnlabelledStream:
    """A loader with a stream of further cases.

    Args:
        labelled: the loader of the training cases.
        dataset: nnU-Net's training dataset.
        cases: the unlabelled ones. Validation cases are scored later: leave them out and give them as ``held_out``.
        subjects: case to subject (data/subjects.py), so that another scan of a held-out patient is noticed.
        held_out: cases that will be scored.
        folder: where the cases lie, as in a pool; None: among the preprocessed cases of the dataset itself.
        found: see `UnlabelledLoader`.
        nnunet_arguments: as ``make_train_loader`` got them; ``batch_size`` may differ.

    Raises:
        ValueError: no case, or one that is a training case, or one of a subject that is held out.
    """
    if both := divided(cases, held_out, subjects):
        raise ValueError(
            f"the unlabelled stream has cases of subjects that are held out for scoring ({', '.join(both[:5])}): leave "
            "their cases out"
        )
    shared = sorted(set(cases) & set(dataset.identifiers))
    if shared or not cases:
        what = f"{', '.join(shared)} are training cases" if shared else "there are no cases left"
        raise ValueError(f"the unlabelled stream: {what}; leave some cases out of the training set (train_cases)")
    if folder is None:
        others = type(dataset)(dataset.source_folder, sorted(cases), dataset.folder_with_segs_from_previous_stage)
    else:
        others = infer_dataset_class(str(folder))(str(folder), sorted(cases))
    return UnlabelledStream(labelled, UnlabelledLoader(others, found=found, **nnunet_arguments))


def write_found(file: Path, places: Mapping[str, npt.NDArray[np.integer]]) -> None:
    """Tell loaders in all processes where foreground was found: case to voxels (n, 3) of the preprocessed case."""
    content = io.BytesIO()
    arrays: dict[str, Any] = {case: np.asarray(voxels, dtype=np.int32) for case, voxels in places.items()}
    np.savez(content, **arrays)
    atomic_write(file, lambda to: to.write(content.getvalue()))


def _mark(labels: Any) -> int:
    """A value that nnU-Net's transforms keep above 0, with regions too."""
    first = labels.foreground_regions[0] if labels.has_regions else labels.foreground_labels[0]
    return int(np.atleast_1d(first)[0])


class _Unseen:
    """A dataset whose labels nobody sees: in their place is the mark, and -1 outside of the scan."""

    def __init__(self, dataset: Any, mark: int, found: Path | None) -> None:
        self.identifiers, self._dataset, self._mark, self._found = dataset.identifiers, dataset, mark, found
        self._read: tuple[int, dict[str, npt.NDArray[Any]]] = (0, {})  # time of the file, and its content

    def load_case(self, case: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        data, label, previous, properties = self._dataset.load_case(case)
        return data, _Inside(label, self._mark), previous, {**properties, "class_locations": self._places(case)}

    def _places(self, case: str) -> dict[int, npt.NDArray[Any]]:
        if self._found is None or not self._found.is_file():
            return {}
        if self._read[0] != (time := self._found.stat().st_mtime_ns):
            with np.load(self._found) as content:
                self._read = time, dict(content)
        voxels = self._read[1].get(case, np.zeros((0, 3), dtype=np.int32))
        return {self._mark: np.pad(voxels, ((0, 0), (1, 0)))}  # nnU-Net's begin with the channel


class _Inside:
    """Stands for a label (1, X, Y, Z) and builds the requested crop only; acvl_utils asks for just this."""

    def __init__(self, label: Any, mark: int) -> None:
        self._label, self._mark, self.shape, self.ndim, self.dtype = label, mark, label.shape, 4, np.dtype(np.int16)

    def __getitem__(self, crop: Any) -> npt.NDArray[np.int16]:
        return np.where(np.asarray(self._label[crop]) < 0, -1, self._mark).astype(np.int16)
