"""Patches of preprocessed cases, cut where one wants them and not augmented."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor


def corner_around(voxel: Sequence[int], shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """Lowest voxel of the patch around a voxel: moved inside the image of ``shape``, or centred on that."""
    parts = zip(voxel, _three(patch_size), corner_range(shape, patch_size))
    return tuple(int(min(max(v - p // 2, low), high)) for v, p, (low, high) in parts)


def corner_range(shape: Sequence[int], patch_size: Sequence[int]) -> list[tuple[int, int]]:
    """Per axis the lowest and highest place of a patch's corner; equal where the image is smaller than the patch."""
    lows = [min(0, -((p - n) // 2)) for p, n in zip(_three(patch_size), shape)]
    return [(low, max(n - p, low)) for p, n, low in zip(_three(patch_size), shape, lows)]


def cut_patch(data: Any, seg: Any, corner: Sequence[int], patch_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A patch of a preprocessed case, ``(C, Z, Y, X)`` and ``(1, Z, Y, X)``, not augmented.

    Returns:
        Image ``(C, *P)`` fp32, 0 outside; labels ``(*P)`` int16, negative = background or outside, as in nnU-Net.
    """
    box = [[int(c), int(c) + p] for c, p in zip(corner, _three(patch_size))]
    image = torch.from_numpy(np.ascontiguousarray(crop_and_pad_nd(data, box, 0))).float()
    label = torch.from_numpy(np.ascontiguousarray(crop_and_pad_nd(seg, box, -1, cast_cropped_to=np.int16)[0]))
    return (image[:, 0], label[0]) if len(patch_size) == 2 else (image, label)


def _three(patch_size: Sequence[int]) -> tuple[int, ...]:
    """A 2d patch as one slice, as nnU-Net stores 2d data."""
    return (1, *patch_size) if len(patch_size) == 2 else tuple(patch_size)
