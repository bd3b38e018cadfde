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
_CHUNK = 1 << 17  # voxels at a time, which stay in a processor's cache


def random_convolution(
    x: Tensor, layers: int = 4, hidden: int = 2, generator: torch.Generator | None = None, alpha: float | None = None
) -> Tensor:
    """``alpha net(x) + (1 - alpha) x`` with the norm of x, ``net`` a convolutional network with weights from N(0, 1).

    Args:
        x: ``(C, *S)``, S of two or three axes; all channels go through one network.
        layers: convolutions, each with a kernel of 1 or 3; a leaky rectifier after all but the last.
        hidden: channels in between.
        generator: where the draws come from, on the CPU wherever x is; None: torch's global one.
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
    draw: dict[str, Any] = {"generator": generator}  # no word from a GPU is waited for
    widths = [len(x), *[hidden] * (layers - 1), len(x)]
    y = x
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        size = KERNEL_SIZES[int(torch.randint(len(KERNEL_SIZES), (1,), **draw))]
        weight = torch.randn(outputs, inputs, *[size] * (x.ndim - 1), **draw).to(x)
        bias = torch.randn(outputs, **draw).to(x)
        y = _convolution(y, weight, bias)
        if number < layers:
            y = functional.leaky_relu(y, SLOPE)
    drawn = torch.rand(1, **draw)
    share = drawn.to(x) if alpha is None else alpha
    mixed = share * y + (1 - share) * x
    return mixed * (x.norm() / (mixed.norm() + _TINY))


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(I, *S)`` to ``(O, *S)`` with zero padding; weight ``(O, I, k, ...)``."""
    size = weight.shape[-1]
    if x.ndim == 4 and size == 3 and x.device.type == "cpu":
        return convolve_volume(x, weight, bias)
    convolution = functional.conv2d if x.ndim == 3 else functional.conv3d
    return convolution(x[None], weight, bias, padding=size // 2)[0]


def convolve_volume(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv3d of few channels, 3 x 3 x 3, as nine products of small matrices.

    On a CPU torch's own conv3d takes ten times as long for one or two channels. In the flattened padded volume each
    neighbour of a voxel lies at one fixed distance, so a shift is a slice.

    Args:
        x: ``(I, X, Y, Z)``.
        weight, bias: ``(O, I, 3, 3, 3)`` and ``(O,)``.

    Returns:
        ``(O, X, Y, Z)``.
    """
    padded = functional.pad(x, (1,) * 6)
    plane, row = padded[0, 0].numel(), padded.shape[-1]
    flat = padded.flatten(1)
    first, last = plane + row + 1, flat.shape[1] - plane - row - 1  # from the first inner voxel to the last
    matrices = weight.permute(2, 3, 0, 1, 4).flatten(3)  # (3, 3, O, 3 I)
    out = bias[:, None].repeat(1, flat.shape[1])
    for start in range(first, last, _CHUNK):
        stop = min(start + _CHUNK, last)
        behind, ahead = start - first, stop + plane + row - 1
        shifts = [flat[:, behind + k : ahead + k] for k in range(3)]  # along the last axis
        neighbours = torch.stack(shifts, 1).flatten(0, 1)  # (3 I, n)
        for i in range(3):
            for j in range(3):
                at = i * plane + j * row
                out[:, start:stop].addmm_(matrices[i, j], neighbours[:, at : at + stop - start])
    return out.view(-1, *padded.shape[1:])[:, 1:-1, 1:-1, 1:-1]


class RandomConvolution(BasicTransform):
    """`random_convolution` of a sample's image with a probability that the training can change while workers run.

    Args:
        probability: shared tensor of one number.
        channels: ``separate``: each channel has a network of its own, for sequences of their own; ``joint``: one
            network over all channels, for the colours of one image.
        layers, hidden: as of `random_convolution`.
    """

    generator: torch.Generator | None = None  # where the draws come from, on the CPU; None: torch's global one

    def __init__(self, probability: Tensor, channels: Channels, layers: int = 4, hidden: int = 2) -> None:
        super().__init__()
        self.probability, self.channels, self.layers, self.hidden = probability, channels, layers, hidden

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Whether this sample is changed; one number is drawn in any case."""
        return {"changed": bool(torch.rand(1, generator=self.generator) < self.probability)}

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Change ``image`` ``(C, *S)``; everything else of the sample stays."""
        if params["changed"]:
            image = data_dict["image"]
            parts = image.split(1) if self.channels == "separate" else (image,)
            drawn = (random_convolution(part, self.layers, self.hidden, self.generator) for part in parts)
            data_dict["image"] = torch.cat(list(drawn))
        return data_dict

    def of_batch(self, data: Tensor, masked: Sequence[bool], seed: int) -> Tensor:
        """What a loader's worker does to each sample, done to a finished batch where it is, on a GPU say.

        Args:
            data: ``(B, C, *S)``, the image channels first; further ones stay.
            masked: for each image channel whether nnU-Net blanks what lies outside of the mask for normalisation; its
                exact zeros then stay.
            seed: of all draws.

        Returns:
            ``(B, C, *S)``; the same as of a worker with the same draws. Where channels are masked, a worker's
            convolution sees what lies outside of the mask, and this one sees zeros there.
        """
        images, rest = data[:, : len(masked)], data[:, len(masked) :]
        self.generator = torch.Generator().manual_seed(seed)
        changed = torch.stack([self(image=image)["image"] for image in images])
        self.generator = None
        if any(masked):
            blank = (images == 0) & torch.tensor(masked, device=data.device).view(-1, *[1] * (data.ndim - 2))
            changed = changed.masked_fill(blank, 0)
        return torch.cat((changed, rest), 1)


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
