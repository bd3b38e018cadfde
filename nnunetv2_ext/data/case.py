"""Reading the files of a case with nnU-Net's readers: every error names the case, the file and the cause."""

from __future__ import annotations

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
    """Where the voxels of a file lie.

    Attributes:
        name: what the file is, for messages (``label``).
        shape: (X, Y, Z) in array order.
        properties: as nnU-Net's reader returns them.
    """

    name: str
    shape: tuple[int, ...]
    properties: Mapping[str, Any]


@lru_cache(maxsize=4)
def find_reader(ending: str, name: str | None, example: Path) -> Any:
    """nnU-Net's reader for a dataset.

    Args:
        ending: dataset.json's ``file_ending``.
        name: dataset.json's ``overwrite_image_reader_writer``, None if it has none.
        example: an image or label, which decides between readers of one ending (2-D and 3-D .tif).

    Raises:
        ValueError: nnU-Net has none for this ending.
    """
    from nnunetv2.imageio import reader_writer_registry as registry

    dataset_json = {"file_ending": ending, **({"overwrite_image_reader_writer": name} if name else {})}
    try:
        # nnU-Net prints a traceback for each reader that cannot
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = registry.determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)
    except RuntimeError:  # damaged or missing: whoever reads it with any reader says so, and which case it is
        try:
            found = registry.determine_reader_writer_from_dataset_json(dataset_json, None, verbose=False)
        except RuntimeError as error:
            raise ValueError(f"nnU-Net cannot read files that end in {ending!r} ({error})") from error
    return found()


def read_image(case: str, files: Sequence[str | Path], reader: Any) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """The channels of a case, ``(C, X, Y, Z)`` in array order, and the properties of the first file.

    Args:
        case: its name.
        files: one per channel.
        reader: nnU-Net's.

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
    return np.vstack(channels).astype(np.float32, copy=False), dict(volumes[0].properties)


def read_label_map(
    case: str, file: str | Path, reader: Any, what: str = "label"
) -> tuple[npt.NDArray[np.int32], dict[str, Any]]:
    """A label map, ``(X, Y, Z)`` in array order, and the file's properties.

    Args:
        case: its name.
        file: the label map.
        reader: nnU-Net's.
        what: the file is, for messages.

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


def difference(
    what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Both values of ``spacing``, ``direction`` or ``origin`` if they differ; None also where a file has none."""
    smallest = spacing_of(theirs).min()
    get, tolerance = {
        "spacing": (spacing_of, 1e-3 * smallest),
        "direction": (_direction, 1e-3),
        "origin": (_origin, _OF_A_VOXEL * smallest),
    }[what]
    here, there = get(ours), get(theirs)
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
