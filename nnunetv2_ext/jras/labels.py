"""Labels of guides: the low-resolution label map of a patch, and what a label means to the mask channels."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.jras.bank import OUTSIDE

MIN_FOREGROUND = 0.25  # of a cell; a plain majority would delete thin structures at a quarter of the resolution
MAX_IGNORED = 0.5  # of a cell
_ROUNDING = 1e-6  # pooling divides in fp32; the shares of two numbers of voxels differ by far more


def low_res_shape(patch_size: Sequence[int], store_stride: int = 4) -> tuple[int, ...]:
    """L, cells per axis of a stored patch: ``max(min(P, 8), ceil(P / store_stride))``."""
    return tuple(max(min(p, 8), -(-p // store_stride)) for p in patch_size)


def adaptive_pool(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Adaptive average pooling over the last two or three axes: ``(B, C, *P)`` to ``(B, C, *shape)``."""
    pool: Any = F.adaptive_avg_pool2d if len(shape) == 2 else F.adaptive_avg_pool3d
    return pool(x, tuple(shape))


def low_res_labels(labels: Tensor, shape: Sequence[int], ignored: Tensor) -> Tensor:
    """Label of each cell of ``shape``, L, uint8 ``(*L)``.

    A cell has the most frequent foreground label (the lowest one of equals) if foreground covers at least 25 % of it,
    else background, and 255 if more than half of it is ignored. Cells are those of adaptive average pooling, so they
    lie where the image's do.

    Args:
        labels: ``(*P)`` integers, 0 or less = background, others below 255.
        ignored: ``(*P)`` bool, voxels that are ignored or outside the image; their label does not count.
    """
    foreground = (labels > 0) & ~ignored
    result = torch.zeros(tuple(shape), dtype=torch.uint8, device=labels.device)
    present = torch.bincount(labels[foreground].long()).nonzero().flatten()
    if len(present):
        parts = torch.stack([foreground, *(foreground & (labels == value) for value in present)])
        shares = adaptive_pool(parts[None].float(), shape)[0]
        # equal counts give equal shares, of which argmax takes the first: the lowest label
        winner = present.to(torch.uint8)[shares[1:].argmax(0)]
        result = torch.where(shares[0] >= MIN_FOREGROUND - _ROUNDING, winner, result)
    hidden = adaptive_pool(ignored[None, None].float(), shape)[0, 0]
    return result.masked_fill_(hidden > MAX_IGNORED + _ROUNDING, OUTSIDE)


def mask_lut(label_manager: LabelManager) -> Tensor:
    """Which mask channels a stored label belongs to, uint8 ``(256, M)``, M = segmentation heads.

    Identity for classes, membership for regions, zeros for 255 and for values the dataset does not have.

    Raises:
        ValueError: a label above 254, which the bank's bytes cannot hold.
    """
    if max(label_manager.all_labels) >= OUTSIDE:
        raise ValueError(
            f"the guide bank stores labels up to {OUTSIDE - 1}, this dataset has the label "
            f"{max(label_manager.all_labels)}; renumber the labels, or set jras.retriever=none"
        )
    lut = torch.zeros((256, label_manager.num_segmentation_heads), dtype=torch.uint8)
    regions = label_manager.foreground_regions if label_manager.has_regions else label_manager.all_labels
    for channel, region in enumerate(regions):
        lut[list(region) if isinstance(region, (tuple, list)) else region, channel] = 1
    return lut
