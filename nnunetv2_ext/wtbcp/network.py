"""Three of the plan's networks, for the image and its two Haar bands, that share their skips (after XNet v2)."""

from typing import Any, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn
from torch.nn import functional as F


class Outputs(NamedTuple):
    """What the three networks say in training: logits (B, heads, *S), or lists of them over resolutions."""

    main: Any
    low: Any
    high: Any


def haar_bands(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high band (B, C, *S) of one level of the orthogonal Haar transform, each transformed back by itself.

    Their sum is ``x``. The low band is the mean of each block of two voxels per axis; all others make the high band. An
    axis of odd size is not transformed.
    """
    block = [2 - size % 2 for size in x.shape[2:]]
    pool = F.avg_pool3d if len(block) == 3 else F.avg_pool2d
    low = pool(x, block)
    for axis, repeats in enumerate(block, 2):
        low = low.repeat_interleave(repeats, axis)
    return low, x - low


class WaveletUNet(nn.Module):
    """Main network of the image, and two that see a band each and a share of the other.

    At the shallow half of the resolutions a block of 1 x 1 convolution, norm and non-linearity joins the skips of main
    and high network, at the deep half those of main and low network. Both decoders then get the joint skip. In eval
    mode only the main decoder runs, and its logits are returned as a plain network's are.

    Args:
        main, low, high: nnU-Net's networks of the same plans, each with ``encoder`` and ``decoder``.
        alpha, beta: the low network sees L + alpha H, the high one H + beta L.

    Raises:
        ValueError: networks without encoder and decoder.
    """

    stock_prefixes = ("main.", "low.", "high.")

    def __init__(self, main: Any, low: Any, high: Any, alpha: float, beta: float) -> None:
        super().__init__()
        encoder = getattr(main, "encoder", None)
        if encoder is None or not hasattr(getattr(main, "decoder", None), "seg_layers"):
            raise ValueError(
                f"wtbcp.mode=wtbcp joins the skips of U-Nets, and {type(main).__name__} has no encoder and decoder: "
                "use plans of the standard or the residual encoder planner, or another mode"
            )
        self.main, self.low, self.high, self.alpha, self.beta = main, low, high, alpha, beta
        of_block = encoder.norm_op, encoder.norm_op_kwargs, None, None, encoder.nonlin, encoder.nonlin_kwargs
        self.joints = nn.ModuleList(
            StackedConvBlocks(1, encoder.conv_op, 2 * width, width, 1, 1, encoder.conv_bias, *of_block)
            for width in encoder.output_channels
        )

    # properties: as attributes their weights would be in the state twice. nnU-Net switches the decoder's outputs
    encoder = property(lambda self: self.main.encoder)
    decoder = property(lambda self: self.main.decoder)

    def forward(self, x: Tensor) -> Any:
        """Of (B, C, *S): `Outputs` in training; else the main network's."""
        low, high = haar_bands(x)
        skips = list(self.main.encoder(x))
        of_low = list(self.low.encoder(low + self.alpha * high))
        of_high = list(self.high.encoder(high + self.beta * low))
        shallow = len(skips) // 2
        for level, joint in enumerate(self.joints):
            other = of_high if level < shallow else of_low
            skips[level] = other[level] = joint(torch.cat((skips[level], other[level]), 1))
        if not self.training:
            return self.main.decoder(skips)
        for network in (self.low, self.high):
            network.decoder.deep_supervision = self.main.decoder.deep_supervision
        return Outputs(self.main.decoder(skips), self.low.decoder(of_low), self.high.decoder(of_high))


def dice_consistency(one: Tensor, other: Tensor, valid: Tensor, regions: bool) -> Tensor:
    """1 - the soft Dice of two predictions, mean over samples and structures; the gradient reaches both. 0-dim float32.

    Args:
        one, other: logits (B, heads, *S) of the highest resolution.
        valid: bool (B, 1, *S), where it counts.
        regions: the heads are regions; else the first one is the background, which does not count.
    """
    p, q = (z.float().sigmoid() if regions else z.float().softmax(1)[:, 1:] for z in (one, other))
    axes = tuple(range(2, one.ndim))
    both, sizes = (p * q * valid).sum(axes), ((p * p + q * q) * valid).sum(axes)
    return 1 - ((2 * both + 1e-5) / (sizes + 1e-5)).mean()
