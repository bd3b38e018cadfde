"""Labels that nnU-Net's mirroring makes look alike: left and right by name, or one the mirror image of the other."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SIDES = (("left", "right"), ("l", "r"), ("lh", "rh"), ("lt", "rt"), ("anterior", "posterior"), ("front", "back"),
          ("superior", "inferior"), ("upper", "lower"), ("medial", "lateral"), ("dorsal", "ventral"))  # fmt: skip
_EDGE = 48  # samples along an axis are enough to compare shapes
# Dice of one label's mirror image with the other: above what labels reach that are no such pair. Of nine label maps
# each: ventricles of the heart 0.18 to 0.50, anterior and posterior hippocampus (a pair by their names) up to 0.13,
# cord up to 0.25, fundus up to 0.15
_ALIKE = 0.6


class MirrorPair(NamedTuple):
    """Two labels that are told apart by their side."""

    first: str
    second: str
    axis: int | None = None  # of the array as nnU-Net reads it; None: known from the names only
    dice: float | None = None  # of the mirror image of one with the other, median of label maps

    def __str__(self) -> str:
        if self.dice is None:
            return f"{self.first} and {self.second} are two sides by their names"
        return f"{self.first} and {self.second} mirror into each other (axis {self.axis}, Dice {self.dice:.2f})"


def pairs_by_name(names: Sequence[str]) -> list[MirrorPair]:
    """Names that differ in a side only.

    >>> pairs_by_name(["kidney_left", "liver", "kidney_right"])
    [MirrorPair(first='kidney_left', second='kidney_right', axis=None, dice=None)]
    """
    words = {name: re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) for name in names}
    return [
        MirrorPair(one, other)
        for one, other in combinations(names, 2)
        if len(differ := [{a, b} for a, b in zip(words[one], words[other]) if a != b]) == 1
        and len(words[one]) == len(words[other])
        and differ[0] in map(set, _SIDES)
    ]


def thumbnail(label: Array) -> Array:
    """Every so many voxels of a label map, at most 48 along an axis."""
    chosen = [np.unique(np.linspace(0, size - 1, min(size, _EDGE)).round().astype(int)) for size in label.shape]
    return label[np.ix_(*chosen)]


def pairs_by_shape(thumbnails: Sequence[Array], values: Mapping[str, int]) -> list[MirrorPair]:
    """Labels of which one is the mirror image of the other along an axis, in their common bounding box.

    Args:
        thumbnails: label maps, (X, Y, Z) or with an axis of one slice.
        values: name to label value, background and ignore label left out.
    """
    found = []
    for one, other in combinations(values, 2):
        scores = [_mirrored(label == values[one], label == values[other]) for label in thumbnails]
        known = np.array([score for score in scores if score is not None])
        if len(known):
            median = np.median(known, axis=0)  # of each axis
            axis = int(np.argmax(median))
            if median[axis] >= _ALIKE:
                found.append(MirrorPair(one, other, axis, round(float(median[axis]), 2)))
    return found


def _mirrored(first: Array, second: Array) -> list[float] | None:
    """Dice of the first mask's mirror image with the second, for each axis; None if one is empty.

    Both masks are cut to their common bounding box, whose middle is the mirror.
    """
    a, b = int(first.sum()), int(second.sum())
    if not (a and b):
        return None
    if 2 * min(a, b) < _ALIKE * (a + b):  # no Dice of theirs is higher: saves the time of most pairs of many labels
        return [0.0] * first.ndim
    both = first | second
    box = []
    for axis in range(both.ndim):
        inside = np.flatnonzero(both.any(axis=tuple(a for a in range(both.ndim) if a != axis)))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    first, second = first[tuple(box)], second[tuple(box)]
    return [2 * float((np.flip(first, axis) & second).sum()) / (a + b) for axis in range(first.ndim)]
