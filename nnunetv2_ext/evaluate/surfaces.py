"""Surfaces of voxel masks and the distances between them.

Definition used throughout: the surface of a mask is the set of its voxels that touch, by a face, a voxel outside the
mask; beyond the edge of the image is outside. Distances are Euclidean, from voxel centre to voxel centre, in mm.
"""

from __future__ import annotations

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

    Args:
        mask: of a structure.
        unknown: voxels under the ignore label: neither inside nor outside, so that they give a mask no surface.
    """
    return mask & ~binary_erosion(mask if unknown is None else mask | unknown)


def surface_distances(
    prediction: Mask, truth: Mask, spacing: Sequence[float], unknown: Mask | None = None
) -> tuple[Distances, Distances]:
    """Distances from each surface voxel of one mask to the nearest of the other, in mm.

    Only the box around both masks is looked at, which no nearest surface voxel lies outside of.

    Args:
        prediction: (X, Y, ...).
        truth: same shape.
        spacing: voxel size in mm along each axis.
        unknown: voxels under the ignore label; both masks must be empty there.

    Returns:
        Distances of the prediction's surface voxels to the truth, and of the truth's to the prediction. Both are
        empty if one of the masks has no surface.
    """
    nothing = np.empty(0)
    if not prediction.any() or not truth.any():
        return nothing, nothing
    box = bounding_box(prediction | truth)
    hidden = None if unknown is None else unknown[box]
    ours, theirs = surface(prediction[box], hidden), surface(truth[box], hidden)
    if not ours.any() or not theirs.any():
        return nothing, nothing
    return _to_nearest(ours, theirs, spacing), _to_nearest(theirs, ours, spacing)


def _to_nearest(from_surface: Mask, to_surface: Mask, spacing: Sequence[float]) -> Distances:
    return np.asarray(distance_transform_edt(~to_surface, sampling=tuple(spacing)))[from_surface]
