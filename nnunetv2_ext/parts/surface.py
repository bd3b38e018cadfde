"""Surfaces of masks, and the distances between two of them (Metrics Reloaded, doi:10.1038/s41592-023-02151-z)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

Mask = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.float64]


def drop_thin_axes(spacing: Sequence[float], *volumes: npt.NDArray[Any]) -> tuple[list[Any], list[float]]:
    """Volumes without axes of length 1, and the spacing of the axes that stay.

    In a volume of one slice (nnU-Net reads a 2-D image as such) every voxel would touch the outside; its surfaces are
    the outlines within the slice. A volume with no longer axis keeps one.
    """
    keep = [axis for axis, size in enumerate(volumes[0].shape) if size > 1] or [0]
    shape = [volumes[0].shape[axis] for axis in keep]
    return [volume.reshape(shape) for volume in volumes], [float(spacing[axis]) for axis in keep]


def bounding_box(mask: Mask, margin: int | Sequence[int] = 1) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty, widened by ``margin`` voxels and clipped to the image."""
    (box,) = find_objects(mask.astype(np.uint8))
    margins = np.broadcast_to(margin, mask.ndim).tolist()
    return tuple(slice(max(0, s.start - m), min(n, s.stop + m)) for s, m, n in zip(box, margins, mask.shape))


def surface(mask: Mask, unknown: Mask | None = None) -> Mask:
    """Voxels of ``mask``, (X, Y, ...), that touch a voxel outside it by a face.

    ``unknown`` voxels (under the ignore label) are neither inside nor outside, so that they give a mask no surface.
    """
    return mask & ~binary_erosion(mask if unknown is None else mask | unknown)


def surface_distances(
    prediction: Mask, truth: Mask, spacing: Sequence[float], unknown: Mask | None = None
) -> tuple[Distances, Distances]:
    """Distances in mm of the prediction's surface voxels to the truth's nearest, and the other way round.

    Only the box around both masks is looked at, which no nearest surface voxel lies outside of. Masks are (X, Y, ...)
    and empty where voxels are ``unknown`` (under the ignore label); ``spacing`` is in mm along each axis. Both are
    empty if one of the masks has no surface.
    """
    box = bounding_box(prediction | truth) if prediction.any() and truth.any() else ...
    hidden = None if unknown is None else unknown[box]
    ours, theirs = surface(prediction[box], hidden), surface(truth[box], hidden)
    if not ours.any() or not theirs.any():
        return np.empty(0), np.empty(0)
    to_theirs, to_ours = (distance_transform_edt(~mask, sampling=tuple(spacing)) for mask in (theirs, ours))
    return np.asarray(to_theirs)[ours], np.asarray(to_ours)[theirs]


def hd95(to_truth: Distances, to_prediction: Distances) -> float:
    """The larger of the two directed 95th percentiles, in mm; NaN without distances.

    Equals MONAI's ``compute_hausdorff_distance(percentile=95)``, https://docs.monai.io, which the tests compare it
    with; not the percentile of both directions pooled.
    """
    if not len(to_truth) or not len(to_prediction):
        return math.nan
    return float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)))
