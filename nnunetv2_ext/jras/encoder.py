"""The small encoders of J-RAS: the retriever's, which embeds a patch, and the guides', for image and mask."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def conv_blocks(
    channels: int, low_shape: Sequence[int], widths: Sequence[int], normalise_last: bool = True
) -> list[nn.Module]:
    """3x3(x3) convolutions, each with instance norm and leaky ReLU; all but the first halve patches of `low_shape`.

    An axis is halved while at least 2 cells are left of it: instance norm needs more than one cell, and a single one
    would say nothing about where things are.
    """
    dim, size, blocks = len(low_shape), list(low_shape), list[nn.Module]()
    for number, (inputs, outputs) in enumerate(zip((channels, *widths), widths), 1):
        stride = tuple(2 if number > 1 and -(-n // 2) >= 2 else 1 for n in size)
        size = [-(-n // s) for n, s in zip(size, stride)]
        normalise = normalise_last or number < len(widths)
        layers: list[nn.Module] = [CONV[dim](inputs, outputs, 3, stride=stride, padding=1, bias=not normalise)]  # type: ignore[arg-type]
        layers += [_NORM[dim](outputs, affine=True)] if normalise else []
        blocks.append(nn.Sequential(*layers, nn.LeakyReLU(0.01, inplace=True)))
    return blocks


class Retriever(nn.Module):
    """R: embeds low-resolution patches on the unit sphere; `low_shape` fixes where the strides of `conv_blocks` are."""

    def __init__(
        self, channels: int, low_shape: Sequence[int], widths: Sequence[int] = (32, 64, 128, 128), key_dim: int = 128
    ) -> None:
        super().__init__()
        # the last one without norm: behind an instance norm every channel's mean is nearly the same for all patches
        self.blocks = nn.Sequential(*conv_blocks(channels, low_shape, widths, normalise_last=False))
        self.project = nn.Linear(widths[-1], key_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """`(n, C, *L)` to `(n, D)`, fp32 under autocast too."""
        features = self.blocks(patches).float().flatten(2).mean(2)
        with torch.autocast(patches.device.type, enabled=False):
            return F.normalize(self.project(features), dim=1)


class BottleneckRetriever(nn.Module):
    """R for `retriever_encoder=bottleneck`: embeds patches by the segmentation network's deepest features."""

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
    """G: reads guides, image and mask together; `channels` is C + M."""

    def __init__(self, channels: int, low_shape: Sequence[int], widths: Sequence[int] = (32, 64, 128, 128)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(conv_blocks(channels, low_shape, widths))

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Features of guides `(n, C, *L)` with masks `(n, M, *L)`: u, before the last halving, and v, after it.

        They are `(n, widths[-2], *)` and `(n, widths[-1], *)`.
        """
        x = torch.cat((images, masks), 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return x, self.blocks[-1](x)
