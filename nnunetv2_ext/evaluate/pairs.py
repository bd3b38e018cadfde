"""Finding the files of a case, reading them and making sure that they lie on the same grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_SHOWN = 8  # of a list of cases in a message
_OF_A_VOXEL = 0.01  # origins further apart than this share of a voxel differ


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


@lru_cache(maxsize=4)
def reader(ending: str, name: str | None, example: Path) -> Any:
    """nnU-Net's reader for a dataset.

    Args:
        ending: of the files.
        name: dataset.json's ``overwrite_image_reader_writer``, None if it has none.
        example: a file, which decides between 2-D and 3-D readers of .tif.

    Raises:
        ValueError: nnU-Net has none for this ending.
    """
    from nnunetv2.imageio import reader_writer_registry as registry

    dataset_json = {"file_ending": ending, **({"overwrite_image_reader_writer": name} if name else {})}
    try:
        found = registry.determine_reader_writer_from_dataset_json(
            dataset_json, str(example) if ending in (".tif", ".tiff") else None, verbose=False
        )
    except RuntimeError as error:
        raise ValueError(f"nnU-Net cannot read files that end in {ending!r} ({error})") from error
    return found()


def read(pair: Pair, from_file: Any, compare_origin: bool = True) -> tuple[Any, Any, list[float]]:
    """Prediction and truth of a case, as (X, Y, Z) in array order, and the spacing in mm along these axes.

    Args:
        pair: the files.
        from_file: one of nnU-Net's readers, see ``reader``.
        compare_origin: whether origin and direction have to agree; shape and spacing always have to.

    Raises:
        ValueError: unreadable, not a label map, or on different grids; names the case.
    """
    ours, our_properties = _read(pair.case, "prediction", pair.prediction, from_file)
    theirs, their_properties = _read(pair.case, "truth", pair.truth, from_file)
    _same_grid(pair.case, (ours.shape, our_properties), (theirs.shape, their_properties), compare_origin)
    return ours, theirs, [abs(float(s)) for s in their_properties["spacing"]]


def _read(case: str, what: str, path: Path, from_file: Any) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    try:
        content, properties = from_file.read_seg(str(path))
    except Exception as error:  # every reader has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(f"case {case}: the {what} {path} cannot be read ({reason})") from error
    if content.ndim != 4 or content.shape[0] != 1:
        raise ValueError(f"case {case}: the {what} {path} has shape {content.shape}; a label map has one channel")
    if not np.array_equal(content, np.round(content)):
        raise ValueError(f"case {case}: the {what} {path} holds fractions, so it is no label map (an image?)")
    return content[0].astype(np.int32), properties


def _same_grid(case: str, ours: tuple[Any, Mapping], theirs: tuple[Any, Mapping], compare_origin: bool) -> None:
    (our_shape, our_properties), (their_shape, their_properties) = ours, theirs
    if our_shape != their_shape:
        raise ValueError(
            f"case {case}: the prediction has {_by(our_shape)} voxels, the truth {_by(their_shape)} (array order); "
            "predict on the images that the truth was drawn on"
        )
    spacing = np.abs(np.asarray(their_properties["spacing"], dtype=float))
    for name, position, tolerance in (
        ("spacing", lambda p: np.abs(np.asarray(p["spacing"], dtype=float)), 1e-3 * spacing.min()),
        ("origin", _origin, _OF_A_VOXEL * spacing.min()),
        ("direction", _direction, 1e-3),
    ):
        if name != "spacing" and not compare_origin:
            continue
        here, there = position(our_properties), position(their_properties)
        if here is None or there is None:
            continue
        if here.shape != there.shape or np.abs(here - there).max() > tolerance:
            remedy = (
                "the two do not show the same grid"
                if name == "spacing"
                else "--ignore-origin scores them voxel by voxel, as nnU-Net does"
            )
            raise ValueError(
                f"case {case}: prediction and truth differ in {name}, {_short(here)} and {_short(there)}; {remedy}"
            )


def _origin(properties: Mapping[str, Any]) -> npt.NDArray[np.float64] | None:
    if "sitk_stuff" in properties:
        return np.asarray(properties["sitk_stuff"]["origin"], dtype=float)
    affine = _affine(properties)
    return None if affine is None else affine[:3, 3]


def _direction(properties: Mapping[str, Any]) -> npt.NDArray[np.float64] | None:
    if "sitk_stuff" in properties:
        return np.asarray(properties["sitk_stuff"]["direction"], dtype=float)
    affine = _affine(properties)
    return None if affine is None else affine[:3, :3].ravel() / np.abs(affine[:3, :3]).max()


def _affine(properties: Mapping[str, Any]) -> npt.NDArray[np.float64] | None:
    stuff = properties.get("nibabel_stuff")
    return None if stuff is None else np.asarray(stuff["original_affine"], dtype=float)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _short(values: npt.NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values.ravel()) + ")"
