"""Random convolutions of the input: GIN, global intensity non-linear augmentation.

Ouyang et al., "Causality-inspired single-source domain generalization for medical image segmentation", IEEE TMI 2022
(arXiv 2111.12525), section III-B. A shallow network with random weights changes intensity and texture, never shape.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from torch import Tensor
from torch.nn import functional

Channels = Literal["separate", "joint"]
KERNEL_SIZES = (1, 3)
SLOPE = 0.01  # of the leaky rectifier
_TINY = 1e-5


def random_convolution(
    x: Tensor, layers: int = 4, hidden: int = 2, generator: torch.Generator | None = None, alpha: float | None = None
) -> Tensor:
    """``alpha net(x) + (1 - alpha) x`` with the norm of x, ``net`` a convolutional network with weights from N(0, 1).

    Args:
        x: ``(C, *S)``, S of two or three axes; all channels go through one network.
        layers: convolutions, each with a kernel of 1 or 3; a leaky rectifier after all but the last.
        hidden: channels in between.
        generator: where the draws come from, on x's device; None: torch's global one.
        alpha: share of the network's output; None: drawn from U(0, 1).

    Returns:
        ``(C, *S)``, with x's Frobenius norm.

    Raises:
        ValueError: x has another number of axes, or fewer than one layer or hidden channel.
    """
    if x.ndim not in (3, 4) or layers < 1 or hidden < 1:
        raise ValueError(
            f"random_convolution takes (C, *S) with two or three spatial axes, and at least one layer and hidden "
            f"channel; got shape {tuple(x.shape)}, layers={layers}, hidden={hidden}"
        )
    convolution = functional.conv2d if x.ndim == 3 else functional.conv3d
    draw: dict[str, Any] = {"generator": generator, "device": x.device}
    widths = [len(x), *[hidden] * (layers - 1), len(x)]
    y = x[None]
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        size = KERNEL_SIZES[int(torch.randint(len(KERNEL_SIZES), (1,), **draw))]
        weight = torch.randn(outputs, inputs, *[size] * (x.ndim - 1), **draw).to(x.dtype)
        bias = torch.randn(outputs, **draw).to(x.dtype)
        y = convolution(y, weight, bias, padding=size // 2)
        if number < layers:
            y = functional.leaky_relu(y, SLOPE)
    drawn = torch.rand(1, **draw)
    share = drawn.to(x.dtype) if alpha is None else alpha
    mixed = share * y[0] + (1 - share) * x
    return mixed * (x.norm() / (mixed.norm() + _TINY))


class RandomConvolution(BasicTransform):
    """`random_convolution` of a sample's image with a probability that the training can change while workers run.

    Args:
        probability: shared tensor of one number.
        channels: ``separate``: each channel has a network of its own, for sequences of their own; ``joint``: one
            network over all channels, for the colours of one image.
        layers, hidden: as of `random_convolution`.
    """

    def __init__(self, probability: Tensor, channels: Channels, layers: int = 4, hidden: int = 2) -> None:
        super().__init__()
        self.probability, self.channels, self.layers, self.hidden = probability, channels, layers, hidden

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Whether this sample is changed; one number is drawn in any case."""
        return {"changed": bool(torch.rand(1) < self.probability)}

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Change ``image`` ``(C, *S)``; everything else of the sample stays."""
        if params["changed"]:
            image = data_dict["image"]
            parts = image.split(1) if self.channels == "separate" else (image,)
            data_dict["image"] = torch.cat([random_convolution(part, self.layers, self.hidden) for part in parts])
        return data_dict


def insert(transforms: ComposeTransforms, one: BasicTransform) -> None:
    """Put a transform of intensities behind all others of its kind: before masks, labels and cascade channels follow.

    So what lies outside of a mask for normalisation stays exactly 0. The previous stage's channels are not there yet.

    Raises:
        ValueError: the pipeline has none of the transforms that follow; nnU-Net's without augmentation, say, has one.
    """
    steps = transforms.transforms
    behind: Sequence[int] = [i for i, t in enumerate(steps) if isinstance(t, (MaskImageTransform, RemoveLabelTansform))]
    if not behind:
        raise ValueError(
            "gin needs a pipeline of nnU-Net's transforms, and this trainer's has none that removes the label -1: set "
            "gin=0, or augmentation=nnunet"
        )
    steps.insert(behind[0], one)
