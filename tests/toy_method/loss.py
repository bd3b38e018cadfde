"""The toy's mathematics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

NEVER_SEEN = -1.0  # value of a place of which nothing is known


class IntensityHead(nn.Module):
    """Predicts the image from the logits, voxel by voxel: one weight a class and a bias.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(classes))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        """``(B, C, *S)`` to ``(B, *S)``."""
        return torch.einsum("bc...,c->b...", logits.float(), self.weight) + self.bias


def intensity_loss(predicted: Tensor, image: Tensor) -> Tensor:
    """Mean squared error of ``(B, *S)`` to the first channel of ``(B, C_in, *S)``, 0-dim, in squared intensities."""
    return (predicted - image[:, 0].float()).square().mean()


def foreground_probability(logits: Tensor, regions: bool) -> Tensor:
    """``(B,)``: mean over the voxels of the probability of any foreground, 0..1.

    Classes: 1 - p(background). Regions: the largest of their probabilities.
    """
    logits = logits.detach().float()
    p = logits.sigmoid().amax(1) if regions else 1 - logits.softmax(1)[:, 0]
    return p.flatten(1).mean(1)


def running_mean(old: np.ndarray, value: float, rate: float) -> np.ndarray:
    """old + rate (value - old); ``value`` itself where ``old`` was never seen."""
    return np.where(old == NEVER_SEEN, value, old + rate * (value - old))
