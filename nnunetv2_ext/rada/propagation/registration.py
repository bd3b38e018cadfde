"""One slice's labels carried over to its neighbour by deformable registration (SimpleITK)."""

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import binary_closing, binary_opening

from nnunetv2_ext.rada.annotation.planes import Array

ITERATIONS = 30
SMOOTHING = 1.5  # standard deviation of the Gaussian on the displacement field, pixels
HISTOGRAM_LEVELS, MATCH_POINTS = 256, 15
KERNEL = np.ones((5, 5), dtype=bool)
MIN_PIXELS = 50  # of a class: 5x5 opening would erase smaller ones
MAX_CHANGE = 0.1  # of a class's pixels: what changes more loses its shape, slice by slice
_SMALLEST = 4  # pixels per side that ITK's recursive filters need


def correlation(first: Array, second: Array) -> float:
    """Pearson's r of two slices; 1 for equal ones, 0 if one of two different ones is constant."""
    if np.array_equal(first, second):
        return 1.0
    a, b = (np.asarray(x, dtype=np.float64) - np.mean(x, dtype=np.float64) for x in (first, second))
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def carry_over(labels: Array, source: Array, target: Array, threads: int = 1) -> Array:
    """Labels of `source` on `target`.

    Histogram matching, symmetric demons, nearest-neighbour warp. Equal, constant and very narrow slices return `labels`
    unchanged.

    Args:
        labels: `(H, W)` integers on `source`.
        source, target: `(H, W)` neighbouring slices.
        threads: for ITK.

    Returns:
        `(H, W)`, type of `labels`. Pixels that come from outside of the slice take the nearest one's label.
    """
    if min(labels.shape) < _SMALLEST or np.array_equal(source, target) or np.ptp(source) == 0 or np.ptp(target) == 0:
        return labels.copy()  # nothing to register
    fixed, moving = (sitk.GetImageFromArray(np.ascontiguousarray(x, dtype=np.float32)) for x in (target, source))
    matcher = sitk.HistogramMatchingImageFilter()
    matcher.SetNumberOfHistogramLevels(HISTOGRAM_LEVELS)
    matcher.SetNumberOfMatchPoints(MATCH_POINTS)
    matcher.ThresholdAtMeanIntensityOn()
    matcher.SetNumberOfThreads(threads)
    demons = sitk.SymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfIterations(ITERATIONS)
    demons.SetStandardDeviations(SMOOTHING)
    demons.SetNumberOfThreads(threads)
    field = sitk.GetArrayFromImage(demons.Execute(fixed, matcher.Execute(moving, fixed)))  # (H, W, 2), columns first
    height, width = labels.shape
    rows, columns = np.indices(labels.shape)
    rows = np.clip(np.rint(rows + field[..., 1]), 0, height - 1).astype(np.intp)
    columns = np.clip(np.rint(columns + field[..., 0]), 0, width - 1).astype(np.intp)
    return labels[rows, columns]


def clean(labels: Array, ignore: int) -> Array:
    """5x5 opening and closing of each class that bears it; the others, background and `ignore` stay.

    A class bears it with at least 50 pixels of which it changes at most 10 %. Without that second condition it eats
    structures 10 pixels wide: Dice of the plane carried 1 / 4 slices on, 4 hippocampi, 0.86 / 0.55 against 0.92 / 0.80
    without any cleaning.

    A pixel that an operation adds goes to the class only if it was background; one that it removes becomes background.
    """
    out = np.where(labels == ignore, ignore, 0).astype(labels.dtype)
    cleaned = {}
    for label in np.unique(labels[(labels > 0) & (labels != ignore)]):
        mask = labels == label
        smooth = _open_close(mask)
        bears = mask.sum() >= MIN_PIXELS and (smooth != mask).sum() <= MAX_CHANGE * mask.sum()
        cleaned[label] = smooth if bears else mask
        out[cleaned[label] & mask] = label
    for label, mask in cleaned.items():
        out[mask & (labels == 0) & (out == 0)] = label
    return out


def _open_close(mask: Array) -> Array:
    pad = KERNEL.shape[0]  # filled with the mask's own border: the image's edge must not erode what touches it
    padded = np.pad(mask, pad, mode="edge")
    return binary_closing(binary_opening(padded, KERNEL), KERNEL)[pad:-pad, pad:-pad]
