"""The picture of MedContext at work: one patch, its mask, and what student and teacher make of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice, shade
from nnunetv2_ext.core.labelmaps import class_names
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.medcontext.diagnosis import Diagnosis

HIDDEN_COLOUR = (0.55, 0.0, 0.75)


def draw_panel(
    result: Diagnosis,
    path: Path,
    title: str,
    dataset_json: dict,
    labels: LabelManager,
    spacing: Sequence[float] | None = None,
    directions: npt.NDArray[Any] | None = None,
) -> None:
    """Write the picture: columns image, mask, target, student on x, student on m(x), teacher on x (if there is one).

    A column whose label map is background throughout says so. The patch is drawn as its case would stand upright, but
    nnU-Net has turned and mirrored it at random.

    Args:
        result: what to draw.
        path: PNG to write.
        title: first line of the title; case, patch size and hidden share follow.
        dataset_json: names of the classes.
        labels: their order.
        spacing: voxel size per patch axis in mm, so that slices get their true proportions; None for cubes.
        directions: of the case's axes (core/orientation.py); None: not known.
    """
    image, target = result.image, result.target
    maps = {"target": target, "student, whole patch": result.clean, "student, masked patch": result.masked}
    if result.teacher is not None:
        maps["teacher, whole patch"] = result.teacher
    classes = class_names(dataset_json, labels)
    mm = (1.0,) * image.ndim if spacing is None else tuple(spacing)
    # the fullest slice is meant to show organs, not the one with the largest unannotated part
    ignored = [value for value, name in classes.items() if name == "ignore"]
    organs = np.where(np.isin(target, ignored), 0, target)
    shown = [value for value in classes if value not in ignored]
    empty = [name for name, label in maps.items() if not np.isin(label, shown).any()]
    columns, cuts = len(maps) + 2, [None] if image.ndim == 2 else [0, 1, 2]
    # nnU-Net's progress plot calls seaborn.set(font_scale=2.5), which changes the fonts of the whole process
    with matplotlib.style.context("default"):
        views = [view_across(axis, directions, augmented=True) for axis in cuts]
        heights = [view.height(image.shape, mm, 2.2) for view in views]
        figure = Figure(figsize=(2.35 * columns, sum(heights) + 1.1), layout="constrained")
        size = " x ".join(map(str, image.shape))
        caption = f"{title}\n{result.case}, patch {size}, {result.hidden.mean():.0%} hidden"
        figure.suptitle(caption, fontsize=11, wrap=True)
        grid = figure.subplots(len(cuts), columns, squeeze=False, height_ratios=heights)
        window = tuple(np.percentile(image, (1, 99.5)))
        for row, view in zip(grid, views, strict=True):
            index = None if view.axis is None else fullest_slice(organs, view.axis)
            options: dict[str, Any] = {"window": window, "spacing": view.spacing(mm)}
            cut = view.cut(image, index)
            draw_slice(row[0], cut, title="image", **options)
            row[0].set_ylabel(view.caption(index), fontsize=9)
            draw_slice(row[1], cut, title="what the student sees", **options)
            shade(row[1], view.cut(result.hidden, index), HIDDEN_COLOUR, 1.0)
            for cell, (name, label) in zip(row[2:], maps.items(), strict=True):
                draw_slice(cell, cut, view.cut(label, index), classes, title=name, **options)
                if name in empty:
                    _write_over(cell, "no foreground")
        # of a hundred organs only those in this patch
        present = set(np.unique(np.concatenate([np.unique(label) for label in maps.values()])).tolist())
        add_legend(figure, classes, present, [Patch(color=HIDDEN_COLOUR, label="hidden from the student")])
        figure.savefig(path, dpi=110)


def _write_over(cell: Axes, text: str) -> None:
    box = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none"}
    cell.text(0.5, 0.04, text, transform=cell.transAxes, ha="center", va="bottom", color="white", fontsize=9, bbox=box)
