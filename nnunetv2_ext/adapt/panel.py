"""The picture of a batch: what is learnt from, and what the network says. It shows patients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels, target_to_labels
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.core.step import Batch, top_resolution

if TYPE_CHECKING:
    from nnunetv2_ext.adapt.training import AdaptTraining

_SAMPLES = 6


@torch.no_grad()
def draw_batch(trainer: AdaptTraining, batch: Batch, path: Path) -> None:
    """A column a sample, label above prediction, at the slice that shows most of the label."""
    network, labels = unwrap(trainer.network), trainer.label_manager
    domain = batch.extras.get("domain") or ("new",) * len(batch.keys)
    rows = list(range(len(batch.keys)))
    if len(rows) > _SAMPLES:  # the first are new and the last old
        rows = [*rows[: _SAMPLES // 2], *rows[-_SAMPLES // 2 :]]
    shown = batch.select(rows)
    was_training = network.training
    network.eval()
    try:
        with torch.autocast("cuda", enabled=trainer.device.type == "cuda"):
            logits = top_resolution(trainer.forward(shown, network)).float()
    finally:
        network.train(was_training)
    mm = trainer.configuration_manager.spacing[-len(trainer.configuration_manager.patch_size) :]
    classes = class_names(trainer.dataset_json, labels)
    present: set[int] = set()
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(2.3 * len(rows), 5.6), layout="constrained")
        title = f"{trainer.picture_title}, epoch {trainer.current_epoch - 1}"
        figure.suptitle(f"{title}\nlabel above, prediction below; augmented patches", fontsize=10, wrap=True)
        cells = figure.subplots(2, len(rows), squeeze=False)
        for column, row in enumerate(rows):
            image = shown.data[column, 0].float().cpu().numpy()
            truth = target_to_labels(shown.top_target[column], labels)
            axis = None if image.ndim == 2 else 0
            index = None if axis is None else fullest_slice(truth, axis)
            view = view_across(axis, trainer.directions_of_case(shown.keys[column]), augmented=True)
            maps = truth, logits_to_labels(logits[column], labels)
            titles = f"{domain[row]}: {shown.keys[column]}", ""
            for cell, labelled, title in zip(cells[:, column], maps, titles):
                cut = view.cut(labelled, index)
                draw_slice(cell, view.cut(image, index), cut, classes, spacing=view.spacing(mm), title=title)
                present |= {int(value) for value in np.unique(cut)}
        add_legend(figure, classes, present)
        figure.savefig(path, dpi=100)
