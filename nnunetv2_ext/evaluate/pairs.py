"""Finding the files of a case, reading them and making sure that they lie on the same grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_ext.data.case import Volume, read_label_map, require_same_grid

_SHOWN = 8  # of a list of cases in a message


@dataclass(frozen=True)
class Pair:
    """The two files of a case."""

    case: str
    prediction: Path
    truth: Path


def find_pairs(
    predictions: Path, truth: Path, ending: str, chill: bool = False, cases: Sequence[str] | None = None
) -> list[Pair]:
    """Pairs of files of the same name, sorted by case.

    Args:
        predictions: folder with ``CASE{ending}``.
        truth: folder with files of the same names.
        ending: ``.nii.gz``.
        chill: cases without a prediction are left out (the meaning of nnU-Net's ``--chill``).
        cases: exactly these must have a prediction and a truth; None: the truth's.

    Raises:
        ValueError: a folder is missing or empty, or cases are missing; all of them are listed.
    """
    ours, theirs = case_files(predictions, ending, "predictions"), case_files(truth, ending, "the truth")
    wanted = list(theirs) if cases is None else list(cases)
    untrue = [case for case in (ours if cases is None else wanted) if case not in theirs]
    if untrue:
        raise ValueError(
            f"{listed(untrue)} in {predictions} {'has' if len(untrue) == 1 else 'have'} no truth in {truth}: give the "
            "folder that holds the truth of these cases, or move the others away"
        )
    missing = [case for case in wanted if case not in ours]
    if missing and not chill:
        raise ValueError(
            f"{listed(missing)} of {truth} {'is' if len(missing) == 1 else 'are'} not in {predictions}: predict "
            "all cases, or evaluate only those that are there with --chill"
        )
    return [Pair(case, ours[case], theirs[case]) for case in sorted(wanted) if case in ours]


def case_files(folder: Path, ending: str, what: str = "segmentations") -> dict[str, Path]:
    """Case name to file, sorted.

    Raises:
        ValueError: no such folder, or no file with this ending in it.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder of {what}, {folder}, does not exist")
    files = {p.name.removesuffix(ending): p for p in sorted(folder.iterdir()) if p.name.endswith(ending)}
    files = {case: p for case, p in files.items() if p.is_file() and not p.name.startswith(".")}
    if not files:
        raise ValueError(f"the folder of {what}, {folder}, has no file that ends in {ending}")
    return files


def listed(cases: Sequence[str]) -> str:
    """``case a, b and 3 more`` for a message."""
    rest = len(cases) - _SHOWN
    names = ", ".join(cases[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
    return f"{'case' if len(cases) == 1 else 'cases'} {names}"


def read(pair: Pair, from_file: Any, compare_origin: bool = True) -> tuple[Any, Any, list[float]]:
    """Prediction and truth of a case, as (X, Y, Z) in array order, and the spacing in mm along these axes.

    Args:
        pair: the files.
        from_file: one of nnU-Net's readers, see ``data.case.find_reader``.
        compare_origin: whether origin and direction have to agree; shape and spacing always have to.

    Raises:
        ValueError: unreadable, not a label map, or on different grids; names the case.
    """
    ours, our_properties = read_label_map(pair.case, pair.prediction, from_file, "prediction")
    theirs, their_properties = read_label_map(pair.case, pair.truth, from_file, "truth")
    require_same_grid(
        pair.case,
        Volume("prediction", ours.shape, our_properties),
        Volume("truth", theirs.shape, their_properties),
        "predict on the images that the truth was drawn on",
        "--ignore-origin scores them voxel by voxel, as nnU-Net does" if compare_origin else None,
    )
    return ours, theirs, [abs(float(s)) for s in their_properties["spacing"]]
