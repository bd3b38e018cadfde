"""Whether what was annotated in the raw labels is still there after nnU-Net's preprocessing: planes, and the rest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunetv2_ext.data.case import read_label_map
from nnunetv2_ext.data.preprocessed import file_stamp
from nnunetv2_ext.rada.annotation.annotations import Annotation, survey_labels
from nnunetv2_ext.rada.annotation.planes import Array, Planes, known_slices
from nnunetv2_ext.rada.annotation.preprocessed import SparsePreprocessed

_TOLERANCE = 1.0 + 1e-6  # slices of the preprocessed array


@dataclass(frozen=True)
class Lost:
    """A raw plane without a counterpart."""

    case: str
    axis: int  # of the preprocessed array
    raw_axis: int  # of the raw array as nnU-Net reads it (0 = z, 1 = y, 2 = x for NIfTI)
    index: int  # slice of the raw array
    spacing: tuple[float, float]  # mm along the axis before and after

    def __str__(self) -> str:
        before, after = self.spacing
        return (
            f"{self.case}: axis {self.axis}, slice {self.index} of the raw label's axis {self.raw_axis} "
            f"({'zyx'[self.raw_axis]}), spacing {before:g} -> {after:g} mm"
        )


def raw_planes(data: SparsePreprocessed, identifiers: Iterable[str]) -> dict[str, Annotation]:
    """Annotation of the raw labels (``gt_segmentations``), transposed and cropped as preprocessing does; cached.

    Indices count slices of the cropped array.

    Raises:
        ValueError: a label file is missing or damaged.
    """
    truth = data.base / "gt_segmentations"
    files = {case: truth / f"{case}{data.dataset_json['file_ending']}" for case in sorted(set(identifiers))}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing, which nnUNetv2_preprocess writes: preprocess the dataset again")
    reader, order = data.plans.image_reader_writer_class(), data.plans.transpose_forward

    def read(case: str) -> Array:
        label = read_label_map(case, files[case], reader)[0].transpose(order)
        return label[tuple(slice(*bounds) for bounds in data.read_case(case)[2]["bbox_used_for_cropping"])]

    states = {case: [file_stamp(file), data.file_state(case)] for case, file in files.items()}
    return survey_labels(data, "raw_planes", states, read, data.ignore)


def lost_planes(data: SparsePreprocessed, annotations: Mapping[str, Annotation]) -> list[Lost]:
    """The raw planes without a plane within one slice after preprocessing; `annotations` are of its cases."""
    order, target = data.plans.transpose_forward, data.configuration.spacing
    lost = []
    for case, before in raw_planes(data, annotations).items():
        if not before.planes:
            continue
        properties = data.read_case(case)[2]
        old = properties["shape_after_cropping_and_before_resampling"]
        spacing = [float(properties["spacing"][axis]) for axis in order]
        new = compute_new_shape(old, spacing, target)
        corner = [bounds[0] for bounds in properties["bbox_used_for_cropping"]]
        missing = unmatched(before.planes, annotations[case].planes, old, new)
        if missing:
            # planes of nothing but background where the image is zero are all -1 now: known, but nothing to learn
            known = known_slices(np.asarray(data.read_case(case)[1][0]), data.ignore)
            missing = [plane for plane in missing if plane in unmatched(before.planes, known, old, new)]
        for axis, index in missing:
            before_and_after = spacing[axis], float(target[axis])
            lost.append(Lost(case, axis, int(order[axis]), int(index + corner[axis]), before_and_after))
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


def require_planes_survived(data: SparsePreprocessed, annotations: Mapping[str, Annotation]) -> None:
    """Raise ValueError if preprocessing erased a plane: case, axis, raw slice, spacings, and the command that helps."""
    lost = lost_planes(data, annotations)
    if lost:
        raise ValueError(
            f"preprocessing erased {len(lost)} annotated planes, first in {lost[0]}: {thicken_remedy(data)}"
        )


def thicken_remedy(data: SparsePreprocessed) -> str:
    """What to do about planes that preprocessing erased: the thickness they need follows configuration and plans."""
    return (
        f"make them thick enough with nnUNetv2_ext sparsify -d {int(data.base.name[7:10])} -o NEW_ID --thicken-only "
        f"-c {data.configuration_name} -p {data.plans.plans_name}, then plan and preprocess NEW_ID"
    )


def erased_annotations(data: SparsePreprocessed, annotations: Mapping[str, Annotation]) -> list[str]:
    """Warnings about annotations on no plane (scribbles, incomplete slices) that did not survive preprocessing.

    Lost planes stop a training; these are lost to it in silence: a case that has nothing else becomes an unlabelled
    one, and a class that a case has nowhere else is missing there.
    """
    unlabelled = sum(not a.labelled for a in annotations.values())
    remedy = "draw it thicker than the spacing of the plans, annotate whole slices, or train a finer configuration"
    names = {int(value): name for name, value in data.dataset_json["labels"].items()}
    found = []
    for case, before in raw_planes(data, annotations).items():
        after = annotations[case]
        if before.labelled and not after.labelled:
            found.append(
                f"WARNING: {case} is annotated ({100 * before.share:.2g} % of the raw label), but preprocessing erased "
                f"all of it: it counts as one of the {unlabelled} unlabelled cases; {remedy}"
            )
            continue
        gone = [names.get(value, str(value)) for value in before.values if value > 0 and value not in after.values]
        if gone:
            found.append(
                f"WARNING: preprocessing erased every annotated voxel of {', '.join(gone)} in {case}; {remedy}"
            )
    return found
