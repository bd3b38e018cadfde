"""A second stream of patches, without labels, beside nnU-Net's batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from nnunetv2_ext.data.loaders import PlacedDataLoader
from nnunetv2_ext.data.subjects import divided


class UnlabelledLoader(PlacedDataLoader):
    """Patches anywhere in their case: neither foreground nor an ignore label decides where.

    Args:
        arguments: of nnUNetDataLoader.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        without_labels = {"oversample_foreground_percent": 0.0, "probabilistic_oversampling": False}
        super().__init__(*arguments, **named | without_labels)
        self.has_ignore = False  # nnU-Net's then centres patches on annotated voxels


class UnlabelledStream:
    """A training loader whose batches also carry patches of other cases.

    A batch of the first loader gets the key ``unlabelled`` with the second loader's batch without its target: ``data``
    (B', C, *S), ``keys``, B' case ids, and what else that loader says, such as ``boxes``. A method takes it as
    ``batch.stream("unlabelled")``.

    Args:
        labelled: nnU-Net's loader or one of its kind; its batches are otherwise left as they are.
        unlabelled: the same, over cases whose labels nobody may see.
    """

    def __init__(self, labelled: Iterator[dict[str, Any]], unlabelled: Iterator[dict[str, Any]]) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def __iter__(self) -> UnlabelledStream:
        return self

    def __next__(self) -> dict[str, Any]:
        other = {key: value for key, value in next(self.unlabelled).items() if key != "target"}
        return next(self.labelled) | {"unlabelled": other}

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
    **nnunet_arguments: Any,
) -> UnlabelledStream:
    """A loader with a stream of further cases of the same preprocessed configuration.

    Args:
        labelled: the loader of the training cases.
        dataset: nnU-Net's training dataset, which tells folder and kind of files.
        cases: the unlabelled ones. Validation cases are scored later: leave them out and give them as ``held_out``,
            unless the method may see their images (transductive), and then say so.
        subjects: case to subject (data/subjects.py), so that another scan of a held-out patient is noticed.
        held_out: cases that will be scored.
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
    others = type(dataset)(dataset.source_folder, sorted(cases), dataset.folder_with_segs_from_previous_stage)
    return UnlabelledStream(labelled, UnlabelledLoader(others, **nnunet_arguments))
