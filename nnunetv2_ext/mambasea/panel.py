"""The picture of Mamba-Sea: patches, what GVA makes of them, and a piece of a sequence that LSA changes."""

from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from nnunetv2_ext.core.figures import draw_slice, shade
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.mambasea.gva import GVA, brightness
from nnunetv2_ext.mambasea.lsa import piece, scan_order
from nnunetv2_ext.mambasea.settings import MambaSeaSettings

_ROWS = 3
PIECE_COLOUR = "#56B4E9"


def draw_panel(batch: Batch, gva: GVA, settings: MambaSeaSettings, path: Path, title: str) -> None:
    """Write the picture: a row a patch; the patch, brightened by GVA, the change, tokens of LSA at full resolution.

    Each image has an intensity window of its own, but a patch and its brightened form share one. Every patch is shown
    brightened, whether it is dark enough for the training to do so or not; its brightness stands above it.

    Args:
        batch: on the device; the first image channel is drawn.
        gva: as trained.
        settings: of the method.
        path: PNG to write.
        title: first line of the title.
    """
    images = batch.data[:_ROWS, : gva.first.in_channels].float()  # type: ignore[union-attr]
    with torch.no_grad():
        enhanced, bright = gva.enhance(images), brightness(images).tolist()
    size = images.shape[2:]
    axis = None if len(size) == 2 else 0
    view, index = view_across(axis, None, augmented=True), None if axis is None else size[0] // 2
    # nnU-Net's progress plot calls seaborn.set(font_scale=2.5), which changes the fonts of the whole process
    with matplotlib.style.context("default"):
        height = view.height(size, (1.0,) * len(size), 2.2)
        figure = Figure(figsize=(2.5 * 4, height * len(images) + 0.9), layout="constrained")
        figure.suptitle(
            f"{title}\nGVA in front of the second branch, a piece for LSA in the first", fontsize=11, wrap=True
        )
        for number, row in enumerate(figure.subplots(len(images), 4, squeeze=False)):
            before, after = (_cut(view, x[number, 0], index) for x in (images, enhanced))
            window = tuple(np.percentile(before, (1, 99.5)))
            dark = "dark" if bright[number] < settings.tau else "not dark"
            draw_slice(row[0], before, title=f"{batch.keys[number]}", window=window)
            draw_slice(row[1], after, title=f"brightened (was {bright[number]:.2f}: {dark})", window=window)
            draw_slice(row[2], after - before, title="change")
            along = int(torch.randint(len(size), (1,)))
            order = scan_order(size, along, torch.device("cpu"))
            inside = piece(order, order.numel(), settings.lsa_share, torch.rand(1))
            draw_slice(row[3], before, title=f"LSA's piece, along axis {along}", window=window)
            shade(row[3], _cut(view, inside, index), PIECE_COLOUR, 0.4)
            row[0].set_ylabel(view.caption(index), fontsize=9)
        figure.savefig(path, dpi=110)


def _cut(view: Any, image: Tensor, index: int | None) -> np.ndarray:
    return np.asarray(view.cut(image.cpu().numpy(), index))
