"""Bidirectional copy-paste: a box of one patch in the place of the same box of another (BCP, arXiv 2305.00673)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Mixed(NamedTuple):
    """Patches of two origins.

    ``target`` float (B, heads, *S); ``first`` and ``second`` bool (B, 1, *S): known voxels of either; ``is_first`` all
    of the first.
    """

    data: Tensor
    target: Tensor
    first: Tensor
    second: Tensor
    is_first: Tensor


def outside_of_box(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """M: bool (*S), False in a box at a random place, True around it.

    Args:
        shape: of the patch.
        share: side of the box in sides of the patch, per axis; at least one voxel, and one less than the axis has.
        generator: draws the place, on its device.
    """
    mask = torch.ones(tuple(shape), dtype=torch.bool, device=generator.device)
    box = []
    for size in shape:
        side = max(1, min(size - 1, round(share * size))) if size > 1 else 1
        first = int(torch.randint(size - side + 1, (1,), generator=generator, device=generator.device))
        box.append(slice(first, first + side))
    mask[tuple(box)] = False
    return mask


def both_ways(outside: Tensor, batch: int) -> Tensor:
    """Which voxels of B mixed patches come from the first of two: bool (B, 1, *S).

    The first half of the batch keeps what is ``outside`` (*S), the second half what is inside of the box.
    """
    half = batch // 2
    mask = outside[None, None].repeat(batch, *[1] * (outside.ndim + 1))
    mask[half:] = ~mask[half:]
    return mask
