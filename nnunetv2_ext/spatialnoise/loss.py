"""Generalised cross-entropy, which a label that the network finds impossible cannot pull at (arXiv 1805.07836)."""

import torch
from torch import Tensor, nn


class GeneralisedCrossEntropy(nn.Module):
    """(1 - p^q) / q of the probability p of the label, in the place of nnU-Net's cross-entropy and with its mean.

    Args:
        ce: nnU-Net's cross-entropy of classes, or its binary one of regions. It is taken over.
        q: above 0, at most 1. Towards 0 the loss is -log p.
    """

    def __init__(self, ce: nn.CrossEntropyLoss | nn.BCEWithLogitsLoss, q: float) -> None:
        super().__init__()
        self.q, self.reduction = q, ce.reduction
        self.ce = ce
        self.ce.reduction = "none"

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Arguments as of the cross-entropy; float32. An ignored voxel is 0 and does not count in the mean."""
        log_p = -self.ce(logits.float(), target)
        values = -torch.expm1(self.q * log_p) / self.q  # exact for a small q
        if self.reduction == "none":
            return values
        if isinstance(self.ce, nn.BCEWithLogitsLoss):
            return values.mean()
        return values.sum() / (target != self.ce.ignore_index).sum().clamp_min(1)
