"""What each network is supervised on: its planes at full resolution, and the same pooled for deep supervision."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_ext.rada.views import AXES, INSIDE


def supervised_target(target: Tensor, mask: int, ignore: int) -> Tensor:
    """The label where it is annotated on a plane of ``mask``, else ``ignore``.

    A voxel counts if it has both a label and a bit: after rotation and scaling the two disagree on about 1 % of the
    plane voxels. Padding has no bit.

    Args:
        target: (B, 2 or more, X, Y, Z), label, view bits.
        mask: bits of the view.
        ignore: the ignore label.

    Returns:
        (B, 1, X, Y, Z).
    """
    label, bits = target[:, :1], target[:, 1:2]
    return torch.where((bits & (mask & AXES)) != 0, label, ignore)


def unannotated(target: Tensor, ignore: int) -> Tensor:
    """(B, X, Y, Z) mask of the voxels inside the image that nobody annotated."""
    return (target[:, 0] == ignore) & ((target[:, 1] & INSIDE) != 0)


def supervised(pool_op_kernel_sizes: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[float]]:
    """Strides and weights of the resolutions that have a loss, highest first, as in nnU-Net.

    All of the decoder's but the lowest; weights are halved from one to the next, and their sum is 1. The plans' kernel
    sizes are one per encoder stage; the bottleneck's is the last.
    """
    strides = [list(stride) for stride in pool_op_kernel_sizes][:-1]
    strides = strides[:-1] or strides
    weights = [0.5**level for level in range(len(strides))]
    return strides, [weight / sum(weights) for weight in weights]


def pooled_targets(label: Tensor, strides: Sequence[Sequence[int]], num_classes: int, ignore: int) -> list[Tensor]:
    """The label at every resolution of deep supervision, highest first.

    A block is annotated if any of its voxels is; its label is the majority of the annotated ones, the smaller label
    where two are equally frequent. nnU-Net takes the nearest voxel instead, in which a plane of one voxel vanishes.

    Args:
        label: (B, 1, X, Y, Z), ``ignore`` where not annotated.
        strides: per resolution its stride against the one above, e.g. [[1, 1, 1], [1, 2, 2], [2, 2, 2]]; the first
            is that of the highest resolution against the image.
        num_classes: C, background included.
        ignore: the ignore label.

    Returns:
        One tensor (B, 1, X / f, Y / f, Z / f) per resolution, f the product of the strides so far.

    Raises:
        ValueError: a resolution does not divide the shape.
    """
    sizes = torch.tensor(label.shape[2:])
    for stride in strides:
        if bool((sizes % torch.tensor(stride)).any()):
            raise ValueError(f"the patch {tuple(label.shape[2:])} cannot be divided by the strides {list(strides)}")
        sizes = sizes // torch.tensor(stride)
    best: list[Tensor] = []
    pooled: list[Tensor] = []
    for value in range(num_classes):  # one class at a time: a hundred one-hot channels would need gigabytes
        count = (label == value).to(torch.float32)
        for level, stride in enumerate(strides):
            # a divisor of 1 makes it a sum, exact in fp32 for blocks below 2^24 voxels
            if any(s != 1 for s in stride):
                count = F.avg_pool3d(count, tuple(stride), divisor_override=1)
            if value == 0:
                best.append(count)
                pooled.append(torch.where(count > 0, 0, ignore).to(label.dtype))
                continue
            more = count > best[level]
            best[level] = torch.where(more, count, best[level])
            pooled[level] = torch.where(more, value, pooled[level])
    return pooled


def spread_axes(mask: int, plane_axes: Sequence[int]) -> tuple[int, ...]:
    """Axes whose propagated planes a network learns from: those with planes outside its view, else all of them."""
    return tuple(axis for axis in plane_axes if not mask >> axis & 1) or tuple(plane_axes)


def propagated_target(
    target: Tensor, mask: int, axes: Sequence[int], ignore: int, nothing: int
) -> tuple[Tensor, Tensor]:
    """The label that the nearest plane of ``axes`` carried to each voxel, and how far it came.

    Voxels outside the image and those the network is supervised on anyway have none: an annotation wins.

    Args:
        target: (B, 8, X, Y, Z), see `views.LazyTarget`.
        mask: bits of the network's view.
        axes: at least one; of equally near planes that of the first counts.
        ignore: the ignore label.
        nothing: the distance that stands for none.

    Returns:
        label (B, X, Y, Z), ``ignore`` where there is none, and distance (B, X, Y, Z) in slices.
    """
    usable = ((target[:, 1] & INSIDE) != 0) & (supervised_target(target, mask, ignore)[:, 0] == ignore)
    label, distance = torch.full_like(target[:, 0], ignore), torch.full_like(target[:, 0], nothing)
    for axis in axes:
        # after rotation label and distance may disagree at the border of what was spread
        nearer = usable & (target[:, 2 + axis] != ignore) & (target[:, 5 + axis] < distance)
        label = torch.where(nearer, target[:, 2 + axis], label)
        distance = torch.where(nearer, target[:, 5 + axis], distance)
    return label, distance


def propagated_loss(logits: Tensor, label: Tensor, weight: Tensor, ignore: int) -> Tensor:
    """Cross-entropy of the voxels with a label, each times its weight; 0 without any such voxel.

    The sum is divided by the number of voxels, not by their weights, so that it fades out when all weights do.

    Shapes: logits (B, C, X, Y, Z); label (B, X, Y, Z), ``ignore`` where there is none; weight (B, X, Y, Z) float32.
    """
    losses = F.cross_entropy(logits.float(), label.long(), ignore_index=ignore, reduction="none")
    return (losses * weight).sum() / (label != ignore).sum().clamp_min(1)
