"""The picture of GIN: patches before and after a random convolution."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import torch
from matplotlib.figure import Figure

from nnunetv2_ext.core.figures import draw_slice
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.parts.random_convolution import random_convolution

_ROWS, _DRAWS = 3, 3


def draw_panel(batch: Mapping[str, Any], path: Path, title: str, layers: int, hidden: int) -> None:
    """Write the picture: a row a patch; the patch as the loader made it, random convolutions of it, the last's change.

    Each image has an intensity window of its own. The loader may have applied one to the first image already.

    Args:
        batch: of the loader, with ``data`` ``(B, C, *S)`` and ``keys``; the first channel is drawn.
        path: PNG to write.
        title: first line of the title.
        layers, hidden: of the random network.
    """
    images = torch.as_tensor(batch["data"])[:_ROWS, :1].float()
    axis = None if images.ndim == 4 else 0
    view = view_across(axis, None, augmented=True)
    index = None if axis is None else images.shape[2] // 2
    # nnU-Net's progress plot calls seaborn.set(font_scale=2.5), which changes the fonts of the whole process
    with matplotlib.style.context("default"):
        height = view.height(images.shape[2:], (1.0,) * (images.ndim - 2), 2.2)
        figure = Figure(figsize=(2.3 * (_DRAWS + 2), height * len(images) + 0.9), layout="constrained")
        figure.suptitle(f"{title}\nrandom convolutions of the input (GIN)", fontsize=11, wrap=True)
        grid = figure.subplots(len(images), _DRAWS + 2, squeeze=False)
        for row, image, key in zip(grid, images, batch["keys"], strict=False):
            draws = [random_convolution(image, layers, hidden) for _ in range(_DRAWS)]
            draw_slice(row[0], _cut(view, image, index), title=f"{key}", spacing=(1, 1))
            row[0].set_ylabel(view.caption(index), fontsize=9)
            for cell, changed in zip(row[1:], draws):
                draw_slice(cell, _cut(view, changed, index), title="a random convolution")
            draw_slice(row[-1], _cut(view, draws[-1] - image, index), title="change by the last")
        figure.savefig(path, dpi=110)


def _cut(view: Any, image: torch.Tensor, index: int | None) -> np.ndarray:
    return np.asarray(view.cut(image[0].cpu().numpy(), index))
