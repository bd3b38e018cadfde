"""Annotated planes of a sparsely labelled volume, found in the label alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

OUTSIDE = -1  # nnU-Net's mark for zero-valued voxels whose label was background (crop_to_nonzero)
THRESHOLD = 0.95


@dataclass(frozen=True)
class Planes:
    """Annotated slices of one volume: sorted indices for each array axis."""

    indices: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((), (), ())

    @classmethod
    def of(cls, indices: Iterable[Iterable[int]]) -> Planes:
        """Of any three collections of indices."""
        first, second, third = (tuple(map(int, of_axis)) for of_axis in indices)
        return cls((first, second, third))

    @property
    def axes(self) -> tuple[int, ...]:
        """Array axes that have planes."""
        return tuple(axis for axis in range(3) if self.indices[axis])

    @property
    def count(self) -> int:
        """Number of planes on all axes."""
        return sum(map(len, self.indices))

    def __bool__(self) -> bool:
        return self.count > 0

    @property
    def neighbours(self) -> Planes:
        """The slices beside the planes that are none themselves (the last may lie behind the volume's end).

        Where a plane is several slices thick, resampling may leave a part of its outermost slice there.
        """
        return Planes.of(sorted({n for i in ii for n in (i - 1, i + 1) if n >= 0} - set(ii)) for ii in self.indices)

    def shifted(self, offset: Sequence[int]) -> Planes:
        """The same planes with `offset` added to the indices of each axis."""
        return Planes.of([i + o for i in ii] for ii, o in zip(self.indices, offset))

    def describe(self) -> str:
        """One line, e.g. ``axis0 [57]  axis1 [88]  axis2 [31,32]``; runs of three and more are shortened to 31-35."""
        return "  ".join(f"axis{axis} [{_short(self.indices[axis])}]" for axis in range(3))


def consecutive_runs(indices: Iterable[int]) -> list[tuple[int, int]]:
    """First and last index of each run of neighbours.

    >>> consecutive_runs([8, 3, 7, 9])
    [(3, 3), (7, 9)]
    """
    runs: list[tuple[int, int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def find_planes(label: Array, ignore: int) -> Planes:
    """Slices of (X, Y, Z) `label` with a share of at least `THRESHOLD` voxels that are not `ignore`.

    -1 counts as annotated: nnU-Net writes it only where the label was background and the image is zero. A slice without
    any truly labelled voxel is not a plane. Nor is a slice that reaches the threshold only by the planes of the other
    axes that cross it (small volumes with many thick slabs): what those leave free must reach the threshold too. A
    dense label has planes everywhere.

    Raises:
        ValueError: `label` is not 3-D.
    """
    if label.ndim != 3:
        raise ValueError(f"planes are found in 3-D labels, got shape {label.shape}: RADA needs a 3-D configuration")
    known = label != ignore
    shares = [known.mean(axis=others) for others in _OTHERS]
    labelled = [(known & (label != OUTSIDE)).any(axis=others) for others in _OTHERS]
    full = [np.flatnonzero(share == 1) for share in shares]
    found = []
    for axis in range(3):
        candidates = np.flatnonzero((shares[axis] >= THRESHOLD) & labelled[axis])
        free = ~_cross(label.shape, full, axis)
        found.append(
            [i for i in candidates.tolist() if shares[axis][i] == 1 or known.take(i, axis)[free].mean() >= THRESHOLD]
        )
    return Planes.of(found)


def known_slices(label: Array, ignore: int) -> Planes:
    """Slices of (X, Y, Z) `label` with hardly any ignored voxel, whatever the others are."""
    shares = [(label != ignore).mean(axis=others) for others in _OTHERS]
    return Planes.of(np.flatnonzero(share >= THRESHOLD) for share in shares)


def plane_bits(shape: tuple[int, ...], planes: Planes) -> npt.NDArray[np.int16]:
    """(X, Y, Z): bit a on the slices of axis a that lie in an array of this shape."""
    bits = np.zeros(shape, dtype=np.int16)
    for axis in range(3):
        inside = [index for index in planes.indices[axis] if index < shape[axis]]
        bits[(slice(None),) * axis + (inside,)] |= 1 << axis
    return bits


def on_planes(shape: tuple[int, ...], planes: Planes) -> Mask:
    """(X, Y, Z) mask of the voxels on any plane."""
    return plane_bits(shape, planes) != 0


def scribbled(label: Array, ignore: int, planes: Planes) -> Mask:
    """(X, Y, Z) mask of the labelled voxels that lie neither on a plane nor beside one."""
    near = on_planes(label.shape, planes) | on_planes(label.shape, planes.neighbours)
    return (label != ignore) & (label != OUTSIDE) & ~near


_OTHERS = ((1, 2), (0, 2), (0, 1))


def _cross(shape: tuple[int, ...], planes: Sequence[npt.NDArray[np.int64]], axis: int) -> Mask:
    """2-D mask over a slice of `axis`: pixels that lie on the given planes of the other two axes."""
    first, second = _OTHERS[axis]
    mask = np.zeros((shape[first], shape[second]), dtype=bool)
    mask[planes[first]] = True
    mask[:, planes[second]] = True
    return mask


def _short(indices: tuple[int, ...]) -> str:
    """The indices, runs of three and more as first-last."""
    runs = consecutive_runs(indices)
    return ",".join(f"{a}-{b}" if b - a > 1 else ",".join(map(str, range(a, b + 1))) for a, b in runs)
