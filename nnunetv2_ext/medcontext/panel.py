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
    results: Sequence[Diagnosis],
    path: Path,
    title: str,
    dataset_json: dict,
    labels: LabelManager,
    spacing: Sequence[float] | None = None,
    directions: Sequence[npt.NDArray[Any] | None] | None = None,
) -> None:
    """Write the picture: columns image, mask, target, student on x, student on m(x), teacher on x (if there is one).

    A column whose label map is background throughout says so, as does one without a label. A patch is drawn as its
    case would stand upright, but nnU-Net has turned and mirrored it at random.

    Args:
        results: what to draw, patches of one size.
        path: PNG to write.
        title: first line of the title; case, patch size and hidden share of each patch follow.
        dataset_json: names of the classes.
        labels: their order.
        spacing: voxel size per patch axis in mm, so that slices get their true proportions; None for cubes.
        directions: of each case's axes (core/orientation.py); None: not known.
    """
    shape = results[0].image.shape
    classes = class_names(dataset_json, labels)
    mm = (1.0,) * len(shape) if spacing is None else tuple(spacing)
    # the fullest slice is meant to show organs, not the one with the largest unannotated part
    ignored = [value for value, name in classes.items() if name == "ignore"]
    shown = [value for value in classes if value not in ignored]
    cuts = [None] if len(shape) == 2 else [0, 1, 2]
    turned = directions or [None] * len(results)
    rows = [
        (result, view_across(axis, own, augmented=True))
        for result, own in zip(results, turned, strict=True)
        for axis in cuts
    ]
    columns = 2 + max(len(_maps(result)) for result in results)
    # nnU-Net's progress plot calls seaborn.set(font_scale=2.5), which changes the fonts of the whole process
    with matplotlib.style.context("default"):
        heights = [view.height(shape, mm, 2.2) for _, view in rows]
        figure = Figure(figsize=(2.35 * columns, sum(heights) + 1.1), layout="constrained")
        size = " x ".join(map(str, shape))
        captions = [
            f"{result.case}{', unlabelled' * (result.target is None)}, patch {size}, {result.hidden.mean():.0%} hidden"
            for result in results
        ]
        figure.suptitle("\n".join((title, *captions)), fontsize=11, wrap=True)
        present: set[int] = set()
        for row, (result, view) in zip(
            figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights), rows, strict=True
        ):
            maps = _maps(result)
            guide = next(known for known in (result.target, result.teacher, result.clean) if known is not None)
            index = None if view.axis is None else fullest_slice(np.where(np.isin(guide, ignored), 0, guide), view.axis)
            options: dict[str, Any] = {"window": tuple(np.percentile(result.image, (1, 99.5)))}
            options["spacing"] = view.spacing(mm)
            cut = view.cut(result.image, index)
            draw_slice(row[0], cut, title="image" if result.target is not None else "image, unlabelled", **options)
            row[0].set_ylabel(view.caption(index), fontsize=9)
            draw_slice(row[1], cut, title="what the student sees", **options)
            shade(row[1], view.cut(result.hidden, index), HIDDEN_COLOUR, 1.0)
            for cell, (name, label) in zip(row[2:], maps.items(), strict=True):
                drawn = None if label is None else view.cut(label, index)
                draw_slice(cell, cut, drawn, classes, title=name, **options)
                if label is None:
                    _write_over(cell, "no label")
                elif not np.isin(label, shown).any():
                    _write_over(cell, "no foreground")
            present |= {int(v) for label in maps.values() if label is not None for v in np.unique(label)}
        # of a hundred organs only those in this patch
        add_legend(figure, classes, present, [Patch(color=HIDDEN_COLOUR, label="hidden from the student")])
        figure.savefig(path, dpi=110)


def _maps(result: Diagnosis) -> dict[str, npt.NDArray[Any] | None]:
    """The label maps of a row, by what stands above them; None: not known."""
    maps = {"target": result.target, "student, whole patch": result.clean, "student, masked patch": result.masked}
    return maps if result.teacher is None else {**maps, "teacher, whole patch": result.teacher}


def _write_over(cell: Axes, text: str) -> None:
    box = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none"}
    cell.text(0.5, 0.04, text, transform=cell.transAxes, ha="center", va="bottom", color="white", fontsize=9, bbox=box)
