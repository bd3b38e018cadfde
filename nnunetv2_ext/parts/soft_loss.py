"""nnU-Net's Dice + cross-entropy on soft targets, with its deep-supervision weights."""

import math
from collections.abc import Sequence

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn
from torch.nn import functional as F


def soft_loss(
    outputs: Tensor | Sequence[Tensor], soft_target: Tensor, mask: Tensor | None, nnunet_loss: nn.Module
) -> Tensor:
    """The trainer's own loss against probabilities instead of labels.

    A one-hot target and a full mask give nnU-Net's value. A mask gives what nnU-Net gives for an ignore label. No
    branch depends on the data: under DDP every rank gathers the same number of times, and nothing waits for the device.

    Args:
        outputs: logits (B, C, *S), or the list of them over resolutions, highest first. C counts the classes with
            background, or the regions. One tensor has weight 1.
        soft_target: (B, C, *S) in 0..1 at the highest resolution, without gradient. Lower resolutions get the mean of
            each block's voxels, weighted by the mask.
        mask: (B, 1, *S), bool or weights in 0..1; None counts all voxels. Where the mask is 0 the target may be NaN.
            A patch of zeros has no gradient: its cross-entropy is 0 and its Dice 1.
        nnunet_loss: ``trainer.loss``. Its level weights and Dice settings are used.

    Returns:
        0-dim float32.

    Raises:
        ValueError: another loss than nnU-Net's Dice + cross-entropy, or shapes that do not belong together.
    """
    levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    weights, loss = [1.0] * len(levels), nnunet_loss
    if isinstance(loss, DeepSupervisionWrapper):
        weights = weights if isinstance(outputs, Tensor) else [float(weight) for weight in loss.weight_factors]
        loss = loss.loss
    if not isinstance(loss, (DC_and_CE_loss, DC_and_BCE_loss)):
        raise ValueError(
            f"soft targets need nnU-Net's Dice + cross-entropy loss, not {type(loss).__name__}: "
            "use a trainer that keeps nnU-Net's loss"
        )
    if len(weights) != len(levels):
        raise ValueError(f"the loss weighs {len(weights)} resolutions, but there are outputs of {len(levels)}")
    target = soft_target.detach().float()
    if mask is not None:
        if mask.shape != (len(target), 1, *target.shape[2:]):
            raise ValueError(f"the mask has shape {tuple(mask.shape)}, not {(len(target), 1, *target.shape[2:])}")
        mask = mask.detach().float()
        target = torch.where(mask > 0, target, 0)
    total: Tensor | None = None
    for logits, weight in zip(levels, weights):
        if weight == 0:
            continue
        target, mask = _pooled(target, mask, logits.shape)
        value = weight * _level_loss(logits, target, mask, loss)
        total = value if total is None else total + value
    assert total is not None  # nnU-Net's wrapper has a weight other than 0
    return total


def _level_loss(logits: Tensor, target: Tensor, mask: Tensor | None, loss: DC_and_CE_loss | DC_and_BCE_loss) -> Tensor:
    dice = loss.dc(logits, target, loss_mask=mask) if loss.weight_dice else 0.0
    if isinstance(loss, DC_and_CE_loss):
        ce = F.cross_entropy(logits.float(), target, reduction="none")
    else:
        ce = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
        # nnU-Net takes the sum over regions with an ignore label, and their mean without one
        ce = ce.sum(1) if loss.use_ignore_label else ce.mean(1)
    if mask is None:
        mean = ce.mean()
    else:
        mean = (ce * mask[:, 0]).sum() / mask.sum().clamp_min(1e-8)
    return loss.weight_ce * mean + loss.weight_dice * dice


def _pooled(target: Tensor, mask: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Block means of target and mask at the size of logits (B, C, *S); a block without mask has a target of 0."""
    size, wanted = target.shape[2:], shape[2:]
    if target.shape[:2] != shape[:2] or len(size) != len(wanted) or any(s % w for s, w in zip(size, wanted)):
        raise ValueError(f"a soft target of shape {tuple(target.shape)} does not fit logits of shape {tuple(shape)}")
    block = [s // w for s, w in zip(size, wanted)]
    if math.prod(block) == 1:
        return target, mask
    pool = F.avg_pool3d if len(block) == 3 else F.avg_pool2d
    if mask is None:
        return pool(target, block), None
    share = pool(mask, block)
    # a share is 0 or at least one mask value / block size: the clamp only meets blocks without any mask
    return pool(target * mask, block) / share.clamp_min(torch.finfo(share.dtype).tiny), share
