"""The view map, which says of every voxel on which annotated planes it lies, and which of them each network learns."""

from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.rada.annotation.planes import OUTSIDE, Array, Planes, plane_bits
from nnunetv2_ext.rada.propagation.propagate import NONE

AXES = 0b0111  # bit a: on an annotated plane of array axis a; all three: annotated, but on no plane
INSIDE = 0b1000  # inside the image; padding has no bit at all
NOTHING = "nothing propagated"  # for `LazyTarget`


def view_map(label: Array, ignore: int, planes: Planes, beside: Planes | None = None) -> npt.NDArray[np.int16]:
    """Bits of the voxels of ``label``, (X, Y, Z) int16.

    Bit a = on a plane of array axis a; bits 0 to 2 together for labelled voxels on no plane; bit 3 everywhere. Labelled
    voxels in the slice beside a plane are that plane's, frayed by resampling: they have its bit, or a network that must
    not see the plane would see its edge.

    Args:
        label: (X, Y, Z).
        ignore: the ignore label.
        planes: of this part of the volume.
        beside: the slices beside planes; None: ``planes.neighbours``. A plane may lie just outside of this part.
    """
    bits = plane_bits(label.shape, planes)
    loose = (bits == 0) & (label != ignore) & (label != OUTSIDE)
    if loose.any():
        edges = plane_bits(label.shape, planes.neighbours if beside is None else beside)[loose]
        bits[loose] = np.where(edges > 0, edges, AXES)
    bits |= INSIDE
    return bits


class LazyTarget:
    """Label and view map of a preprocessed case, and its propagated planes if given, for the requested crop only.

    It stands where nnU-Net's loader expects the label, so that crop, padding and spatial augmentation treat all
    channels alike. ``crop_and_pad_nd`` (acvl_utils) needs ``shape``, ``dtype`` and ``__getitem__``.

    Channels: label, view bits; with propagated planes also three labels (one per plane axis) and three distances.

    Args:
        label: (1, X, Y, Z), an array or blosc2's.
        ignore: the ignore label.
        planes: of the whole case.
        propagated: (2, 3, X, Y, Z), labels and distances (see `propagate.read_propagated`); None: no such channels.
            NOTHING where the case has none, but others of the batch may.
    """

    dtype = np.dtype(np.int16)

    def __init__(self, label: Any, ignore: int, planes: Planes, propagated: Any = None) -> None:
        self._label, self._ignore, self._planes, self._propagated = label, ignore, planes, propagated
        self._beside = planes.neighbours
        channels = 2 if propagated is None else 8
        self.shape: tuple[int, ...] = (channels, *label.shape[1:])
        self.ndim = len(self.shape)

    def __getitem__(self, crop: tuple[slice, ...]) -> npt.NDArray[np.int16]:
        """All channels of the crop; a slice for the channels, which is not looked at, and one of step 1 per axis."""
        slices = crop[1:]
        bounds = [part.indices(length)[:2] for part, length in zip(slices, self.shape[1:], strict=True)]
        here = (0, *slices)
        label = np.asarray(self._label[here])
        target = np.empty((self.shape[0], *label.shape), dtype=np.int16)
        target[0] = label
        target[1] = view_map(label, self._ignore, *(_within(planes, bounds) for planes in (self._planes, self._beside)))
        if self._propagated is NOTHING:
            target[2:5], target[5:8] = self._ignore, NONE
        elif self._propagated is not None:
            all_of = (slice(None), slice(None), *slices)
            target[2:] = np.asarray(self._propagated[all_of]).reshape(6, *label.shape)
        return target


def _within(planes: Planes, bounds: list[tuple[int, int]]) -> Planes:
    """The slices inside a crop, counted from its corner."""
    return Planes.of(
        [index - low for index in indices if low <= index < high]
        for indices, (low, high) in zip(planes.indices, bounds, strict=True)
    )


def view_masks(axes: tuple[int, ...], num_networks: int) -> tuple[int, ...]:
    """Bits each network learns from.

    Three axes: network 1 learns from planes of axes 0 and 1, network 2 from 0 and 2, network 3 from 1 and 2. Two axes:
    both, the first, the second. One axis or none: the same for all. One network learns from everything.

    Args:
        axes: array axes on which the training cases have planes.
        num_networks: 1 or 3.
    """
    if num_networks == 1 or len(axes) < 2:
        return (AXES,) * num_networks
    if len(axes) == 2:
        first, second = (1 << axis for axis in axes)
        return first | second, first, second
    return 0b011, 0b101, 0b110


def axes_in(mask: int) -> tuple[int, ...]:
    """Axes whose bits are set."""
    return tuple(axis for axis in range(3) if mask >> axis & 1)
