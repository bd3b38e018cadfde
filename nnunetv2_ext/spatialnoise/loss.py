"""Losses in the place of nnU-Net's cross-entropy that wrong labels pull at less.

Each takes over nnU-Net's cross-entropy of classes or its binary one of regions, with its mean and its ignore label.
"""

from typing import Literal

import torch
from torch import Tensor, nn

RobustLoss = Literal["gce", "sce", "smoothing"]
CrossEntropy = nn.CrossEntropyLoss | nn.BCEWithLogitsLoss

SMOOTHING = 0.1  # share that the label gives up, as usual
# of the symmetric cross-entropy: weights of the released code for ten classes; its log of 0 is log 1e-4 = -9.2, which
# would drown the Dice term beside it, and -4 is the usual milder one
ALPHA, BETA, LOG_ZERO = 0.1, 1.0, -4.0


def robust_loss(ce: CrossEntropy, loss: RobustLoss, q: float) -> nn.Module:
    """The loss of that name; ``q`` is of ``gce``."""
    if loss == "gce":
        return GeneralisedCrossEntropy(ce, q)
    return SymmetricCrossEntropy(ce) if loss == "sce" else SmoothedCrossEntropy(ce)


class _OfLabelProbability(nn.Module):
    """The mean of a function of the label's probability, which is all that a cross-entropy tells."""

    def __init__(self, ce: CrossEntropy) -> None:
        super().__init__()
        self.reduction = ce.reduction
        self.ce = ce
        self.ce.reduction = "none"

    def values(self, log_p: Tensor) -> Tensor:
        """Of the logarithm of the label's probability, elementwise."""
        raise NotImplementedError

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Arguments as of the cross-entropy; float32. An ignored voxel is 0 and does not count in the mean."""
        values = self.values(-self.ce(logits.float(), target))
        if self.reduction == "none":
            return values
        if isinstance(self.ce, nn.BCEWithLogitsLoss):
            return values.mean()
        return values.sum() / (target != self.ce.ignore_index).sum().clamp_min(1)


class GeneralisedCrossEntropy(_OfLabelProbability):
    """(1 - p^q) / q, which a label that the network finds impossible cannot pull at (arXiv 1805.07836).

    Args:
        ce: nnU-Net's.
        q: above 0, at most 1. Towards 0 the loss is -log p.
    """

    def __init__(self, ce: CrossEntropy, q: float) -> None:
        super().__init__(ce)
        self.q = q

    def values(self, log_p: Tensor) -> Tensor:
        """Exact for a small q."""
        return -torch.expm1(self.q * log_p) / self.q


class SymmetricCrossEntropy(_OfLabelProbability):
    """-ALPHA log p - BETA LOG_ZERO (1 - p): the cross-entropy, and that of label and network exchanged (1908.06112)."""

    def values(self, log_p: Tensor) -> Tensor:
        """Elementwise."""
        return BETA * LOG_ZERO * torch.expm1(log_p) - ALPHA * log_p


class SmoothedCrossEntropy(nn.Module):
    """nnU-Net's cross-entropy of a label that gives SMOOTHING evenly to all classes, or to both answers of a region.

    Args:
        ce: nnU-Net's.
    """

    def __init__(self, ce: CrossEntropy) -> None:
        super().__init__()
        self.ce = ce
        if isinstance(ce, nn.CrossEntropyLoss):
            ce.label_smoothing = SMOOTHING

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Arguments as of the cross-entropy."""
        if isinstance(self.ce, nn.BCEWithLogitsLoss):
            target = target + SMOOTHING * (0.5 - target)
        return self.ce(logits, target)
