"""The cases in which two arms differ most, as pictures: image, truth and both predictions."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from nnunetv2_ext.compare.scores import Scores
from nnunetv2_ext.compare.statistics import Difference, signed
from nnunetv2_ext.core.figures import add_legend, draw_slice
from nnunetv2_ext.data.case import find_reader
from nnunetv2_ext.evaluate import plot
from nnunetv2_ext.evaluate.folder import Source
from nnunetv2_ext.evaluate.metrics import bounding_box

PLANES = ("axial", "coronal", "sagittal")
_MARGIN_MM = 10.0


class Volume(NamedTuple):
    """An array in (Z, Y, X), the patient's left, back and head at the far ends if the file tells directions."""

    array: npt.NDArray[Any]
    spacing: tuple[float, ...]  # mm along these axes
    oriented: bool  # whether the file tells directions


def worst_first(difference: Difference, number: int) -> tuple[list[str], list[str]]:
    """The cases that lost most and those that gained most, each at most ``number``."""
    gain = (difference.per_case * (1 if difference.metric.higher_is_better else -1)).dropna().sort_values(kind="stable")
    return list(gain.index[gain < 0][:number]), list(gain.index[gain > 0][::-1][:number])


def draw_cases(
    scores: Scores, difference: Difference, path: Path, images: Path | None, number: int = 3
) -> tuple[list[str], list[str]]:
    """Write a PNG with a row per case: those of ``worst_first`` that lost by the new arm, then those that gained.

    Shown is the slice where the errors of the two differ most, on the image in ``images`` (``CASE_0000.nii.gz``) or
    on grey. If no case differs nothing is written. Returns the cases that lost and those that gained.
    """
    losses, gains = worst_first(difference, number)
    if not (rows := [*losses, *gains]):
        return [], []
    labels, metric = scores.source.labels, difference.metric
    # a class of its own by its name, the parts of regions by their value
    classes = {v: f"label {v}" for s in labels.structures for v in s.values}
    classes |= {s.values[0]: s.name for s in reversed(labels.structures) if len(s.values) == 1}
    classes |= {} if labels.ignore is None else {labels.ignore: "ignore"}
    cells = scores.trainings(difference.key, difference.structure)[[difference.first, difference.arm]]
    with plot.figure_file(path, 13, 1.0 + 3.0 * len(rows)) as figure:
        for axes, case in zip(np.atleast_2d(figure.subplots(len(rows), 4)), rows, strict=True):
            shown = shown_repeats(cells.loc[case], difference)
            which = f" on average\n(shown: {' and '.join(dict.fromkeys(shown.values()))})" if cells.shape[1] > 2 else ""
            titles = [f"{case}: {metric.name} {signed(difference.per_case[case])}{which}", "truth"]
            titles += [f"{arm}\n{metric.title} {cells.loc[case, (arm, label)]:.3f}" for arm, label in shown.items()]
            _draw_row(axes, scores, case, shown, images, classes, titles)
        add_legend(figure, classes)
    return losses, gains


def shown_repeats(values: pd.Series, difference: Difference) -> dict[str, str]:
    """Arm to repeat: the pair whose difference is nearest to the average; ``values`` are a case's, by (arm, repeat)."""
    theirs, ours = values[difference.first], values[difference.arm]
    pairs = [(i, j) for i in theirs.index for j in ours.index if not difference.paired_repeats or i == j]
    average = ours.mean() - theirs.mean()
    i, j = min(pairs, key=lambda pair: abs(ours[pair[1]] - theirs[pair[0]] - average))
    return {difference.first: i, difference.arm: j}


