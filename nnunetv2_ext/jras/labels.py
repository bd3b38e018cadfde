"""Labels of guides as masks: what a label or a target means to the mask channels, and where it says anything."""

from typing import Any

import torch
import torch.nn.functional as F
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.jras.bank import IGNORED
from nnunetv2_ext.parts.consistency import valid_mask


def mask_lut(label_manager: LabelManager) -> Tensor:
    """Which mask channels a stored label belongs to, uint8 ``(256, M)``, M = segmentation heads.

    Identity for classes, membership for regions, zeros for 255 and for values the dataset does not have.

    Raises:
        ValueError: a label above 254, which the bank's bytes cannot hold.
    """
    if max(label_manager.all_labels) >= IGNORED:
        raise ValueError(
            f"the guide bank stores labels up to {IGNORED - 1}, this dataset has the label "
            f"{max(label_manager.all_labels)}; renumber the labels, or set jras.retriever=none"
        )
    lut = torch.zeros((256, label_manager.num_segmentation_heads), dtype=torch.uint8)
    regions = label_manager.foreground_regions if label_manager.has_regions else label_manager.all_labels
    for channel, region in enumerate(regions):
        lut[list(region) if isinstance(region, (tuple, list)) else region, channel] = 1
    return lut


def masks_of_target(target: Tensor, label_manager: LabelManager) -> tuple[Tensor, Tensor]:
    """Masks ``(B, M, *S)`` fp32 and where they are known, bool ``(B, 1, *S)``, of nnU-Net's top-resolution target.

    Masks are 0 where nothing is known.
    """
    known = valid_mask(target, label_manager.ignore_label, label_manager.has_regions)
    heads = label_manager.num_segmentation_heads
    if label_manager.has_regions:
        masks = target[:, :heads].float()
    else:
        # -1 is nnU-Net's empty space, and values that are no class are ignored: neither may end in another channel
        masks = F.one_hot(target[:, 0].long().clamp(0, heads), heads + 1)[..., :heads].movedim(-1, 1).float()
    if known is None:
        return masks, torch.ones_like(target[:, :1], dtype=torch.bool)
    return masks * known, known


def pool(x: Tensor, shape: Any) -> Tensor:
    """Adaptive average pooling over the last two or three axes: ``(B, C, *S)`` to ``(B, C, *shape)``."""
    if tuple(x.shape[2:]) == tuple(shape):
        return x
    return (F.adaptive_avg_pool2d if len(shape) == 2 else F.adaptive_avg_pool3d)(x, tuple(shape))
