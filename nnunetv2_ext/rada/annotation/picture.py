"""Annotated planes of a few cases in three orthogonal views."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_ext.core.figures import HATCHED, add_legend, draw_slice, fullest_slice, hatch
from nnunetv2_ext.core.files import atomic_write
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.rada.annotation.planes import Array, Planes

AXIS_COLOURS = ("#E53935", "#43A047", "#1E88E5")
_MANY = 8  # lines per axis; those of a dense label would hide the image


class CaseView(NamedTuple):
    """A case to draw, all (X, Y, Z)."""

    name: str
    image: Array  # first channel
    label: Array
    planes: Planes
    directions: Array | None = None  # of the axes (core/orientation.py); None: not known


def draw_planes(
    views: Sequence[CaseView], path: Path, classes: Mapping[int, str], spacing: Sequence[float], ignore: int, title: str
) -> None:
    """Write a PNG with a row per case and a column per axis.

    Each column shows the case's middle plane of that axis, framed in the axis's colour, or the fullest slice if
    the axis has none. Dashed lines show where the planes of the other axes cross. Voxels with the label `ignore` are
    hatched, so that an annotated plane stands out. `spacing` is in mm per axis.
    """
    classes = {value: name for value, name in classes.items() if name != "ignore"}
    with matplotlib.style.context(["default", {"text.parse_math": False}]):
        # of each case its highest picture
        heights = [
            max(view_across(axis, view.directions).height(view.image.shape, spacing, 2.7) for axis in range(3)) + 0.2
            for view in views
        ]
        figure = Figure(figsize=(9, sum(heights) + 0.9), layout="constrained")
        grid = figure.subplots(len(views), 3, squeeze=False, height_ratios=heights)
        for row, view in zip(grid, views):
            hidden = view.label == ignore
            known = np.where(hidden, 0, view.label)
            for axis, axes in enumerate(row):
                planes = view.planes.indices[axis]
                index = planes[len(planes) // 2] if planes else fullest_slice(known, axis)
                drawn = view_across(axis, view.directions)
                mm = drawn.spacing(spacing)
                name = f"{view.name}\naxis{axis} ({drawn.caption(index)})" + ("" if planes else ": no plane")
                image, label = drawn.cut(view.image, index), drawn.cut(known, index)
                draw_slice(axes, image, label, classes, spacing=mm, letters=drawn.letters, title=name)
                hatch(axes, drawn.cut(hidden, index), mm)
                for other, line in ((drawn.columns, axes.axvline), (drawn.rows, axes.axhline)):
                    crossing = view.planes.indices[other]
                    for position in crossing if len(crossing) <= _MANY else ():
                        at = drawn.position(other, position, known.shape[other])
                        line(at, color=AXIS_COLOURS[other], linewidth=0.8, linestyle="--", alpha=0.8)
                for spine in axes.spines.values():
                    frame = {"color": AXIS_COLOURS[axis], "linewidth": 2.5} if planes else {"color": "0.8"}
                    spine.set(visible=True, **{"linewidth": 0.8, **frame})
        figure.suptitle(title, fontsize=10, wrap=True)
        add_legend(figure, classes, further=[Patch(label="not annotated", **HATCHED)])
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
