"""The picture of SpatialNoise: where the teacher doubts the label, and what it makes of it. It shows patients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels, target_to_labels
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.spatialnoise.correction import Correction

_ROWS = 3


def draw_panel(
    batch: Batch,
    logits: Tensor,
    correction: Correction,
    path: Path,
    title: str,
    dataset_json: dict[str, Any],
    labels: LabelManager,
    spacing: Sequence[float],
) -> None:
    """A row a patch: label, teacher, probability that the label is wrong, corrected label, at the most doubtful slice.

    Args:
        batch: on any device.
        logits: (B, heads, *S) of the teacher.
        correction: of it, before the guard.
        path: PNG to write.
        title: first line.
        dataset_json, labels: of the trainer.
        spacing: mm of the spatial axes.
    """
    number = min(_ROWS, len(batch.keys))
    axis = None if batch.data.ndim == 4 else 0
    view = view_across(axis, None, augmented=True)
    classes = class_names(dataset_json, labels)
    present: set[int] = set()
    with matplotlib.style.context("default"):
        high = view.height(batch.data.shape[2:], spacing, 2.6)
        figure = Figure(figsize=(2.6 * 4 + 0.9, high * number + 1.3), layout="constrained")
        note = "augmented patches; before the guard holds back classes that are not learnt"
        figure.suptitle(f"{title}\n{note}", fontsize=10, wrap=True)
        for row, cells in enumerate(figure.subplots(number, 4, squeeze=False)):
            truth = target_to_labels(batch.top_target[row], labels)
            wrong = correction.given_up()[row, 0].cpu().numpy()
            corrected = correction.target()[row]
            maps = [truth, logits_to_labels(logits[row], labels), logits_to_labels(corrected - 0.5, labels)]
            index = None if axis is None else fullest_slice((wrong > 0.5) + (truth > 0).astype(int), axis)
            image = view.cut(batch.data[row, 0].float().cpu().numpy(), index)
            mm = view.spacing(spacing)
            titles = f"label: {batch.keys[row]}", "teacher", "corrected label"
            for cell, volume, text in zip((cells[0], cells[1], cells[3]), maps, titles, strict=True):
                shown = view.cut(volume, index)
                draw_slice(cell, image, shown, classes, spacing=mm, title=text)
                present |= {int(value) for value in np.unique(shown)}
            draw_slice(cells[2], image, spacing=mm, title="probability of error")
            shown = np.ma.masked_less(view.cut(wrong, index), 0.05)
            aspect = cells[2].get_aspect()
            heat = cells[2].imshow(shown, cmap="plasma", vmin=0, vmax=1, origin="upper", aspect=aspect)
            figure.colorbar(heat, ax=cells[2], shrink=0.8)
        add_legend(figure, classes, present)
        figure.savefig(path, dpi=100)
