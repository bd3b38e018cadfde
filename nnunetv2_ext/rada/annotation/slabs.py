"""Making annotated planes thick enough to survive nnU-Net's resampling of labels.

nnU-Net samples output voxel k of an axis at (k + ½)·f − ½, f = old size / new size, linearly between slices. A plane of
one slice with unknown neighbours wins there only if a sample falls close to it; a slab wins for certain if a sample
falls between the centres of its first and its last slice. Labels are repeated along the normal; hidden ones never used.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
from skimage.transform import resize

from nnunetv2_ext.rada.annotation.planes import THRESHOLD, Array, Planes, consecutive_runs

_EPSILON = 1e-6
_MARGIN = 0.01  # of the share, for rounding


class Slab(NamedTuple):
    """A run of annotated slices first..last of an axis, and the start..stop - 1 it is thickened to."""

    axis: int
    first: int
    last: int
    start: int
    stop: int


def thicken(label: Array, ignore: int, planes: Planes, new_shape: Sequence[int]) -> tuple[Array, list[Slab]]:
    """Repeat each plane of (X, Y, Z) `label` along its normal until it survives resampling to `new_shape`.

    Only ignored voxels are written; where slabs cross, the nearer plane wins.

    Args:
        label: As nnU-Net resamples it, i.e. after its non-zero crop.
        ignore: The ignore label.
        planes: The planes of `label`.
        new_shape: (X', Y', Z') after resampling.

    Returns:
        A new label, and one slab per run of neighbouring planes, thickened or not.
    """
    runs = [(axis, *run) for axis in range(3) for run in consecutive_runs(planes.indices[axis])]
    slabs = [_slab(label, *run, new_shape) for run in runs]
    copies = []  # (distance, axis, from, to)
    for slab in slabs:
        copies += [(slab.first - i, slab.axis, slab.first, i) for i in range(slab.start, slab.first)]
        copies += [(i - slab.last, slab.axis, slab.last, i) for i in range(slab.last + 1, slab.stop)]
    result = label.copy()
    for _, axis, source, target in sorted(copies):
        views = np.moveaxis(result, axis, 0), np.moveaxis(label, axis, 0)  # writing into the view writes `result`
        free = views[0][target] == ignore
        views[0][target][free] = views[1][source][free]
    return result, slabs


def slab_for(first: int, last: int, old: int, new: int) -> tuple[int, int]:
    """Smallest start, stop around slices first..last of `old` such that one of `new` samples lies inside for certain.

    At least ceil(old / new) slices; of equally thick slabs the one centred best.
    """
    samples = sample_positions(old, new)
    for thickness in range(max(last - first + 1, ceil(old / new)), old + 1):
        starts = range(max(0, last - thickness + 1), min(first, old - thickness) + 1)
        fitting = [s for s in starts if ((samples >= s - _EPSILON) & (samples <= s + thickness - 1 + _EPSILON)).any()]
        if fitting:
            start = min(fitting, key=lambda s: (abs(2 * s + thickness - 1 - first - last), s))
            return start, start + thickness
    return 0, old


def sample_positions(old: int, new: int) -> np.ndarray:
    """Where along an axis of `old` slices the `new` output slices are sampled, in slices."""
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _slab(label: Array, axis: int, first: int, last: int, new_shape: Sequence[int]) -> Slab:
    old, new = label.shape[axis], int(new_shape[axis])
    lone = first == last and new > old
    if new == old or (lone and _survives_alone(label, axis, first, new_shape)):
        return Slab(axis, first, last, first, last + 1)
    return Slab(axis, first, last, *slab_for(first, last, old, new))


def _survives_alone(label: Array, axis: int, index: int, new_shape: Sequence[int]) -> bool:
    """Whether one slice stays a plane when its axis is refined: at its class borders the ignored neighbours may win.

    The nearest sample is a mixture of the slice (weight w) and a neighbour; nnU-Net takes the label with most weight.
    """
    distance = np.abs(sample_positions(label.shape[axis], int(new_shape[axis])) - index).min()
    plane = np.take(label, index, axis)
    size = [int(n) for a, n in enumerate(new_shape) if a != axis]
    best = np.zeros(size)
    for value in np.unique(plane):
        share = resize((plane == value).astype(float), size, order=1, mode="edge", anti_aliasing=False)
        np.maximum(best, share, out=best)
    return bool(((1 - distance) * best > distance).mean() >= THRESHOLD + _MARGIN)
