"""The cases in which two arms differ most, as pictures: image, truth and both predictions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from nnunetv2_ext.compare.scores import Scores
from nnunetv2_ext.compare.statistics import Difference, signed
from nnunetv2_ext.core.figures import add_legend, draw_slice
from nnunetv2_ext.data.case import find_reader
from nnunetv2_ext.evaluate import plot

PLANES = ("axial", "coronal", "sagittal")
_MARGIN_MM = 10.0


@dataclass(frozen=True)
class Volume:
    """An array in (Z, Y, X), the patient's left, back and head at the far ends if the file tells directions.

    Attributes:
        array: (Z, Y, X).
        spacing: mm along these axes.
        oriented: whether the file tells directions.
    """

    array: npt.NDArray[Any]
    spacing: tuple[float, ...]
    oriented: bool


def worst_first(difference: Difference, number: int) -> tuple[list[str], list[str]]:
    """The cases that lost most and those that gained most, each at most ``number``."""
    gain = (difference.per_case * (1 if difference.metric.higher_is_better else -1)).dropna().sort_values(kind="stable")
    return list(gain.index[gain < 0][:number]), list(gain.index[gain > 0][::-1][:number])


def draw_cases(
    scores: Scores, difference: Difference, path: Path, images: Path | None, number: int = 3
) -> tuple[list[str], list[str]]:
    """Write a PNG with a row per case: those that lost most by the new arm first, then those that gained most.

    Shown is the slice where the errors of the two differ most.

    Args:
        scores: what was measured.
        difference: of the arm and metric to choose by.
        path: of the PNG; not written if no case differs.
        images: folder with ``CASE_0000.nii.gz``, None draws labels on grey.
        number: cases of either kind.

    Returns:
        The cases that lost and those that gained.
    """
    losses, gains = worst_first(difference, number)
    rows = [*losses, *gains]
    if not rows:
        return [], []
    classes, metric = _classes(scores), difference.metric
    cells = scores.trainings(difference.key, difference.structure)
    with plot.style():
        figure = plot.new_figure(13, 1.0 + 3.0 * len(rows))
        for axes, case in zip(np.atleast_2d(figure.subplots(len(rows), 4)), rows, strict=True):
            shown = shown_repeats(cells.loc[case], difference)
            which = ""
            if cells[[difference.first, difference.arm]].shape[1] > 2:
                which = f" on average\n(shown: {' and '.join(dict.fromkeys(shown.values()))})"
            titles = [f"{case}: {metric.name} {signed(difference.per_case[case])}{which}", "truth"]
            titles += [f"{arm}\n{metric.title} {cells.loc[case, (arm, label)]:.3f}" for arm, label in shown.items()]
            _draw_row(axes, scores, case, shown, images, classes, titles)
        add_legend(figure, classes)
        plot.save(figure, path)
    return losses, gains


def shown_repeats(values: pd.Series, difference: Difference) -> dict[str, str]:
    """Arm to repeat: the pair of trainings whose difference in this case is nearest to the average one.

    Args:
        values: of the case, by (arm, repeat).
        difference: of the two arms.
    """
    theirs, ours = values[difference.first], values[difference.arm]
    pairs = [(i, j) for i in theirs.index for j in ours.index if not difference.paired_repeats or i == j]
    average = ours.mean() - theirs.mean()
    i, j = min(pairs, key=lambda pair: abs(ours[pair[1]] - theirs[pair[0]] - average))
    return {difference.first: i, difference.arm: j}


def _classes(scores: Scores) -> dict[int, str]:
    """Label value to name: a class of its own by its name, the parts of regions by their value."""
    structures = scores.source.labels.structures
    names = {s.values[0]: s.name for s in structures if len(s.values) == 1}
    every = sorted({v for s in structures for v in s.values})
    classes = {v: names.get(v, f"label {v}") for v in every}
    if scores.source.labels.ignore is not None:
        classes[scores.source.labels.ignore] = "ignore"
    return classes


def _draw_row(axes, scores: Scores, case: str, shown: dict[str, str], images: Path | None, classes, titles) -> None:
    files = scores.files.set_index(["case", "arm", "repeat"]).loc[case]
    truth = read_volume(files["truth"].iloc[0], scores)
    if not truth.oriented and len(spacing := files["spacing"].iloc[0]) == 3:  # the truth's own may be assumed
        truth = replace(truth, spacing=spacing)
    labels = [truth.array, *(read_volume(files["prediction"][training], scores).array for training in shown.items())]
    image = _image(scores, case, images, truth)
    axis = viewing_axis(truth)
    at = telling_slice(labels, axis, scores.source.labels.ignore)
    box = _box(labels, truth, axis)
    background = _cut(image, axis, at, box, truth.oriented)
    spacing = tuple(s for a, s in enumerate(truth.spacing) if a != axis)
    plane = PLANES[axis] if truth.oriented else f"axis {axis}"
    for where, label, title in zip(axes, (None, *labels), titles, strict=True):
        cut = None if label is None else _cut(label, axis, at, box, truth.oriented)
        draw_slice(where, background, cut, classes, fill=0.25, spacing=spacing, title=title)
    axes[0].set_xlabel(f"{plane}, slice {at}", fontsize=8)


def read_volume(path: Path, scores: Scores) -> Volume:
    """A file as (Z, Y, X), turned to the patient's axes where the file tells them (read by SimpleITK)."""
    import SimpleITK as sitk

    source = scores.source
    if source.ending in (".nii.gz", ".nii", ".nrrd", ".mha"):
        image = sitk.ReadImage(str(path))
        if image.GetDimension() == 3:
            image = sitk.DICOMOrient(image, "LPS")
            return Volume(sitk.GetArrayFromImage(image), tuple(image.GetSpacing()[::-1]), True)
    with redirect_stdout(io.StringIO()):  # nnU-Net's warning of an assumed spacing
        content, properties = find_reader(source.ending, source.reader, path).read_seg(str(path))
    return Volume(content[0], tuple(float(s) for s in properties["spacing"]), False)


