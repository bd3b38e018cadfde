"""From a plane of a volume and a mask on it to what the image encoder sees: a square picture and a square mask."""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from nnunetv2_ext.rada.annotation.planes import Array

Region = Literal["alpha", "crop", "pool"]

PERCENTILES = (0.5, 99.5)
MARGIN = 0.25  # of the longer side of the box around a mask, on each side of it
MIN_BOX = 32  # pixels of the finer spacing: a box around a few pixels would show nothing but interpolation
_SAMPLE = 2_000_000  # voxels the percentiles are taken from; all of them cost seconds per large volume


class Box(NamedTuple):
    """Rows `top` to `top + height` and columns `left` to `left + width`; it may reach outside of the slice."""

    top: int
    left: int
    height: int
    width: int


def intensity_window(volume: Array) -> tuple[float, float]:
    """0.5 and 99.5 percentiles of `volume`, of every n-th voxel where it has more than two million.

    Raises:
        ValueError: not a finite number among them.
    """
    step = max(1, round((volume.size / _SAMPLE) ** (1 / volume.ndim)))
    sample = np.asarray(volume)[(slice(None, None, step),) * volume.ndim]
    low, high = (float(value) for value in np.percentile(sample, PERCENTILES))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the image has voxels that are not finite")
    return low, high


def rescale(values: Array, window: tuple[float, float]) -> npt.NDArray[np.float32]:
    """`values` in 0..1 over `window`, clipped; 0 everywhere if the window has no width."""
    low, high = window
    if high <= low:
        return np.zeros(values.shape, dtype=np.float32)
    return np.clip((np.asarray(values, dtype=np.float32) - low) / (high - low), 0, 1)


def letterbox(picture: Array, spacing: tuple[float, float], size: int) -> Tensor:
    """`(H, W)` to `(size, size)`: equal scale in mm along both sides, centred, the rest zero.

    Bicubic with antialiasing, as CLIP's own preparation, clipped to 0..1. The longer side in mm fills the square.
    """
    height, width = picture.shape
    extent = (height * spacing[0], width * spacing[1])
    scale = size / max(extent)
    target = [min(size, max(1, round(length * scale))) for length in extent]
    values = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32))[None, None]
    small = F.interpolate(values, size=target, mode="bicubic", antialias=True, align_corners=False)[0, 0].clamp(0, 1)
    square = torch.zeros(size, size)
    top, left = ((size - length) // 2 for length in target)
    square[top : top + target[0], left : left + target[1]] = small
    return square


def cut(picture: Array, box: Box) -> Array:
    """The part of `picture` in `box`, zero where the box reaches outside."""
    starts, lengths = (box.top, box.left), (box.height, box.width)
    pads = [(max(-a, 0), max(a + n - size, 0)) for a, n, size in zip(starts, lengths, picture.shape)]
    parts = (slice(a + before, a + before + n) for a, n, (before, _) in zip(starts, lengths, pads))
    return np.pad(picture, pads)[tuple(parts)]


def box_around(mask: Array, spacing: tuple[float, float]) -> Box:
    """Box around `mask`, square in mm, with ``MARGIN`` on each side and at least ``MIN_BOX`` fine pixels wide.

    Raises:
        ValueError: the mask is empty.
    """
    if not mask.any():
        raise ValueError("there is no box around an empty mask")
    spans = [np.flatnonzero(mask.any(axis=other))[[0, -1]] for other in (1, 0)]
    longest = max((last - first + 1) * step for (first, last), step in zip(spans, spacing))
    side = max((1 + 2 * MARGIN) * longest, MIN_BOX * min(spacing))
    lengths = [max(1, round(side / step)) for step in spacing]
    top, left = (round((first + last + 1 - length) / 2) for (first, last), length in zip(spans, lengths))
    return Box(top, left, lengths[0], lengths[1])


def empty_box(background: Array, spacing: tuple[float, float]) -> Box:
    """The largest box, square in mm, that holds nothing but `background`.

    Raises:
        ValueError: there is no background.
    """
    if not background.any():
        raise ValueError("the slice has no background")
    finest = min(spacing)
    repeats = [max(1, round(step / finest)) for step in spacing]
    fine = np.repeat(np.repeat(background, repeats[0], axis=0), repeats[1], axis=1)
    distance = distance_transform_cdt(np.pad(fine, 1), metric="chessboard")[1:-1, 1:-1]
    centre, reach = np.unravel_index(int(distance.argmax()), distance.shape), int(distance.max()) - 1
    spans = []
    for middle, repeat in zip(centre, repeats):
        # whole pixels only; the one in the middle holds background alone even if the square is smaller than a pixel
        first, last = -((reach - middle) // repeat), (middle + reach + 1) // repeat
        spans.append((int(first), int(last)) if last > first else (int(middle // repeat), int(middle // repeat) + 1))
    return Box(spans[0][0], spans[1][0], spans[0][1] - spans[0][0], spans[1][1] - spans[1][0])


def encoder_input(
    picture: Array, mask: Array, spacing: tuple[float, float], size: int, region: Region, background: bool = False
) -> tuple[Tensor, Tensor]:
    """What the image encoder sees of one class on one slice.

    Args:
        picture: `(H, W)` whole slice, 0..1.
        mask: `(H, W)` of the class, with at least one pixel.
        spacing: mm of rows and columns.
        size: S.
        region: ``alpha`` and ``pool``: whole slice with the mask; ``crop``: box around the mask, mask all ones.
        background: `mask` is the background; ``crop`` then takes the largest square without anything else.

    Returns:
        image `(3, S, S)` fp32 in 0..1, three equal channels, and mask `(1, S, S)` fp32 in 0..1.
    """
    alpha = torch.ones(1, size, size)
    if region == "crop":
        picture = cut(picture, (empty_box if background else box_around)(mask, spacing))
    else:
        alpha = letterbox(mask, spacing, size)[None]
    return letterbox(picture, spacing, size).expand(3, size, size), alpha
