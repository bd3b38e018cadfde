"""The picture of a training on photographs: patches, truth and prediction."""

from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.figures import add_legend, draw_slice
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels, target_to_labels
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.core.step import Batch, top_resolution

_ROWS = 3


def draw_panel(trainer: Any, batch: Batch, path: Path, title: str) -> None:
    """Write the picture: a row a patch of the batch; the patch, its truth, what the network predicts.

    Three channels are drawn in colours, each patch from its own minimum to its own maximum.
    """
    network = unwrap(trainer.network)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            logits = top_resolution(network(batch.data[:_ROWS].float()))
    finally:
        network.train(was_training)
    labels, classes = trainer.label_manager, class_names(trainer.dataset_json, trainer.label_manager)
    view = view_across(None, None, augmented=True)
    present: set[int] = set()
    # nnU-Net's progress plot calls seaborn.set(font_scale=2.5), which changes the fonts of the whole process
    with matplotlib.style.context("default"):
        height = view.height(batch.data.shape[2:], (1.0, 1.0), 3.0)
        figure = Figure(figsize=(9.6, height * len(logits) + 0.9), layout="constrained")
        figure.suptitle(title, fontsize=11, wrap=True)
        for row, sample in zip(figure.subplots(len(logits), 3, squeeze=False), range(len(logits)), strict=True):
            image = batch.data[sample].float().cpu().numpy()
            low, high = float(image.min()), float(image.max())
            scaled = (image - low) / max(high - low, 1e-6)
            channels = [view.cut(channel) for channel in (scaled if len(scaled) == 3 else scaled[:1])]
            cut = np.stack(channels, -1) if len(channels) == 3 else channels[0]
            maps = {
                "truth": target_to_labels(batch.top_target[sample], labels),
                "prediction": logits_to_labels(logits[sample], labels),
            }
            draw_slice(row[0], cut, title=batch.keys[sample])
            row[0].set_ylabel(view.caption(None), fontsize=9)
            for cell, (name, label) in zip(row[1:], maps.items(), strict=True):
                draw_slice(cell, cut, view.cut(label), classes, title=name)
                present |= {int(value) for value in np.unique(label)}
        add_legend(figure, classes, present)
        figure.savefig(path, dpi=110)
