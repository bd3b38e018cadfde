"""The picture of WTBCP: what the student gets, what the teacher says about it, and what the student says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice, shade
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels
from nnunetv2_ext.core.orientation import view_across

_ROWS = 3
_UNLABELLED = (0.55, 0.0, 0.75)


def draw_panel(
    keys: Sequence[str],
    data: Tensor,
    target: Tensor,
    unlabelled: Tensor,
    student: Tensor,
    path: Path,
    title: str,
    dataset_json: dict[str, Any],
    labels: LabelManager,
    spacing: Sequence[float],
) -> None:
    """A row a patch: the patch with its unlabelled voxels tinted, what is learnt of it, what the student says.

    Args:
        keys: what to write above each patch.
        data: (B, C, *S); the first channel is drawn.
        target: (B, heads, *S) of 0 and 1: the teacher's labels, in labelled voxels the annotator's; 0 where none count.
        unlabelled: bool (B, 1, *S), what counts as unlabelled.
        student: logits (B, heads, *S) of the patches.
        path: PNG to write.
        title: first line.
        dataset_json, labels: of the trainer.
        spacing: mm of the spatial axes.
    """
    number = min(_ROWS, len(keys))
    axis = None if data.ndim == 4 else 0
    view = view_across(axis, None, augmented=True)
    classes = class_names(dataset_json, labels)
    present: set[int] = set()
    with matplotlib.style.context("default"):
        high = view.height(data.shape[2:], spacing, 2.8)
        figure = Figure(figsize=(2.8 * 3, high * number + 1.4), layout="constrained")
        figure.suptitle(f"{title}\naugmented patches; tinted: unlabelled voxels that count", fontsize=10, wrap=True)
        for row, cells in enumerate(figure.subplots(number, 3, squeeze=False)):
            learnt, said = (logits_to_labels(maps[row] - 0.5, labels) for maps in (target, student + 0.5))
            index = None if axis is None else fullest_slice(np.maximum(learnt, said), axis)
            image = view.cut(data[row, 0].float().cpu().numpy(), index)
            outline = view.cut(unlabelled[row, 0].cpu().numpy(), index)
            titles = keys[row], "teacher (labelled part: annotator)", "student"
            for cell, volume, text in zip(cells, (None, learnt, said), titles, strict=True):
                shown = None if volume is None else view.cut(volume, index)
                draw_slice(cell, image, shown, classes, spacing=view.spacing(spacing), title=text)
                if shown is not None:
                    present |= {int(value) for value in np.unique(shown)}
            shade(cells[0], outline, _UNLABELLED, 0.3)
            cells[0].set_ylabel(view.caption(index), fontsize=9)
        add_legend(figure, classes, present)
        figure.savefig(path, dpi=100)