def _draw_row(axes, scores: Scores, case: str, shown: dict[str, str], images: Path | None, classes, titles) -> None:
    files = scores.files.set_index(["case", "arm", "repeat"]).loc[case]
    truth = read_volume(files["truth"].iloc[0], scores.source)
    if not truth.oriented and len(spacing := files["spacing"].iloc[0]) == 3:  # the truth's own may be assumed
        truth = truth._replace(spacing=spacing)
    predictions = [read_volume(files["prediction"][training], scores.source).array for training in shown.items()]
    labels = [truth.array, *predictions]
    axis = viewing_axis(truth)
    at = telling_slice(labels, axis, scores.source.labels.ignore)
    box = _box(labels, truth.spacing, axis)

    def cut(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(rows, columns) for draw_slice, whose rows grow upwards: radiological view of an oriented volume."""
        found = np.take(array[box], at, axis=axis)
        # axial rows run from front to back: front on top. Coronal and sagittal rows run from feet to head: as they
        # are. Pictures without directions are shown as every viewer does, with the first row on top.
        return found[::-1] if axis == 0 or not truth.oriented else found

    background = cut(_image(scores.source, case, images, truth.array.shape))
    spacing = tuple(s for a, s in enumerate(truth.spacing) if a != axis)
    for where, label, title in zip(axes, (None, *map(cut, labels)), titles, strict=True):
        draw_slice(where, background, label, classes, fill=0.25, spacing=spacing, title=title)
    axes[0].set_xlabel(f"{PLANES[axis] if truth.oriented else f'axis {axis}'}, slice {at}", fontsize=8)


def read_volume(path: Path, source: Source) -> Volume:
    """A file as (Z, Y, X), turned to the patient's axes where the file tells them (read by SimpleITK)."""
    import SimpleITK as sitk

    if source.ending in (".nii.gz", ".nii", ".nrrd", ".mha"):
        image = sitk.ReadImage(str(path))
        if image.GetDimension() == 3:
            image = sitk.DICOMOrient(image, "LPS")
            return Volume(sitk.GetArrayFromImage(image), tuple(image.GetSpacing()[::-1]), True)
    with redirect_stdout(io.StringIO()):  # nnU-Net's warning of an assumed spacing
        content, properties = find_reader(source.ending, source.reader, path).read_seg(str(path))
    return Volume(content[0], tuple(float(s) for s in properties["spacing"]), False)


def _image(source: Source, case: str, images: Path | None, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The first channel, or plain grey if it is not at hand or on another grid."""
    file = None if images is None else images / f"{case}_0000{source.ending}"
    image = read_volume(file, source).array if file is not None and file.is_file() else np.empty(0)
    return image if image.shape == shape else np.full(shape, 0.5)


def viewing_axis(volume: Volume) -> int:
    """The axis to cut across: the one with clearly the thickest slices, as they were acquired, else Z."""
    shape, spacing = volume.array.shape, volume.spacing
    if 1 in shape:
        return shape.index(1)
    thickest = int(np.argmax(spacing))
    return thickest if spacing[thickest] > 1.5 * sorted(spacing)[-2] else 0


def telling_slice(labels: Sequence[npt.NDArray[Any]], axis: int, ignore: int | None = None) -> int:
    """Where the errors of the two predictions differ in most voxels; else where the truth shows most.

    ``labels`` are truth and two predictions, (Z, Y, X); voxels where the truth is ``ignore`` do not count.
    """
    truth, first, second = labels
    others = tuple(a for a in range(truth.ndim) if a != axis)
    differ = ((first == truth) != (second == truth)) & (truth != ignore if ignore is not None else True)
    counts = differ.sum(axis=others)
    return int(np.argmax(counts if counts.any() else (truth > 0).sum(axis=others)))


def _box(labels: Sequence[npt.NDArray[Any]], spacing: Sequence[float], axis: int) -> tuple[slice, ...]:
    """All of the cut axis, and of the others what surrounds the structures by a margin."""
    shown = np.logical_or.reduce([label > 0 for label in labels])
    everything = (slice(None),) * shown.ndim
    box = bounding_box(shown, [max(4, round(_MARGIN_MM / s)) for s in spacing]) if shown.any() else everything
    return (*box[:axis], slice(None), *box[axis + 1 :])
