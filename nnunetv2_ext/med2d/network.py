"""Med2DSegNet: Med blocks in the encoder, a light decoder (after Med-2D SegNet, arXiv 2504.14715).

The paper names the block's parts and the number of parameters, 2.07 million. Stage widths, blocks a stage, where it
downsamples, how the pooled vector rejoins, decoder, norm and activation are ours.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Gap = Literal["gate", "add", "none"]
Norm = Literal["batch", "instance"]
WIDTHS, BLOCKS = (8, 16, 32, 64, 96, 124), (1, 1, 2, 2, 4, 4)
_NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}
_SMALLEST_WIDTH = 8


def _norm(kind: Norm, channels: int) -> nn.Module:
    return _NORMS[kind](channels, affine=True)


class MedBlock(nn.Module):
    """Expansion, depthwise convolution, use of the global average, reduction, residual.

    ``(B, i, H, W)`` to ``(B, o, ceil(H/s), ceil(W/s))``; the residual is there only if ``i == o`` and ``s == 1``.

    Args:
        inputs, outputs: channels i and o.
        stride: s, of the depthwise convolution.
        expansion: the inner width is ``expansion * i``.
        kernel_size: of the depthwise convolution, odd.
        gap: what becomes of the global average of the inner map: ``gate`` multiplies each channel with a sigmoid of it
            (two linear layers), ``add`` adds it, ``none`` leaves it out.
        norm: of all three convolutions.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        expansion: int = 6,
        kernel_size: int = 7,
        gap: Gap = "gate",
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        inner, reduced = expansion * inputs, max(4, inputs // 4)
        self.gap = gap
        self.has_residual = inputs == outputs and stride == 1
        self.expand = nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), _norm(norm, inner), nn.ReLU(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, kernel_size, stride, kernel_size // 2, groups=inner, bias=False),
            _norm(norm, inner),
            nn.ReLU(inplace=True),
        )
        self.gate = (
            nn.Sequential(nn.Linear(inner, reduced), nn.ReLU(inplace=True), nn.Linear(reduced, inner))
            if gap == "gate"
            else None
        )
        self.reduce = nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), _norm(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        v = self.depthwise(self.expand(x))
        if self.gap != "none":
            mean = v.mean((2, 3))
            v = v * torch.sigmoid(self.gate(mean))[..., None, None] if self.gate else v + mean[..., None, None]
        y = self.reduce(v)
        return x + y if self.has_residual else y


class _Encoder(nn.Module):
    """Skips of all stages, the finest first, with nnU-Net's attributes of an encoder."""

    def __init__(
        self,
        input_channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[Sequence[int]],
        block: Callable[..., MedBlock],
        norm: Norm,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(input_channels if i == 0 else widths[0], widths[0], norm)
                                   for i in range(blocks[0])]  # fmt: skip
        stages: list[nn.Module] = [nn.Sequential(*layers)]
        for before, width, number, stride in zip(widths, widths[1:], blocks[1:], strides[1:]):
            rest = [block(width, width) for _ in range(number - 1)]
            stages.append(nn.Sequential(block(before, width, stride[0]), *rest))
        self.stages = nn.Sequential(*stages)
        self.output_channels = list(widths)
        self.strides = [list(stride) for stride in strides]
        self.conv_op = nn.Conv2d
        self.return_skips = True

    def forward(self, x: Tensor) -> list[Tensor]:
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


def _convolution(inputs: int, outputs: int, norm: Norm) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), _norm(norm, outputs), nn.ReLU(inplace=True)
    )


class _Decoder(nn.Module):
    """Upsampling, the skip, one 3x3 convolution to the skip's width; a head at every resolution."""

    def __init__(self, widths: Sequence[int], num_classes: int, norm: Norm, deep_supervision: bool) -> None:
        super().__init__()
        steps = list(zip(widths[::-1], widths[-2::-1]))  # (from below, width of the skip), the coarsest first
        self.stages = nn.ModuleList(_convolution(below + skip, skip, norm) for below, skip in steps)
        self.seg_layers = nn.ModuleList(nn.Conv2d(skip, num_classes, 1) for _, skip in steps)
        self.deep_supervision = deep_supervision

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        x, outputs = skips[-1], []
        for stage, head, skip in zip(self.stages, self.seg_layers, skips[-2::-1]):
            x = functional.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat((x, skip), 1))
            if self.deep_supervision or skip is skips[0]:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class Med2DSegNet(nn.Module):
    """A 2-D encoder and decoder with nnU-Net's contract, so that plans can name it and every trainer train it.

    ``(B, C, H, W)`` to ``(B, K, H, W)``; with ``decoder.deep_supervision`` to the list over the resolutions of the
    stages but the last, the finest first. H and W divisible by the product of the strides keep all maps exact.

    Args:
        input_channels, num_classes: C and K.
        features_per_stage, n_blocks_per_stage: width of each stage, and its number of blocks. Stage 0 consists of
            3x3 convolutions, the others of Med blocks.
        strides: of each stage's first block, both axes alike, as in nnU-Net's plans; ``[1, 1]`` first.
        expansion, kernel_size, gap, norm: see `MedBlock`.

    Raises:
        ValueError: fewer than three stages, lists of different lengths, a width below 8, strides that differ between
            the axes, or an unknown gap or norm.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int] = WIDTHS,
        n_blocks_per_stage: Sequence[int] = BLOCKS,
        strides: Sequence[Sequence[int]] = ((1, 1), *((2, 2),) * 5),
        expansion: int = 6,
        kernel_size: int = 7,
        gap: Gap = "gate",
        norm: Norm = "batch",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        lengths = {len(features_per_stage), len(n_blocks_per_stage), len(strides)}
        if len(lengths) > 1 or min(lengths) < 3:
            raise ValueError(
                f"Med2DSegNet needs at least 3 stages, each with a width, a number of blocks and a stride; got "
                f"{len(features_per_stage)} widths, {len(n_blocks_per_stage)} numbers and {len(strides)} strides"
            )
        if min(features_per_stage) < _SMALLEST_WIDTH or min(n_blocks_per_stage) < 1:
            raise ValueError(
                f"stages of Med2DSegNet have at least {_SMALLEST_WIDTH} channels and 1 block; got widths "
                f"{list(features_per_stage)} and blocks {list(n_blocks_per_stage)}"
            )
        if any(len(set(stride)) > 1 or len(stride) != 2 for stride in strides):
            raise ValueError(f"strides of Med2DSegNet are pairs of equal numbers; got {[list(s) for s in strides]}")
        if gap not in ("gate", "add", "none") or norm not in _NORMS or kernel_size % 2 == 0:
            raise ValueError(
                f"Med2DSegNet knows gap=gate|add|none, norm=batch|instance and odd kernel sizes; got gap={gap}, "
                f"norm={norm}, kernel_size={kernel_size}"
            )
        block = partial(MedBlock, expansion=expansion, kernel_size=kernel_size, gap=gap, norm=norm)
        self.encoder = _Encoder(input_channels, features_per_stage, n_blocks_per_stage, strides, block, norm)
        self.decoder = _Decoder(features_per_stage, num_classes, norm, deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, see the class."""
        return self.decoder(self.encoder(x))
