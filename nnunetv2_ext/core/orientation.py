"""How a slice of a scan lies on the page: upright, with letters where the file tells directions.

    directions = directions_of(properties, plans.transpose_forward)  # or None: not known
    view = view_across(0, directions)                                # of the array's axis 0; None: a 2-D image
    draw_slice(axes, view.cut(image, i), view.cut(label, i), classes, spacing=view.spacing(mm), letters=view.letters,
               title=f"truth ({view.caption(i)})")                   # core/figures.py

An axial slice has the patient's right on the left and the front on top, a coronal one the head on top, a sagittal one
the front on the left and the head on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_PLANES = ("sagittal", "coronal", "axial")  # across left-right, front-back, feet-head
_LETTERS = ("RL", "AP", "IS")  # towards the near and the far end of the patient's axes, which are LPS as DICOM's
_SLANTED = float(np.sin(np.pi / 8))  # a part of a direction beyond this (22.5 degrees off) is named as well
_AUGMENTED = "augmented patch"


class View(NamedTuple):
    """The slices across one axis of arrays of one geometry. Make it with `view_across`."""

    axis: int | None  # that is cut; None: the arrays are 2-D
    rows: int  # axis of the array that runs down the page
    columns: int  # axis of the array that runs to the right
    flipped: tuple[int, ...]  # axes of the array that are drawn backwards
    name: str  # axial, coronal, sagittal, oblique, or "axis 0" of arrays without directions
    letters: tuple[str, str, str, str] | None  # left, right, top, bottom of the page; None: not known

    def cut(self, volume: Array, index: int | None = None) -> Array:
        """(rows, columns) from the top left of the page: slice `index` of (X, Y, Z) in array order, or a 2-D image."""
        found = volume
        for axis in self.flipped:
            found = np.flip(found, axis)
        if self.axis is not None:
            assert index is not None
            found = np.take(found, index, axis=self.axis)
        return found.T if self.rows > self.columns else found

    def spacing(self, spacing: Sequence[float] | Array) -> tuple[float, float]:
        """Of rows and columns, from that of the array's axes in mm."""
        return float(spacing[self.rows]), float(spacing[self.columns])

    def position(self, axis: int, index: int, size: int) -> int:
        """Row or column on the page of `index` along another axis of the array, which has `size` voxels."""
        return size - 1 - index if axis in self.flipped else index

    def caption(self, index: int | None) -> str:
        """What is seen, for a title: "axial, slice 12"."""
        return self.name if index is None or self.axis is None else f"{self.name}, slice {index}"


def directions_of(properties: Mapping[str, Any], transpose: Sequence[int] = (0, 1, 2)) -> Array | None:
    """Where an array's axes point in the patient: a unit vector (left, posterior, superior) per axis, (3, 3).

    Args:
        properties: Of the file, as nnU-Net's readers return them and keep them beside a preprocessed case.
        transpose: The plans' `transpose_forward` if the array is preprocessed.

    Returns None if the file tells no directions (2-D images, TIFF) or none that make sense.
    """
    if (stuff := properties.get("sitk_stuff")) is not None:
        cosines = np.asarray(stuff["direction"], dtype=float)
        size = round(cosines.size**0.5)
        if size < 3 or size**2 != cosines.size:
            return None
        columns = cosines.reshape(size, size)[:3, :3]  # 4-D: the channels are the last
    elif (stuff := properties.get("nibabel_stuff")) is not None:
        # world of RAS
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), dtype=float)
        columns = np.diag([-1, -1, 1]) @ affine[:3, :3]
    else:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        vectors = (columns / np.linalg.norm(columns, axis=0)).T[::-1]  # arrays are (z, y, x)
    if not np.isfinite(vectors).all() or abs(np.linalg.det(vectors)) < 0.1:
        return None
    return vectors[list(transpose)]


def view_across(axis: int | None, directions: Array | None = None, augmented: bool = False) -> View:
    """The view of the slices across `axis` of arrays with these directions (`directions_of`).

    Args:
        axis: Of an array of three axes; None: the arrays are 2-D images, slices across axis 0 of what has `directions`.
        directions: None: not known. The array is then drawn as if it were a scan of usual order (feet to head, front to
            back, right to left), so that a photograph is drawn as everybody does.
        augmented: The array is a patch that nnU-Net turned and mirrored at random: its view has no letters and says so.
    """
    known = directions is not None
    vectors = np.eye(3)[::-1] if directions is None else np.asarray(directions, dtype=float)
    # the patient's axis for each of the array's, one each
    nearest = max(permutations(range(3)), key=lambda order: sum(abs(vectors[a, p]) for a, p in enumerate(order)))
    across = nearest[axis or 0]
    # left-right runs to the right, but front-back does in a sagittal slice; feet-head runs down the page, upwards
    columns, rows = (nearest.index(p) for p in ((1, 2), (0, 2), (0, 1))[across])
    to_the_right = vectors[columns] * (1 if vectors[columns, nearest[columns]] > 0 else -1)
    down = vectors[rows] * (1 if (vectors[rows, nearest[rows]] > 0) == (nearest[rows] != 2) else -1)
    flipped = [a for a, drawn in ((rows, down), (columns, to_the_right)) if not np.array_equal(drawn, vectors[a])]
    letters = None
    if known and not augmented:
        letters = (_towards(-to_the_right), _towards(to_the_right), _towards(-down), _towards(down))
    straight = abs(vectors[axis or 0, across]) > np.sqrt(1 - _SLANTED**2)
    name = _PLANES[across] if straight else f"oblique, near {_PLANES[across]}"
    if augmented:
        name = _AUGMENTED if axis is None else f"{_AUGMENTED}, axis {axis}"
    elif not known:
        name = "2-D image" if axis is None else f"axis {axis}"
    if axis is None:  # the array has lost axis 0
        rows, columns, flipped = rows - 1, columns - 1, [a - 1 for a in flipped]
    return View(axis, rows, columns, tuple(flipped), name, letters)


def _towards(vector: Array) -> str:
    """Letters of a direction, as DICOM viewers write them: the largest part first, small parts left out."""
    order = np.argsort(-np.abs(vector), kind="stable")
    return "".join(_LETTERS[p][int(vector[p] > 0)] for p in order if abs(vector[p]) > _SLANTED)
