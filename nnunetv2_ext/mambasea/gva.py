"""Global visual augmentation (GVA): a small network brightens dark images (arXiv 2504.17515)."""

import torch
from torch import Tensor, nn

_EPS = 1e-6


class GVA(nn.Module):
    """Brightens dark samples: ``e = x + sigmoid(tiny(x))`` on the sample's own scale 0..1.

    ``tiny`` is a convolution to three channels, a residual convolution-norm-ReLU that is applied three times, and a
    convolution back. Kernels of 3 and the instance norm are ours.

    Args:
        channels: C of the image.
        dim: 2 or 3 spatial axes.
        tau: mean brightness below which a sample is dark.
        probability: that a dark sample is changed.
    """

    def __init__(self, channels: int, dim: int, tau: float, probability: float) -> None:
        super().__init__()
        convolution: type[nn.Module] = (nn.Conv2d, nn.Conv3d)[dim - 2]
        norm: type[nn.Module] = (nn.InstanceNorm2d, nn.InstanceNorm3d)[dim - 2]
        self.first = convolution(channels, 3, 3, padding=1)
        self.repeated = nn.Sequential(convolution(3, 3, 3, padding=1), norm(3, affine=True), nn.ReLU())
        self.last = convolution(3, channels, 3, padding=1)
        self.tau, self.probability = tau, probability

    def enhance(self, x: Tensor) -> Tensor:
        """``(B, C, *S)`` brightened, each sample within its own range. A constant sample stays."""
        low, high = _range(x)
        scaled = (x - low) / (high - low).clamp(min=_EPS)
        y = self.first(scaled)
        for _ in range(3):
            y = y + self.repeated(y)
        e = (scaled + torch.sigmoid(self.last(y))).float()
        bottom, top = _range(e)
        return low + (e - bottom) / (top - bottom).clamp(min=_EPS) * (high - low)

    def forward(self, x: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """The samples, dark ones brightened where ``draw`` ``(B,)`` from 0..1 says so; and which those are ``(B,)``."""
        chosen = (brightness(x) < self.tau) & (draw < self.probability)
        return torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), self.enhance(x), x), chosen


def brightness(x: Tensor) -> Tensor:
    """Mean ``(B,)`` of each sample ``(C, *S)`` after it is rescaled to 0..1; 0 for a constant one."""
    low, high = _range(x)
    return ((x - low) / (high - low).clamp(min=_EPS)).flatten(1).mean(1)


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (-1, *[1] * (x.ndim - 1))
    return x.flatten(1).amin(1).view(shape), x.flatten(1).amax(1).view(shape)
