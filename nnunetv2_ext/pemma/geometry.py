"""Whether a dataset's images lie in the array as those did that the base was trained on.

nnU-Net's readers take the array as the file has it, whatever the file says of directions. A base that has seen axial
slices along the first axis is not at home where that axis runs from left to right.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from batchgenerators.utilities.file_and_folder_operations import load_pickle

from nnunetv2_ext.core.orientation import directions_of
from nnunetv2_ext.data.case import short, spacing_of
from nnunetv2_ext.data.find import PREPROCESSED, dataset_if_there
from nnunetv2_ext.pemma.base import Base

_TOWARDS = ("RL", "AP", "IS")  # the patient's axes, which are LPS as DICOM's
_CLEARLY_THICKER = 2.0  # of slices, against their pixels: below, the order of axes cannot be told by the spacing


class Lie(NamedTuple):
    """How an array lies in the patient.

    Attributes:
        spacing: mm along the array's axes.
        towards: a letter per axis of the array, where it runs to (``SPL``); None: the file does not say.
    """

    spacing: npt.NDArray[np.float64]
    towards: str | None

    @property
    def order(self) -> str | None:
        """The patient's axes in the array's order, whichever way they run."""
        pairs = {letter: pair for pair in _TOWARDS for letter in pair}
        return None if self.towards is None else " ".join(pairs[letter] for letter in self.towards)

    @property
    def thick(self) -> int | None:
        """The axis across the slices; None: no axis is clearly coarser than both others."""
        axis = int(np.argmax(self.spacing))
        return axis if self.spacing[axis] >= _CLEARLY_THICKER * np.delete(self.spacing, axis).max() else None


def lie_of(properties: Mapping[str, Any]) -> Lie:
    """Of a file's properties, as nnU-Net's readers return them."""
    directions, towards = directions_of(properties), None
    if directions is not None:
        axes = np.abs(directions).argmax(1)
        if len(set(axes)) == len(axes):  # else oblique by half a right angle
            towards = "".join(_TOWARDS[p][int(directions[a, p] > 0)] for a, p in enumerate(axes))
    return Lie(spacing_of(properties), towards)


def lies_of_base(base: Base) -> list[Lie]:
    """Of its training images where they are preprocessed on this machine; else of their median, without directions."""
    folder = dataset_if_there(str(base.plans.get("dataset_name", "")), PREPROCESSED)
    found = []
    for case in (folder / str(base.configuration["data_identifier"])).glob("*.pkl") if folder else ():
        with suppress(Exception):  # a damaged file tells nothing; whoever trains on it says so
            found.append(lie_of(load_pickle(str(case))))
    if found:
        return found
    median, back = base.plans.get("original_median_spacing_after_transp"), base.plans.get("transpose_backward")
    return [Lie(np.asarray(median, dtype=float)[list(back)], None)] if median and back else []


def compare(ours: Mapping[str, tuple[str, Lie]], theirs: list[Lie]) -> list[str]:
    """Warnings about cases that lie in another way than any of the base's.

    Args:
        ours: by case: its first file, and how that lies.
        theirs: of `lies_of_base`; what they do not tell is not compared.

    Raises:
        ValueError: all cases have their axes in another order; names one, and its file.
    """
    orders, towards = ({getattr(lie, what) for lie in theirs} for what in ("order", "towards"))
    thick = {lie.thick for lie in theirs}
    other: dict[str, str] = {}
    turned: dict[str, str] = {}
    for case, (file, lie) in ours.items():
        if lie.order and orders and None not in orders:
            if lie.order not in orders:
                other[case] = f"{file}, whose axes run {_spread(lie.order)}; there {_listed(orders)}"
            elif lie.towards not in towards:
                turned[case] = f"{file}, whose axes run to {lie.towards}; there to {_listed(towards)}"
        elif lie.thick is not None and thick and None not in thick and lie.thick not in thick:
            there = short(theirs[0].spacing)
            other[case] = f"{file}, with voxels of {short(lie.spacing)} mm in the array's order; there {there}"
    if other:
        case, said = next(iter(other.items()))
        if len(other) == len(ours):
            raise ValueError(
                f"the images have their axes in another order than those that the base was trained on, e.g. case "
                f"{case}: {said}. nnU-Net does not turn images: reorder the axes of images and labels first"
            )
        return [
            f"WARNING: {len(other)} cases have their axes in another order than all images that the base was trained "
            f"on, e.g. case {case}: {said}"
        ]
    if turned:
        case, said = next(iter(turned.items()))
        return [
            f"WARNING: {len(turned)} cases are mirrored against all images that the base was trained on, e.g. case "
            f"{case}: {said}"
        ]
    return []


def _spread(order: str) -> str:
    return ", ".join(f"{pair[0]}-{pair[1]}" for pair in order.split())


def _listed(values: set[str | None]) -> str:
    return " or ".join(sorted(_spread(value) if value and " " in value else str(value) for value in values))
