"""The cases in which two arms differ most, as pictures: image, truth, both predictions and where each is wrong."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.patches import Patch

from nnunetv2_ext.compare.scores import Scores
from nnunetv2_ext.compare.statistics import Difference
from nnunetv2_ext.core.figures import add_legend, draw_slice, shade
from nnunetv2_ext.core.orientation import directions_of, view_across
from nnunetv2_ext.data.case import find_reader, read_image, read_label_map, spacing_of
from nnunetv2_ext.evaluate import plot
from nnunetv2_ext.evaluate.folder import Source
from nnunetv2_ext.evaluate.intervals import signed
from nnunetv2_ext.parts.surface import bounding_box

_MARGIN_MM = 10.0
# what an error map shows: a colour that no class has, and the words about the reference and the new arm
_ERRORS = (("#FF2FD0", "only {arm} is wrong"), ("#7CFC00", "only {first} is wrong"), ("#FFFFFF", "both are wrong"))


class Volume(NamedTuple):
    """A file's array in (Z, Y, X)."""

    array: npt.NDArray[Any]
    spacing: tuple[float, ...]  # mm along these axes
    directions: npt.NDArray[Any] | None  # of these axes (core/orientation.py); None: the file does not tell


def worst_first(difference: Difference, number: int) -> tuple[list[str], list[str]]:
    """The cases that lost most and those that gained most, each at most ``number``."""
    gain = (difference.per_case * (1 if difference.metric.higher_is_better else -1)).dropna().sort_values(kind="stable")
    return list(gain.index[gain < 0][:number]), list(gain.index[gain > 0][::-1][:number])


def draw_cases(
    scores: Scores, difference: Difference, path: Path, images: Path | None, number: int = 3, heading: str = ""
) -> tuple[list[str], list[str]]:
    """Write a PNG with a row per case: those of ``worst_first`` that lost by the new arm, then those that gained.

    Shown is the slice where the errors of the two differ most, on the image in ``images`` (``CASE_0000.nii.gz``) or
    on grey, and a map of these errors. If no case differs nothing is written.

    Returns the cases that lost and those that gained.
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
    errors = [Patch(facecolor=colour, edgecolor="0.5", label=text.format(first=difference.first, arm=difference.arm))
              for colour, text in _ERRORS]  # fmt: skip
    with plot.figure_file(path, 14, 1.6 + 3.2 * len(rows)) as figure:
        about = (
            f"{heading}\n{difference.arm} against {difference.first}: {difference.structure}, "
            f"{difference.metric.title}\n"
            f"{len(losses)} case(s) that lost most, then {len(gains)} that gained most"
        )
        figure.suptitle(about, fontsize=10, wrap=True)
        for axes, case in zip(np.atleast_2d(figure.subplots(len(rows), 5)), rows, strict=True):
            shown = shown_repeats(cells.loc[case], difference)
            which = f"\non average; shown: {', '.join(dict.fromkeys(shown.values()))}" if cells.shape[1] > 2 else ""
            titles = [f"{case}\n{metric.name} {signed(difference.per_case[case])}{which}", "truth"]
            titles += [f"{arm}\n{metric.title} {cells.loc[case, (arm, label)]:.3f}" for arm, label in shown.items()]
            _draw_row(axes, scores, case, shown, images, classes, [_wrapped(t) for t in [*titles, "errors"]])
        add_legend(figure, classes, further=errors)
        figure.draw_without_rendering()  # the layout takes two passes where titles have several lines
    return losses, gains


def _wrapped(title: str) -> str:
    """Lines that fit above a picture: names of trainers and cases have no blanks to break at."""
    return "\n".join(part for line in title.split("\n") for part in textwrap.wrap(line, 34))


def shown_repeats(values: pd.Series, difference: Difference) -> dict[str, str]:
    """Arm to repeat: the pair whose difference is nearest to the average; ``values`` are a case's, by (arm, repeat)."""
    theirs, ours = values[difference.first], values[difference.arm]
    pairs = [(i, j) for i in theirs.index for j in ours.index if not difference.paired_repeats or i == j]
    average = ours.mean() - theirs.mean()
    i, j = min(pairs, key=lambda pair: abs(ours[pair[1]] - theirs[pair[0]] - average))
    return {difference.first: i, difference.arm: j}


def _draw_row(axes, scores: Scores, case: str, shown: dict[str, str], images: Path | None, classes, titles) -> None:
    files = scores.files.set_index(["case", "arm", "repeat"]).loc[case]
    truth = read_volume(case, files["truth"].iloc[0], scores.source)
    if truth.directions is None and len(spacing := files["spacing"].iloc[0]) == 3:  # the truth's own may be assumed
        truth = truth._replace(spacing=spacing)
    predictions = [read_volume(case, files["prediction"][key], scores.source).array for key in shown.items()]
    labels = [truth.array, *predictions]
    ignore = scores.source.labels.ignore
    axis = viewing_axis(truth)
    at = telling_slice(labels, axis, ignore)
    box = _box(labels, truth.spacing, axis)
    view = view_across(axis, truth.directions)
    background = view.cut(_image(scores.source, case, images, truth.array.shape)[box], at)
    cuts = [view.cut(label[box], at) for label in labels]
    spacing = view.spacing(truth.spacing)
    for where, label, title in zip(axes, (None, *cuts, None), titles, strict=True):
        draw_slice(where, background, label, classes, fill=0.25, spacing=spacing, letters=view.letters, title=title)
    for mask, (colour, _) in zip(error_masks(*cuts, ignore=ignore), _ERRORS, strict=True):
        shade(axes[-1], mask, colour, 0.8)
    axes[0].set_xlabel(view.caption(at), fontsize=8)


def error_masks(
    truth: npt.NDArray[Any], first: npt.NDArray[Any], second: npt.NDArray[Any], *, ignore: int | None
) -> tuple[npt.NDArray[np.bool_], ...]:
    """Where only the second prediction is wrong, only the first, and both; never where the truth is ``ignore``."""
    known = truth != ignore if ignore is not None else np.ones(truth.shape, dtype=bool)
    theirs, ours = (first != truth) & known, (second != truth) & known
    return ours & ~theirs, theirs & ~ours, theirs & ours


def read_volume(case: str, path: Path, source: Source) -> Volume:
    """A label map with nnU-Net's reader, ``(Z, Y, X)``; ValueError if it cannot be read."""
    array, properties = read_label_map(case, path, find_reader(source.ending, source.reader, path))
    return Volume(array, tuple(spacing_of(properties)), directions_of(properties))


def _image(source: Source, case: str, images: Path | None, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The first channel, or plain grey if it is not at hand, damaged, or on another grid."""
    file = None if images is None else images / f"{case}_0000{source.ending}"
    if file is None or not file.is_file():
        return np.full(shape, 0.5)
    try:
        image = read_image(case, [file], find_reader(source.ending, source.reader, file))[0][0]
    except ValueError:  # damaged or with NaN: the scores are done, and need no image
        return np.full(shape, 0.5)
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
