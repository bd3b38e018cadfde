"""The small encoders of J-RAS: the retriever's, which embeds a patch, and the guides', for image and mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def downsampling(low_shape: Sequence[int], number: int) -> list[tuple[int, ...]]:
    """Strides of `number` convolutions in a row on a patch of `low_shape`: 2 along an axis while at least 2 cells are
    left of it.

    Instance norm needs more than one cell, and a single one would say nothing about where things are.

    >>> downsampling((32, 8), 3)
    [(2, 2), (2, 2), (2, 1)]
    """
    size, strides = list(low_shape), []
    for _ in range(number):
        stride = tuple(2 if -(-n // 2) >= 2 else 1 for n in size)
        size = [-(-n // s) for n, s in zip(size, stride)]
        strides.append(stride)
    return strides


def conv_block(in_channels: int, out_channels: int, stride: Sequence[int], normalise: bool = True) -> nn.Sequential:
    """3x3(x3) convolution, instance norm and leaky ReLU in the dimension of `stride`."""
    dim = len(stride)
    layers: list[nn.Module] = [
        _CONV[dim](in_channels, out_channels, 3, stride=tuple(stride), padding=1, bias=not normalise)  # type: ignore[arg-type]
    ]
    if normalise:
        layers.append(_NORM[dim](out_channels, affine=True))
    layers.append(nn.LeakyReLU(0.01, inplace=True))
    return nn.Sequential(*layers)


class Retriever(nn.Module):
    """R: embeds low-resolution patches on the unit sphere.

    Args:
        channels: C, image channels.
        low_shape: L, cells per axis; fixes where the strides are.
        widths: channels of the convolutions; all but the first halve the patch.
        key_dim: D.

    Example:
        >>> retriever = Retriever(1, (10, 14, 10))
        >>> keys = retriever(torch.zeros(5, 1, 10, 14, 10))      # (5, 128), L2-normalised, fp32
    """

    def __init__(
        self,
        channels: int,
        low_shape: Sequence[int],
        widths: Sequence[int] = (32, 64, 128, 128),
        key_dim: int = 128,
    ) -> None:
        super().__init__()
        strides = [(1,) * len(low_shape), *downsampling(low_shape, len(widths) - 1)]
        inputs = [channels, *widths[:-1]]
        # the last one without norm: behind an instance norm every channel's mean is nearly the same for all patches
        self.blocks = nn.Sequential(
            *(
                conv_block(i, o, s, normalise=number < len(widths))
                for number, (i, o, s) in enumerate(zip(inputs, widths, strides), 1)
            )
        )
        self.project = nn.Linear(widths[-1], key_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """`(n, C, *L)` to `(n, D)`, fp32 under autocast too."""
        features = self.blocks(patches).float().flatten(2).mean(2)
        with torch.autocast(patches.device.type, enabled=False):
            return F.normalize(self.project(features), dim=1)


class BottleneckRetriever(nn.Module):
    """R for `retriever_encoder=bottleneck`: embeds patches by the segmentation network's deepest features.

    Args:
        channels: of the bottleneck.
        key_dim: D.
    """

    def __init__(self, channels: int, key_dim: int = 128) -> None:
        super().__init__()
        # behind nnU-Net's instance norm the mean alone is nearly the same for all patches
        self.project = nn.Linear(2 * channels, key_dim)

    def forward(self, features: Tensor) -> Tensor:
        """`(n, channels, *)` to `(n, D)`, L2-normalised, fp32 under autocast too."""
        flat = features.float().flatten(2)
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self.project(torch.cat((flat.mean(2), flat.amax(2)), 1)), dim=1)


class GuideEncoder(nn.Module):
    """G: reads guides, image and mask together.

    Args:
        channels: C + M, image channels and mask channels.
        low_shape: L.
        widths: channels of the convolutions; all but the first halve the guide.

    Attributes:
        fine_channels: channels of u.
        coarse_channels: channels of v.
    """

    def __init__(self, channels: int, low_shape: Sequence[int], widths: Sequence[int] = (32, 64, 128, 128)) -> None:
        super().__init__()
        strides = [(1,) * len(low_shape), *downsampling(low_shape, len(widths) - 1)]
        inputs = [channels, *widths[:-1]]
        self.blocks = nn.ModuleList(conv_block(i, o, s) for i, o, s in zip(inputs, widths, strides))
        self.fine_channels, self.coarse_channels = widths[-2], widths[-1]

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Features of guides `(n, C, *L)` with masks `(n, M, *L)`.

        Returns:
            u `(n, fine_channels, *)`, before the last halving, and v `(n, coarse_channels, *)`, after it.
        """
        x = torch.cat((images, masks), 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return x, self.blocks[-1](x)
