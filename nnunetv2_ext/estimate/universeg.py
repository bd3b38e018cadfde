"""UniverSeg's network, a segmenter without training, on weights that the user has.

Butoi et al., "UniverSeg: Universal Medical Image Segmentation", ICCV 2023 (arXiv 2304.06131), section 3.2 (equations 3
and 4). The names of the tensors, and that a cross-convolution has no activation, are those of the released weights.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_ext.parts.weights import read_weights

SIZE = 128  # of its images, which lie within 0 and 1
SUPPORT = 64  # images with masks that the released weights were trained with
_CONVOLUTIONS = ("cross.cross_conv", "target.vmapped.conv", "support.vmapped.conv")


class UniverSeg:
    """The network, its widths and depth as in the file.

    Raises:
        ValueError: the file is missing, holds no tensors, or those of another network.
    """

    def __init__(self, file: Path, device: str) -> None:
        weights = read_weights(file, "--reverse universeg")
        self.depth = sum(name.startswith("enc_blocks.") and name.endswith("cross_conv.weight") for name in weights)
        self.weights = {name: value.float().to(device) for name, value in weights.items()}
        blocks = [f"enc_blocks.{n}" for n in range(self.depth)] + [f"dec_blocks.{n}" for n in range(self.depth - 1)]
        places = [f"{block}.{part}" for block in blocks for part in _CONVOLUTIONS] + ["out_conv.conv"]
        if wrong := _difference(weights, {f"{place}.{kind}" for place in places for kind in ("weight", "bias")}):
            raise ValueError(f"{file} does not hold UniverSeg's weights ({wrong}): give universeg_v1_nf64_ss64_STA.pt")
        try:
            self(torch.zeros(1, 1, 2**self.depth, 2**self.depth), torch.zeros(1, 2, 2**self.depth, 2**self.depth))
        except RuntimeError as error:
            raise ValueError(f"the tensors of {file} do not fit each other ({error}): download it again") from error

    @torch.inference_mode()
    def __call__(self, image: Tensor, support: Tensor) -> Tensor:
        """Logits ``(1, 1, H, W)`` on the CPU; H and W are divisible by ``2 ** (depth - 1)``.

        Args:
            image: ``(1, 1, H, W)``.
            support: ``(N, 2, H, W)``, images with their masks behind them.
        """
        device = self.weights["out_conv.conv.bias"].device
        u, v = image.to(device), support.to(device)
        skipped = []
        for n in range(self.depth):
            u, v = self._block(f"enc_blocks.{n}", u, v)
            if n < self.depth - 1:
                skipped.append((u, v))
                u, v = functional.max_pool2d(u, 2), functional.max_pool2d(v, 2)
        for n, (left_u, left_v) in enumerate(reversed(skipped)):
            u, v = torch.cat((_doubled(u), left_u), 1), torch.cat((_doubled(v), left_v), 1)
            u, v = self._block(f"dec_blocks.{n}", u, v)
        return self._convolution("out_conv.conv", u).cpu()

    def _block(self, block: str, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cross, of_image, of_support = (f"{block}.{name}" for name in _CONVOLUTIONS)
        weight, bias = (self.weights[f"{cross}.{kind}"] for kind in ("weight", "bias"))
        # a convolution of stacked channels is a sum: the image's part is the same beside each member of the support
        first, second = weight[:, : u.shape[1]], weight[:, u.shape[1] :]
        z = functional.conv2d(u, first, padding="same") + functional.conv2d(v, second, bias, padding="same")
        activated = functional.leaky_relu
        return (
            activated(self._convolution(of_image, z.mean(0, keepdim=True))),
            activated(self._convolution(of_support, z)),
        )

    def _convolution(self, place: str, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weights[f"{place}.weight"], self.weights[f"{place}.bias"], padding="same")


def _doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def _difference(weights: Mapping[str, Tensor], needed: set[str]) -> str:
    if missing := sorted(needed - set(weights)):
        return f"{missing[0]} is missing"
    return next((f"{name} is unknown" for name in weights if name not in needed), "")
