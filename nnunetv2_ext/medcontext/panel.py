"""The picture of MedContext at work: one patch, its mask, and what student and teacher make of it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.core.labelmaps import class_names
from nnunetv2_ext.core.overlay import draw_slice, fullest_slice, label_colours, take_slice
from nnunetv2_ext.medcontext.diagnosis import Diagnosis

HIDDEN_COLOUR = (0.55, 0.0, 0.75)


def draw_panel(result: Diagnosis, path: Path, title: str, dataset_json: dict, labels: LabelManager) -> None:
    """Write the picture: columns image, mask, target, student on x, student on m(x), teacher on x; a row per axis (3-D) or one (2-D)."""
    image, hidden = result.image, result.hidden
    maps = {
        "target": result.target,
        "student, whole patch": result.clean,
        "student, masked patch": result.masked,
        "teacher, whole patch": result.teacher,
    }
    classes = class_names(dataset_json, labels)
    # nnU-Net's progress plot calls seaborn.set(font_scale=2.5), which changes the fonts of the whole process
    with matplotlib.style.context("default"):
        axes_to_cut = range(3) if image.ndim == 3 else [None]
        rows = len(axes_to_cut)
        figure = Figure(figsize=(2.35 * 6, 2.5 * rows + 1.0), layout="constrained")
        figure.suptitle(
            f"{title}: {result.case}, patch {' x '.join(map(str, image.shape))}, {hidden.mean():.0%} hidden"
        )
        grid = figure.subplots(rows, 6, squeeze=False)
        window = tuple(np.percentile(image, (1, 99.5)))
        for row, axis in zip(grid, axes_to_cut, strict=True):
            index = None if axis is None else fullest_slice(result.target, axis)

            def cut(volume: np.ndarray, axis: int | None = axis, index: int | None = index) -> np.ndarray:
                return volume.T if axis is None or index is None else take_slice(volume, axis, index)

            position = "2-D patch" if axis is None else f"axis {axis}, slice {index}"
            draw_slice(row[0], cut(image), window=window, title=f"image ({position})")
            draw_slice(row[1], cut(image), window=window, title="what the student sees")
            overlay = np.zeros((*cut(hidden).shape, 4))
            overlay[cut(hidden)] = (*HIDDEN_COLOUR, 1.0)
            row[1].imshow(overlay, origin="lower", interpolation="nearest")
            for cell, (name, label) in zip(row[2:], maps.items(), strict=True):
                draw_slice(cell, cut(image), cut(label), classes, window=window, title=name)
        handles = [Patch(color=colour, label=classes[value]) for value, colour in label_colours(classes).items()]
        handles.append(Patch(color=HIDDEN_COLOUR, label="hidden from the student"))
        figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
        figure.savefig(path, dpi=110)
