"""Whether every plane that was annotated in the raw labels is still a plane after nnU-Net's preprocessing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_ext.rada.planes import THRESHOLD, Array, Planes
from nnunetv2_ext.rada.survey import Annotation, cache_path, survey_files

_TOLERANCE = 1.0 + 1e-6  # slices of the preprocessed array


@dataclass(frozen=True)
class Lost:
    """A raw plane without a counterpart.

    Args:
        case: Its case.
        axis: Axis of the preprocessed array.
        raw_axis: Axis of the raw array as nnU-Net reads it (0 = z, 1 = y, 2 = x for NIfTI).
        index: Slice of the raw array.
        spacing: mm along the axis before and after.
    """

    case: str
    axis: int
    raw_axis: int
    index: int
    spacing: tuple[float, float]

    def __str__(self) -> str:
        before, after = self.spacing
        return (
            f"{self.case}: axis {self.axis}, slice {self.index} of the raw label's axis {self.raw_axis} "
            f"({'zyx'[self.raw_axis]}), spacing {before:g} -> {after:g} mm"
        )


def raw_planes(
    dataset_folder: str | os.PathLike[str],
    identifiers: Iterable[str],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: Mapping[str, Any],
    ignore: int,
) -> dict[str, Annotation]:
    """Annotation of the raw labels (``gt_segmentations``), transposed and cropped as preprocessing does; cached.

    Indices count slices of the cropped array. The crop is read from the properties of the preprocessed cases.

    Raises:
        ValueError: a label file is missing.
    """
    base = Path(dataset_folder)
    truth = base / "gt_segmentations"
    files = {case: truth / f"{case}{dataset_json['file_ending']}" for case in sorted(set(identifiers))}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing, which nnUNetv2_preprocess writes: preprocess the dataset again")
    reader = plans.image_reader_writer_class()

    def read(case: str) -> Array:
        label = reader.read_seg(str(files[case]))[0][0].transpose(plans.transpose_forward)
        return label[
            tuple(slice(*bounds) for bounds in _properties(base, configuration, case)["bbox_used_for_cropping"])
        ]

    cache = cache_path(base, configuration.data_identifier, "raw_planes")
    return survey_files(files, read, ignore, cache, "reading raw labels", str(list(plans.transpose_forward)))


def lost_planes(
    dataset_folder: str | os.PathLike[str],
    annotations: Mapping[str, Annotation],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: Mapping[str, Any],
    ignore: int,
) -> list[Lost]:
    """The raw planes without a plane within one slice after preprocessing.

    Args:
        dataset_folder: ``nnUNet_preprocessed/<Dataset>``.
        annotations: Of the preprocessed cases, from `survey_cases`.
        plans: Of the preprocessed data.
        configuration: Of the preprocessed data.
        dataset_json: Of the dataset.
        ignore: The ignore label.
    """
    folder = Path(dataset_folder) / configuration.data_identifier
    raw = raw_planes(dataset_folder, annotations, plans, configuration, dataset_json, ignore)
    lost = []
    for case, before in raw.items():
        if not before.planes:
            continue
        properties = _properties(Path(dataset_folder), configuration, case)
        old = properties["shape_after_cropping_and_before_resampling"]
        spacing = [float(properties["spacing"][axis]) for axis in plans.transpose_forward]
        new = compute_new_shape(old, spacing, configuration.spacing)
        corner = [bounds[0] for bounds in properties["bbox_used_for_cropping"]]
        missing = unmatched(before.planes, annotations[case].planes, old, new)
        if missing:
            # planes of nothing but background where the image is zero are all -1 now: known, but nothing to learn
            known = _known_slices(folder, case, ignore)
            missing = [plane for plane in missing if plane in unmatched(before.planes, known, old, new)]
        for axis, index in missing:
            lost.append(
                Lost(
                    case,
                    axis,
                    int(plans.transpose_forward[axis]),
                    int(index + corner[axis]),
                    (spacing[axis], float(configuration.spacing[axis])),
                )
            )
    return lost


def unmatched(before: Planes, after: Planes, old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    """(axis, index) of the planes `before` that have none `after` within one slice, for sizes `old` -> `new`."""
    missing = []
    for axis in range(3):
        kept = np.array(after.indices[axis], dtype=float)
        for index in before.indices[axis]:
            position = (index + 0.5) * new[axis] / old[axis] - 0.5
            if not (kept.size and np.abs(kept - position).min() <= _TOLERANCE):
                missing.append((axis, index))
    return missing


def require_planes_survived(
    dataset_folder: str | os.PathLike[str],
    annotations: Mapping[str, Annotation],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: Mapping[str, Any],
    ignore: int,
) -> None:
    """Stop if preprocessing erased an annotated plane; arguments as `lost_planes`.

    Raises:
        ValueError: case, axis, raw slice, spacing before and after, and the command that mends it.
    """
    lost = lost_planes(dataset_folder, annotations, plans, configuration, dataset_json, ignore)
    if lost:
        number = Path(dataset_folder).name[7:10].lstrip("0")
        raise ValueError(
            f"preprocessing erased {len(lost)} annotated planes, first in {lost[0]}: make planes thick enough with "
            f"nnUNetv2_ext sparsify -d {number} -o NEW_ID --thicken-only, then plan and preprocess NEW_ID"
        )


def _known_slices(folder: Path, case: str, ignore: int) -> Planes:
    """Slices of a preprocessed label with hardly any ignored voxel, whatever the others are."""
    label = np.asarray(infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)[1][0])
    shares = [(label != ignore).mean(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    first, second, third = (tuple(np.flatnonzero(share >= THRESHOLD).tolist()) for share in shares)
    return Planes((first, second, third))


def _properties(base: Path, configuration: ConfigurationManager, case: str) -> dict[str, Any]:
    return load_pickle(str(base / configuration.data_identifier / f"{case}.pkl"))
