"""The picture of PEMMA at work: both channels, the label, what the base says and what the new channel changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice, shade
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels, target_to_labels
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.core.step import Batch, top_resolution
from nnunetv2_ext.pemma.network import is_present

if TYPE_CHECKING:
    from nnunetv2_ext.pemma.training import PEMMATraining

_SAMPLES = 4
_CHANGED = "red"


@torch.no_grad()
def draw_panel(trainer: PEMMATraining, batch: Batch, path: Path) -> None:
    """A row a sample, at the slice that shows most of the label."""
    network: Any = unwrap(trainer.network)
    labels, old = trainer.label_manager, trainer.old_channels
    shown = batch.select(range(min(_SAMPLES, len(batch.keys))))
    gate = is_present(shown.data[:, old:]).tolist()
    was_training = network.training
    network.eval()
    try:
        with torch.autocast("cuda", enabled=trainer.device.type == "cuda"):
            before = top_resolution(network.base(shown.data[:, :old].contiguous())).float()
            after = top_resolution(network(shown.data)).float()
    finally:
        network.train(was_training)
    mm = trainer.configuration_manager.spacing[-len(trainer.configuration_manager.patch_size) :]
    classes = class_names(trainer.dataset_json, labels)
    present: set[int] = set()
    with matplotlib.style.context("default"):  # nnU-Net's progress plot changes the fonts of the whole process
        figure = Figure(figsize=(2.4 * 6, 2.5 * len(gate) + 1.1), layout="constrained")
        figure.suptitle(
            f"{trainer.picture_title}, epoch {trainer.current_epoch - 1}\naugmented patches", fontsize=10, wrap=True
        )
        for number, row in enumerate(figure.subplots(len(gate), 6, squeeze=False)):
            truth = target_to_labels(shown.top_target[number], labels)
            axis = None if truth.ndim == 2 else 0
            index = None if axis is None else fullest_slice(truth, axis)
            view = view_across(axis, trainer.directions_of_case(shown.keys[number]), augmented=True)
            images = [shown.data[number, channel].float().cpu().numpy() for channel in (0, old)]
            maps = [logits_to_labels(logits[number], labels) for logits in (before, after)]
            said = "the new channel" if gate[number] else "missing: gate closed"
            columns = (
                (images[0], None, shown.keys[number]),
                (images[1], None, said),
                (images[0], truth, "label"),
                (images[0], maps[0], "the base says"),
                (images[0], maps[1], "with the adapters"),
            )
            for cell, (image, labelled, title) in zip(row, columns):
                cut = None if labelled is None else view.cut(labelled, index)
                draw_slice(cell, view.cut(image, index), cut, classes, spacing=view.spacing(mm), title=title)
                present |= set() if cut is None else {int(value) for value in np.unique(cut)}
            draw_slice(row[5], view.cut(images[0], index), spacing=view.spacing(mm), title="what changed")
            shade(row[5], view.cut((maps[0] != maps[1]).astype(np.uint8), index) > 0, _CHANGED, 0.6)
        add_legend(figure, classes, present, [Patch(color=_CHANGED, label="changed by the new channel")])
        figure.savefig(path, dpi=100)
