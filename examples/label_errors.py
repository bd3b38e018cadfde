"""Label maps with errors as people make them: what does a training, or an audit, do with sloppy labels?

    python examples/label_errors.py nnUNet_raw/Dataset004_Hippocampus/labelsTr sloppy --level mid --share 0.25
    nnUNetv2_ext evaluate sloppy nnUNet_raw/Dataset004_Hippocampus/labelsTr -d 4

Errors hang together in space. Four kinds, drawn for each case; images are neither read nor written:

| kind | what happens |
|---|---|
| `boundary` | the contour moves out and in by a smooth random field of some voxels |
| `missing` | one structure is forgotten, whole or in the part of it that lies on one side of a plane |
| `shift` | neighbouring slices of the first axis are moved sideways (motion, or a contour copied to the next slice) |
| `swap` | two structures get each other's name on some neighbouring slices; with one structure `boundary` is drawn |

| level | contour moves by up to | part forgotten | slices shifted, by | slices swapped |
|---|---|---|---|---|
| `low` | 1.5 voxels | a quarter | a quarter, 2 voxels | a quarter |
| `mid` | 3 voxels | a half | a half, 4 voxels | a half |
| `high` | 5 voxels | the whole | all, 6 voxels | all |

The same seed, file name and label give the same errors, whatever else is in the folder. `label_errors.csv` tells which
cases were changed, how, and by how many voxels. Cases that are not drawn are copied byte for byte.
A real annotator errs in other ways too. Use two annotations of the same cases where there are any.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

Label = npt.NDArray[Any]
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".tif", ".tiff", ".png")


class Level(NamedTuple):
    """How bad the errors are."""

    contour: float  # voxels
    part: float  # of a structure, and of the slices that have one
    sideways: int  # voxels


LEVELS = {"low": Level(1.5, 0.25, 2), "mid": Level(3.0, 0.5, 4), "high": Level(5.0, 1.0, 6)}
Error = Callable[[Label, Level, np.random.Generator], Label]


def boundary(label: Label, level: Level, generator: np.random.Generator) -> Label:
    """Every voxel takes the label of a place up to ``level.contour`` voxels away, by a smooth field (sigma 4)."""
    fields = [ndimage.gaussian_filter(generator.normal(size=label.shape), 4.0) if n > 1 else None for n in label.shape]
    offsets = [0 if f is None else f / (np.abs(f).max() or 1) * level.contour for f in fields]
    places = np.meshgrid(*map(np.arange, label.shape), indexing="ij", sparse=True)
    moved = [np.broadcast_to(at + by, label.shape) for at, by in zip(places, offsets, strict=True)]
    return ndimage.map_coordinates(label, moved, order=0, mode="nearest")


def missing(label: Label, level: Level, generator: np.random.Generator) -> Label:
    """``level.part`` of one structure, beyond a plane of any direction, becomes background."""
    value = generator.choice(_structures(label))
    at = np.argwhere(label == value)
    along = at @ generator.normal(size=label.ndim)
    forgotten = at[np.argsort(along, kind="stable")[: max(1, round(level.part * len(at)))]]
    result = label.copy()
    result[tuple(forgotten.T)] = 0
    return result


def shift(label: Label, level: Level, generator: np.random.Generator) -> Label:
    """``level.part`` of the slices with a structure, all neighbours, move together; what leaves the image is lost."""
    axes = range(1, label.ndim) if label.ndim > 2 else range(label.ndim)
    result = label.copy()
    by = [0] * label.ndim
    for axis in axes:
        by[axis] = int(generator.choice([-1, 1])) * level.sideways
    part = _slices(label, level.part, generator) if label.ndim > 2 else slice(None)
    result[part] = ndimage.shift(label[part], by, order=0, mode="constant", cval=0)
    return result


def swap(label: Label, level: Level, generator: np.random.Generator) -> Label:
    """Two structures trade names on ``level.part`` of the slices with one of them; with one, `boundary`."""
    structures = _structures(label)
    if len(structures) < 2:
        return boundary(label, level, generator)
    one, other = generator.choice(structures, 2, replace=False)
    part = _slices(np.where(np.isin(label, (one, other)), label, 0), level.part, generator)
    result = label.copy()
    result[part] = np.select([label[part] == one, label[part] == other], [other, one], label[part])
    return result


ERRORS: dict[str, Error] = {f.__name__: f for f in (boundary, missing, shift, swap)}


def corrupted(label: Label, kind: str, level: str, name: str, seed: int = 0, ignore: int | None = None) -> Label:
    """A label map after one kind of error, of the same type; ``name`` is its file's. Without any structure: as it is.

    Voxels of the ``ignore`` label stay, and none are added.
    """
    content = label if ignore is None else np.where(label == ignore, 0, label)
    if not len(_structures(content)):
        return label.copy()
    generator = np.random.default_rng([seed, zlib.crc32(kind.encode()), zlib.crc32(name.encode())])
    result = ERRORS[kind](content, LEVELS[level], generator).astype(label.dtype)
    return result if ignore is None else np.where(label == ignore, label, result)


def corrupt_folder(
    labels: Path,
    output: Path,
    level: str = "mid",
    share: float = 1.0,
    kinds: Sequence[str] = tuple(ERRORS),
    seed: int = 0,
    ignore: int | None = None,
) -> list[str]:
    """Write every label of a folder, ``share`` of them with one kind of error each; returns the names of those.

    Grid, type of voxels and file names stay. ValueError: no folder, no label in it, or an output that holds something.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of cases with errors is above 0 and up to 1, not {share}")
    files = [p for p in sorted(labels.iterdir()) if p.name.endswith(ENDINGS)] if labels.is_dir() else []
    if not files:
        raise ValueError(f"{labels} is not a folder of label maps ({', '.join(ENDINGS)})")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty, and nothing is overwritten: give another output folder")
    output.mkdir(parents=True, exist_ok=True)
    # by the names, so that a case's fate does not hang on the order of the files
    drawn = sorted(files, key=lambda p: np.random.default_rng([seed, zlib.crc32(p.name.encode())]).random())
    wrong = drawn[: max(1, round(share * len(files)))]
    rows = []
    for number, file in enumerate(wrong):  # the kinds take turns
        image = sitk.ReadImage(str(file))
        label, kind = sitk.GetArrayFromImage(image), kinds[number % len(kinds)]
        changed = corrupted(label, kind, level, file.name, seed, ignore)
        result = sitk.GetImageFromArray(changed)
        result.CopyInformation(image)
        sitk.WriteImage(result, str(output / file.name))
        rows.append([file.name, kind, level, seed, int((changed != label).sum()), int((label > 0).sum())])
    for file in set(files) - set(wrong):
        shutil.copy(file, output / file.name)
    for side in labels.glob("*.json"):  # spacing of 3-D TIFF
        shutil.copy(side, output / side.name)
    header = ["file", "kind", "level", "seed", "changed_voxels", "labelled_voxels"]
    with (output / "label_errors.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([header, *sorted(rows)])
    return sorted(file.name for file in wrong)


def _structures(label: Label) -> Label:
    return np.unique(label[label > 0])


def _slices(label: Label, part: float, generator: np.random.Generator) -> slice:
    """Neighbouring slices of the first axis, ``part`` of those that have a structure."""
    there = np.flatnonzero(label.reshape(len(label), -1).any(1))
    number = max(1, round(part * len(there)))
    first = int(generator.integers(len(there) - number + 1))
    return slice(int(there[first]), int(there[first + number - 1]) + 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path, help="folder of label maps, labelsTr of a copy say")
    parser.add_argument("output", type=Path, help="new or empty folder")
    parser.add_argument("--level", choices=LEVELS, default="mid", help="(default: mid)")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases that get errors (default: 1)")
    parser.add_argument("--kinds", nargs="+", choices=ERRORS, default=list(ERRORS), help="(default: all, in turn)")
    parser.add_argument("--ignore", type=int, help="value of the ignore label, which stays")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: 0)")
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, but it is {args.seed}")
    kinds = tuple(dict.fromkeys(args.kinds))
    try:
        wrong = corrupt_folder(args.labels, args.output, args.level, args.share, kinds, args.seed, args.ignore)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: SimpleITK cannot read a file
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{len(wrong)} label maps with errors, see {args.output / 'label_errors.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