def _image(scores: Scores, case: str, images: Path | None, truth: Volume) -> npt.NDArray[Any]:
    """The first channel, or plain grey if it is not at hand or on another grid."""
    file = None if images is None else images / f"{case}_0000{scores.source.ending}"
    if file is not None and file.is_file():
        volume = read_volume(file, scores)
        if volume.array.shape == truth.array.shape:
            return volume.array
    return np.full(truth.array.shape, 0.5)


def viewing_axis(volume: Volume) -> int:
    """The axis to cut across: the one with clearly the thickest slices, as they were acquired, else Z."""
    shape, spacing = volume.array.shape, volume.spacing
    if 1 in shape:
        return shape.index(1)
    thickest = int(np.argmax(spacing))
    return thickest if spacing[thickest] > 1.5 * sorted(spacing)[-2] else 0


def telling_slice(labels: Sequence[npt.NDArray[Any]], axis: int, ignore: int | None = None) -> int:
    """Where the errors of the two predictions differ in most voxels; else where the truth shows most.

    Args:
        labels: truth and two predictions, (Z, Y, X).
        axis: to cut across.
        ignore: voxels of the truth that do not count.
    """
    truth, first, second = labels
    others = tuple(a for a in range(truth.ndim) if a != axis)
    differ = ((first == truth) != (second == truth)) & (truth != ignore if ignore is not None else True)
    counts = differ.sum(axis=others)
    return int(np.argmax(counts if counts.any() else (truth > 0).sum(axis=others)))


def _box(labels: Sequence[npt.NDArray[Any]], truth: Volume, axis: int) -> tuple[slice, ...]:
    """All of the cut axis, and of the others what surrounds the structures by a margin."""
    any_label = np.logical_or.reduce([label > 0 for label in labels])
    box = []
    for a, (size, spacing) in enumerate(zip(truth.array.shape, truth.spacing, strict=True)):
        found = np.flatnonzero(any_label.any(axis=tuple(b for b in range(any_label.ndim) if b != a)))
        margin = max(4, round(_MARGIN_MM / spacing))
        if a == axis or not len(found):
            box.append(slice(0, size))
        else:
            box.append(slice(max(0, int(found[0]) - margin), min(size, int(found[-1]) + 1 + margin)))
    return tuple(box)


def _cut(array: npt.NDArray[Any], axis: int, at: int, box: tuple[slice, ...], oriented: bool) -> npt.NDArray[Any]:
    """(rows, columns) for draw_slice, whose rows grow upwards: radiological view of an oriented volume."""
    cut = np.take(array[box], at, axis=axis)
    # axial rows run from front to back: front on top. Coronal and sagittal rows run from feet to head: as they are.
    # Pictures without directions are shown as every viewer does, with the first row on top.
    return cut[::-1] if axis == 0 or not oriented else cut
