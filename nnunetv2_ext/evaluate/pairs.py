"""Finding the files of a case, reading them and making sure that they lie on the same grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.core.files import require_writable
from nnunetv2_ext.data.case import by, difference, read_label_map, short, spacing_of

LabelMap = npt.NDArray[np.int32]
_SHOWN = 8  # of a list of cases in a message


class Pair(NamedTuple):
    """The two files of a case."""

    case: str
    prediction: Path
    truth: Path


def find_pairs(
    predictions: Path, truth: Path, ending: str, chill: bool = False, cases: Sequence[str] | None = None
) -> list[Pair]:
    """Pairs of files of the same name, sorted by case; arguments of ``folder.evaluate_folder``.

    ValueError: a folder is missing or empty, or cases are missing; all of them are listed.
    """
    ours, theirs = case_files(predictions, ending, "predictions"), case_files(truth, ending, "the truth")
    wanted = list(theirs) if cases is None else list(cases)
    if untrue := [case for case in (ours if cases is None else wanted) if case not in theirs]:
        raise ValueError(
            f"{listed(untrue)} in {predictions} {'has' if len(untrue) == 1 else 'have'} no truth in {truth}: give the "
            "folder that holds the truth of these cases, or move the others away"
        )
    if (missing := [case for case in wanted if case not in ours]) and not chill:
        raise ValueError(
            f"{listed(missing)} of {truth} {'is' if len(missing) == 1 else 'are'} not in {predictions}: predict "
            "all cases, or evaluate only those that are there with --chill"
        )
    return [Pair(case, ours[case], theirs[case]) for case in sorted(wanted) if case in ours]


# files that nnU-Net leaves beside predictions, and nobody beside a truth
_PREDICTION_FILES = ("predict_from_raw_data_args.json", "plans.json", "summary.json")


def require_roles(predictions: Path, truth: Path) -> None:
    """Raise ValueError if the folders are the same, or look swapped; says which files tell."""
    if predictions.resolve() == truth.resolve():
        raise ValueError(f"predictions and truth are the same folder, {predictions}: give the folder of the truth")
    found = [name for name in _PREDICTION_FILES if (truth / name).is_file()]
    if found and not any((predictions / name).is_file() for name in _PREDICTION_FILES):
        raise ValueError(
            f"the folders look swapped: the folder of the truth, {truth}, holds {' and '.join(found)}, which nnU-Net "
            f"writes beside predictions. The predictions come first; if {truth} is the truth, move these files away"
        )


def require_output(folder: Path, inputs: Sequence[Path]) -> Path:
    """The output folder. ValueError: it cannot be written, or is an input, where its pictures would pass for cases."""
    if folder.resolve() in [given.resolve() for given in inputs]:
        raise ValueError(f"the output folder {folder} holds the input: choose another with -o")
    return require_writable(folder)


def case_files(folder: Path, ending: str, what: str) -> dict[str, Path]:
    """Case name to file, sorted; ValueError: no such folder ("of ``what``"), or no file with this ending in it."""
    if not folder.is_dir():
        raise ValueError(f"the folder of {what}, {folder}, does not exist")
    there = [p for p in sorted(folder.glob(f"*{ending}")) if p.is_file() and not p.name.startswith(".")]
    if not there:
        raise ValueError(f"the folder of {what}, {folder}, has no file that ends in {ending}")
    return {p.name.removesuffix(ending): p for p in there}


def file_ending(folder: Path) -> str:
    """The ending that most files of a folder have, of those that nnU-Net reads; ValueError: none has."""
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    known = sorted({e for reader in LIST_OF_IO_CLASSES for e in reader.supported_file_endings}, key=len, reverse=True)
    counts = {ending: sum(p.is_file() for p in folder.glob(f"*{ending}")) for ending in known}
    best = max(counts, key=lambda ending: counts[ending])
    if not counts[best]:
        raise ValueError(f"{folder} has no file that nnU-Net reads ({', '.join(known)})")
    return best


def listed(cases: Sequence[str]) -> str:
    """``case a, b and 3 more`` for a message."""
    rest = len(cases) - _SHOWN
    names = ", ".join(cases[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
    return f"{'case' if len(cases) == 1 else 'cases'} {names}"


def read(pair: Pair, from_file: Any, ignore_origin: bool = False) -> tuple[LabelMap, LabelMap, dict[str, Any]]:
    """Prediction and truth of a case, (X, Y, Z) in array order, (X, Y) of 2-D files, by one of nnU-Net's readers.

    With them ``spacing`` (mm along these axes, ones where no file tells it) and ``spacing_known`` (whether a file
    does). ``remark`` says what was wrong and was let pass. Shape and known spacings always have to agree.

    nnU-Net's readers of TIFF and of pictures assume a spacing where the file has none. An assumed spacing is not
    compared, and the other file's is taken if that one tells it: nnU-Net writes CASE.json beside a 3-D TIFF prediction,
    but copies none to gt_segmentations. ValueError: unreadable, not a label map, or on different grids; names the case.
    """
    ours, our_header = read_label_map(pair.case, pair.prediction, from_file, "prediction")
    theirs, their_header = read_label_map(pair.case, pair.truth, from_file, "truth")
    if ours.shape != theirs.shape:
        raise ValueError(
            f"case {pair.case}: the prediction has {by(ours.shape)} voxels, the truth {by(theirs.shape)} (array "
            "order); predict on the images that the truth was drawn on"
        )
    assumes = type(from_file).__name__
    known = [assumes != "NaturalImage2DIO" and (assumes != "Tiff3DIO" or path.with_suffix(".json").is_file())
             for path in (pair.prediction, pair.truth)]  # fmt: skip
    remarks = [] if all(known) or not any(known) else [f"spacing of the {'prediction' if known[0] else 'truth'} only"]
    differ = []
    for what in ("spacing", "direction", "origin") if all(known) else ("direction", "origin"):
        found = difference(what, our_header, their_header)
        if found and (what == "spacing" or not ignore_origin):
            told = "{} and {}".format(*map(short, found))
            raise ValueError(f"case {pair.case}: prediction and truth differ in {what}, {told}; {_REMEDIES[what]}")
        differ += [what] if found else []
    if ignore_origin:
        remarks.append("direction and origin not compared" + (f", differing: {', '.join(differ)}" if differ else ""))
    spacing = [float(s) for s in spacing_of(our_header if known == [True, False] else their_header)]
    if not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"case {pair.case}: the voxels measure {by(spacing)} mm; correct the spacing in the file")
    # readers of 2-D files put an axis in front, 999 times as thick as the largest pixel
    if theirs.shape[0] == 1 and np.isclose(spacing[0], 999 * max(spacing[1:])):
        ours, theirs, spacing = ours[0], theirs[0], spacing[1:]
    return ours, theirs, {"spacing": tuple(spacing), "spacing_known": any(known), "remark": "; ".join(remarks)}


_REMEDIES = {
    "spacing": "the two do not show the same grid",
    "direction": "one of them is turned or mirrored against the other. Bring both to one orientation (DICOMOrient of "
    "SimpleITK) or one grid; voxel by voxel a perfect prediction would score low",
    "origin": "--ignore-origin scores them voxel by voxel, as nnU-Net does. Use the option only if the header is wrong "
    "and the voxels are right",
}
