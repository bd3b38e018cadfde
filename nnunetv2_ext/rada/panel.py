"""The picture of RADA at work: annotated planes, what each network says, and which pseudo-labels are kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.core.figures import HATCHED, add_legend, draw_slice, fullest_slice, hatch, shade
from nnunetv2_ext.core.labelmaps import class_names
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.parts.pseudo_labels import Lesson
from nnunetv2_ext.rada.annotation.planes import Array
from nnunetv2_ext.rada.views import AXES, INSIDE

DROPPED, AGREE, DISAGREE = 1, 2, 3  # of a voxel nobody annotated; 0: annotated, or outside the image
_STATES = {
    AGREE: ("kept, teachers agree", "#7A00B8"),  # colours that no class has
    DISAGREE: ("kept, teachers disagree", "#FF2FD0"),
    DROPPED: ("dropped by all", "#555555"),
}


class SampleView(NamedTuple):
    """One patch. All arrays are (X, Y, Z) but `predictions`."""

    case: str
    image: Array  # first channel
    label: Array  # with the ignore label
    bits: Array  # view map
    predictions: Array  # (networks, X, Y, Z), the most likely classes
    states: Array  # what becomes of the pseudo-labels, see `pseudo_label_states`
    directions: Array | None = None  # of the case's axes (core/orientation.py); None: not known


def sample_views(
    batch: Batch, lessons: Sequence[Lesson], unannotated: Tensor, directions: Sequence[Array | None]
) -> list[SampleView]:
    """What to draw of each sample, of what the networks say; `unannotated` (B, X, Y, Z) as below."""
    labels, keeps = (
        torch.stack([getattr(lesson, name) for lesson in lessons], 1).cpu().numpy() for name in ("label", "keep")
    )
    image, target, free = (x.cpu().numpy() for x in (batch.data[:, 0], batch.top_target, unannotated))
    states = map(pseudo_label_states, labels, keeps, free)
    of_patches = zip(batch.keys, image, target[:, 0], target[:, 1], labels, states, directions, strict=True)
    return [SampleView(*patch) for patch in of_patches]


def pseudo_label_states(labels: Array, keeps: Array, unannotated: Array) -> npt.NDArray[np.uint8]:
    """DROPPED where no network is sure, AGREE where those that are give one class, DISAGREE else; 0 elsewhere.

    Args:
        labels: (networks, X, Y, Z) classes.
        keeps: (networks, X, Y, Z) bool.
        unannotated: (X, Y, Z) bool, voxels inside the image that nobody annotated.
    """
    kept = keeps.any(0)
    lowest = np.where(keeps, labels, np.iinfo(np.int64).max).min(0)
    highest = np.where(keeps, labels, -1).max(0)
    states = np.where(kept, np.where(lowest == highest, AGREE, DISAGREE), DROPPED)
    return np.where(unannotated, states, 0).astype(np.uint8)


def cuts(view: SampleView, ignore: int) -> list[tuple[int, int]]:
    """(axis, index) to draw: per axis the annotated plane with most foreground, or, without any, the fullest slice."""
    annotated = (view.label != ignore) & (view.bits & AXES != 0)
    found = []
    for axis in range(3):
        on_axis = annotated & (view.bits & (1 << axis) != 0)
        others = tuple(a for a in range(3) if a != axis)
        if on_axis.any():
            # background breaks ties, so that a plane without foreground in the patch is drawn too
            score = (on_axis & (view.label > 0)).sum(others) * annotated.size + on_axis.sum(others)
            found.append((axis, int(score.argmax())))
    return found or [(0, fullest_slice(view.predictions[0], 0))]


def draw_panel(
    views: Sequence[SampleView],
    path: Path,
    heading: str,
    dataset_json: dict,
    labels: LabelManager,
    spacing: Sequence[float],
) -> None:
    """Write the picture: a row per cut; columns image with annotation, each network's prediction, pseudo-labels.

    What nobody annotated is hatched, padding too: nnU-Net turns patches, so that an annotated plane crosses several
    slices. `spacing` is in mm per axis of the patches.
    """
    ignore = int(labels.ignore_label)  # type: ignore[arg-type]
    classes = {value: name for value, name in class_names(dataset_json, labels).items() if value != ignore}
    rows = [
        (view, view_across(axis, view.directions, augmented=True), index)
        for view in views
        for axis, index in cuts(view, ignore)
    ]
    heights = [drawn.height(view.image.shape, spacing, 2.2) + 0.2 for view, drawn, _ in rows]
    number = len(views[0].predictions)
    # nnU-Net's progress plot changes the fonts of the whole process
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(2.35 * (number + 2), sum(heights) + 1.1), layout="constrained")
        figure.suptitle(heading, fontsize=11, wrap=True)
        grid = figure.subplots(len(rows), number + 2, squeeze=False, height_ratios=heights)
        for cells, (view, drawn, index) in zip(grid, rows, strict=True):
            mm = drawn.spacing(spacing)
            options: dict[str, Any] = {"window": tuple(np.percentile(view.image, (1, 99.5))), "spacing": mm}
            image = drawn.cut(view.image, index)
            hidden = (view.label == ignore) | (view.bits & INSIDE == 0)
            annotation = drawn.cut(np.where(hidden, 0, view.label), index)
            draw_slice(cells[0], image, annotation, classes, fill=0, title=f"{view.case}\nannotation", **options)
            hatch(cells[0], drawn.cut(hidden, index), mm)
            cells[0].set_ylabel(drawn.caption(index), fontsize=9)
            for k, (cell, prediction) in enumerate(zip(cells[1:-1], view.predictions, strict=True), 1):
                draw_slice(cell, image, drawn.cut(prediction, index), classes, title=f"network {k}", **options)
            draw_slice(cells[-1], image, title="pseudo-labels", **options)
            states = drawn.cut(view.states, index)
            for state, (_, colour) in _STATES.items():
                shade(cells[-1], states == state, colour, 0.55)
        further = [Patch(color=colour, label=name) for name, colour in _STATES.values()]
        add_legend(figure, classes, further=[Patch(label="not annotated", **HATCHED), *further])
        figure.savefig(path, dpi=110)
