"""Reading the files of a case with nnU-Net's readers: every error names the case, the file and the cause."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_OF_A_VOXEL = 0.01  # origins further apart than this share of a voxel differ


class Volume(NamedTuple):
    """Where the voxels of a file lie."""

    name: str  # what the file is, for messages
    shape: tuple[int, ...]  # (X, Y, Z) in array order
    properties: Mapping[str, Any]  # as nnU-Net's reader returns them


@lru_cache(maxsize=4)
def find_reader(ending: str, name: str | None, example: Path) -> Any:
    """nnU-Net's reader for dataset.json's ``file_ending`` and ``overwrite_image_reader_writer`` (None: it has none).

    `example` is an image or label, which decides between readers of one ending (2-D and 3-D .tif).

    Raises:
        ValueError: nnU-Net has none for this ending.
    """
    from nnunetv2.imageio import reader_writer_registry as registry

    dataset_json = {"file_ending": ending, **({"overwrite_image_reader_writer": name} if name else {})}
    # without the example if it is damaged or missing: whoever reads it with any reader says so, and which case it is
    for file in (str(example), None):
        try:
            # nnU-Net prints a traceback for each reader that cannot
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return registry.determine_reader_writer_from_dataset_json(dataset_json, file, verbose=False)()
        except RuntimeError as error:
            cause = error
    raise ValueError(f"nnU-Net cannot read files that end in {ending!r} ({cause})") from cause


def read_image(
    case: str, files: Sequence[str | Path], reader: Any, same_place: bool = False
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """The channels of a case (a file each), ``(C, X, Y, Z)`` in array order, and the properties of the first file.

    Args:
        same_place: also compare where the channels lie in the patient, of which nnU-Net only warns.

    Raises:
        ValueError: a file is missing or damaged, channels lie on different grids, or a value is NaN or infinite.
    """
    channels: list[npt.NDArray[Any]] = []
    volumes: list[Volume] = []
    for file in files:
        content, properties = _read(case, "image", file, reader.read_images, [str(file)])
        if not np.isfinite(content).all():
            number = int((~np.isfinite(content)).sum())
            raise ValueError(
                f"case {case}: the image {file} holds {number} values that are NaN or infinite: replace them"
            )
        channels.append(content)
        volumes.append(Volume(f"channel {Path(file).name}", content.shape[1:], properties))
        require_same_grid(case, volumes[0], volumes[-1], "resample the channels to one grid")
        if same_place:
            _require_same_place(case, volumes[0], volumes[-1])
    return np.vstack(channels).astype(np.float32, copy=False), dict(volumes[0].properties)


def read_label_map(
    case: str, file: str | Path, reader: Any, what: str = "label"
) -> tuple[npt.NDArray[np.int32], dict[str, Any]]:
    """A label map, ``(X, Y, Z)`` in array order, and the file's properties; messages call the file `what`.

    Raises:
        ValueError: it is missing or damaged, has several channels, or holds fractions.
    """
    content, properties = _read(case, what, file, reader.read_seg, str(file))
    if content.ndim != 4 or content.shape[0] != 1:
        raise ValueError(f"case {case}: the {what} {file} has shape {content.shape}; a label map has one channel")
    if not np.array_equal(content, np.round(content)):
        raise ValueError(f"case {case}: the {what} {file} holds fractions, so it is not a label map (an image?)")
    return content[0].astype(np.int32), properties


def require_same_grid(case: str, one: Volume, other: Volume, remedy: str) -> None:
    """Raise ValueError if two files of a case differ in shape or spacing; `remedy` says what to do about the shape."""
    if one.shape != other.shape:
        raise ValueError(
            f"case {case}: the {one.name} has {by(one.shape)} voxels, the {other.name} {by(other.shape)} (array "
            f"order): {remedy}"
        )
    if (found := difference("spacing", one.properties, other.properties)) is not None:
        raise ValueError(
            f"case {case}: {one.name} and {other.name} differ in spacing, {short(found[0])} and {short(found[1])}; the "
            "two do not show the same grid"
        )


def _require_same_place(case: str, one: Volume, other: Volume) -> None:
    for what in ("direction", "origin"):
        found = difference(what, one.properties, other.properties)
        # by less than half a voxel, voxels of one index still are the nearest ones
        if found and (what == "direction" or np.abs(found[0] - found[1]).max() > spacing_of(one.properties).min() / 2):
            raise ValueError(
                f"case {case}: {one.name} and {other.name} differ in {what}, {short(found[0])} and {short(found[1])}, "
                "and nnU-Net lays voxels of one index over each other: resample the second onto the grid of the first "
                "or, if only its header is wrong, copy the header of the first"
            )


def difference(
    what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Both values of ``spacing``, ``direction`` or ``origin`` if they differ; None also where a file has none."""
    smallest = spacing_of(theirs).min()
    tolerance = {"spacing": 1e-3 * smallest, "direction": 1e-3, "origin": _OF_A_VOXEL * smallest}[what]
    here, there = (spacing_of(p) if what == "spacing" else _placement(p)[what] for p in (ours, theirs))
    if here is None or there is None or (here.shape == there.shape and np.abs(here - there).max() <= tolerance):
        return None
    return here, there


def spacing_of(properties: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Voxel size in mm along the array's axes."""
    return np.abs(np.asarray(properties["spacing"], dtype=float))


def by(sizes: Sequence[float]) -> str:
    """``10 x 20 x 18``."""
    return " x ".join(f"{size:g}" for size in sizes)


def short(values: npt.NDArray[np.float64]) -> str:
    """``(1, 0.5, 2)``."""
    return "(" + ", ".join(f"{v:.6g}" for v in values.ravel()) + ")"


def _read(case: str, what: str, file: str | Path, read: Any, argument: Any) -> tuple[npt.NDArray[Any], dict[str, Any]]:
    if not Path(file).is_file():
        raise ValueError(f"case {case}: the {what} {file} is missing")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net's warning of an assumed spacing
            return read(argument)
    except Exception as error:  # every reader has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(f"case {case}: the {what} {file} cannot be read ({reason})") from error


def _placement(properties: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float64] | None]:
    """``direction`` and ``origin``; None where the file has none."""
    if (stuff := properties.get("sitk_stuff")) is not None:
        return {what: np.asarray(stuff[what], dtype=float) for what in ("direction", "origin")}
    if (stuff := properties.get("nibabel_stuff")) is None:
        return {"direction": None, "origin": None}
    affine = np.asarray(stuff["original_affine"], dtype=float)
    return {"direction": affine[:3, :3].ravel() / np.abs(affine[:3, :3]).max(), "origin": affine[:3, 3]}
