"""Synthetic contrast shifts of a folder of images: what does a model do when the contrast changes?

    python examples/contrast_shifts.py nnUNet_raw/Dataset004_Hippocampus/imagesTs shifted
    nnUNetv2_predict -d 4 -i shifted/inversion -o predicted/inversion -c 3d_fullres -f 0
    nnUNetv2_ext evaluate predicted/inversion nnUNet_raw/Dataset004_Hippocampus/labelsTs -d 4

Every image is shifted by itself, in its own range of intensities. Shape, size and position of all structures stay, so
the labels are neither read nor written and go on to apply. Four shifts, each into a folder of its own:

| shift | what happens |
|---|---|
| `inversion` | bright becomes dark: minimum + maximum - value |
| `gamma` | value ** g in the range scaled to 0 .. 1; g or 1 / g is drawn from 2 .. 4 |
| `bias_field` | values above the minimum times a smooth field, a random cubic polynomial from 1/3 to 3 |
| `tissue_order` | a continuous piecewise linear curve on which the quartiles of the intensities trade places |

The same seed, file name and image give the same result, whatever else is in the folder. `shifts.csv` tells what was
drawn. A model that was trained with these shifts has seen them: then they measure nothing.
A real second scanner or sequence also differs in noise, resolution and patients. Use one where there is one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

Image = npt.NDArray[np.float64]
# shifted image of the same shape, and what was drawn
Shift = Callable[[Image, np.random.Generator], tuple[Image, str]]
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".tif", ".tiff", ".png")


def inversion(image: Image, generator: np.random.Generator) -> tuple[Image, str]:
    """Minimum + maximum - value; nothing is drawn."""
    return image.min() + image.max() - image, ""


def gamma(image: Image, generator: np.random.Generator) -> tuple[Image, str]:
    """value ** g, in the range of the image scaled to 0 .. 1; g is from 2 .. 4 or its inverse, each as likely."""
    power = generator.uniform(2, 4) ** generator.choice([-1, 1])
    low, extent = image.min(), np.ptp(image)
    return low + extent * ((image - low) / (extent or 1)) ** power, f"gamma={power:.4f}"


def bias_field(image: Image, generator: np.random.Generator) -> tuple[Image, str]:
    """Values above the minimum times a field: exp of a cubic polynomial of all axes, from 1/3 to 3 within the image."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij", sparse=True)
    field = np.zeros(image.shape)
    for powers in itertools.product(range(4), repeat=image.ndim):
        if 0 < sum(powers) <= 3:
            term = np.prod(np.broadcast_arrays(*(x**p for x, p in zip(axes, powers, strict=True))), axis=0)
            field += generator.normal() * term
    field = (field - field.min()) / (np.ptp(field) or 1) * 2 - 1
    low = image.min()
    return low + (image - low) * 3.0**field, "from 1/3 to 3"


def tissue_order(image: Image, generator: np.random.Generator) -> tuple[Image, str]:
    """A continuous curve through (knot, another knot); knots: minimum, quartiles and maximum of the intensities.

    The drawn order is neither the old one nor its inversion, so that some tissues keep their order and others do not.
    """
    knots = np.quantile(image, [0, 0.25, 0.5, 0.75, 1])
    orders = [order for order in itertools.permutations(range(5)) if len({*np.sign(np.diff(order))}) > 1]
    order = orders[generator.integers(len(orders))]
    return np.interp(image, knots, knots[list(order)]), "order=" + "".join(map(str, order))


SHIFTS: dict[str, Shift] = {f.__name__: f for f in (inversion, gamma, bias_field, tissue_order)}


def shifted(image: npt.NDArray[Any], shift: str, name: str, seed: int = 0) -> tuple[npt.NDArray[Any], str]:
    """An image, of any number of axes, after a shift, and what was drawn; ``name`` is its file's.

    Of the same type: integers are rounded and clipped to their range. ValueError: a value is not finite.
    """
    values = image.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite: correct the image")
    generator = np.random.default_rng([seed, zlib.crc32(shift.encode()), zlib.crc32(name.encode())])
    result, drawn = SHIFTS[shift](values, generator)
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        result = np.clip(np.round(result), limits.min, limits.max)
    return result.astype(image.dtype), drawn


def shift_folder(images: Path, output: Path, shifts: Sequence[str] = tuple(SHIFTS), seed: int = 0) -> list[Path]:
    """Write every image of a folder after each shift; returns the folders ``output/SHIFT``.

    Grid (spacing, origin, direction), type of voxels and file names are those of the image. ValueError: no folder, no
    image in it, a colour image, or ``output/SHIFT`` or ``output/shifts.csv`` is there already; nothing is overwritten.
    """
    if not images.is_dir():
        raise ValueError(f"the folder of images, {images}, does not exist")
    files = [p for p in sorted(images.iterdir()) if p.name.endswith(ENDINGS) and not p.name.startswith(".")]
    if not files:
        raise ValueError(f"{images} has no image ({', '.join(ENDINGS)})")
    folders, table = [output / shift for shift in shifts], output / "shifts.csv"
    if there := [str(path) for path in (*folders, table) if path.exists()]:
        raise ValueError(f"{there[0]} is there already: give another output folder")
    rows = []
    for file in files:
        image = sitk.ReadImage(str(file))
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise ValueError(f"{file} is a colour image, whose contrast is not that of a scan: give images of scans")
        for shift, folder in zip(shifts, folders, strict=True):
            values, drawn = shifted(sitk.GetArrayFromImage(image), shift, file.name, seed)
            result = sitk.GetImageFromArray(values)
            result.CopyInformation(image)
            folder.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(result, str(folder / file.name))
            if (side := images / f"{file.name.partition('.')[0]}.json").is_file():  # spacing of 3-D TIFF
                (folder / side.name).write_bytes(side.read_bytes())
            rows.append([file.name, shift, seed, drawn])
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([["file", "shift", "seed", "drawn"], *rows])
    return folders


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images, imagesTs say")
    parser.add_argument("output", type=Path, help="gets a folder for each shift, and shifts.csv")
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS), help="(default: all)")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: 0)")
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, but it is {args.seed}")
    try:
        folders = shift_folder(args.images, args.output, tuple(dict.fromkeys(args.shifts)), args.seed)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: SimpleITK cannot read a file
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(map(str, folders)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
