"""A dataset with a made-up further channel: does a method that adds channels do what is claimed of it?

    python examples/second_channel.py 4 -o 204 --kind pet --missing 0.2
    nnUNetv2_ext add-channel prepare -d 204 -base MODEL_FOLDER

Images and labels of the labelled cases are linked, and nothing of the source is changed. The channel is drawn for each
case from the seed and its name:

| kind | what the channel shows | what a method should make of it |
|---|---|---|
| `pet` | uptake by structure, blurred, with noise | a gain: it tells structures apart that look alike in the image |
| `pet-b` | as `pet` of another site: order of the uptakes reversed, wider blur, more noise | a second site |
| `noise` | nothing: white noise | no gain |
| `copy` | the last channel that was there | nearly no gain |

`pet`, with K structures: structure k has an uptake of (k + 1) / (K + 1) in half of the cases and as much as the
background, 1 / (K + 1), in the others, drawn for each structure: no uptake says where a structure is not. Uptakes vary
by 10 % from case to case. The map is blurred by a Gaussian of 3 mm (`pet-b`: 4 mm) in physical space, and gets noise
with a deviation of 0.10 (0.15), blurred by a voxel. Values are at least 0.01, so that no channel looks missing.

It is made from the labels, so it is easier to read than a real second scan. Claim the controls from it, not a gain.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.data.derive import final_folder, link_images, link_label, new_dataset, write_json
from nnunetv2_ext.data.raw import open_raw

Array = npt.NDArray[Any]
KINDS = ("pet", "pet-b", "noise", "copy")
BLUR, NOISE = {"pet": 3.0, "pet-b": 4.0}, {"pet": 0.10, "pet-b": 0.15}  # mm; of an uptake of 1
LOWEST = 0.01


def uptake(label: Array, structures: int, spacing: Sequence[float], kind: str, generator: np.random.Generator) -> Array:
    """The channel `pet` or `pet-b` of a label map.

    Args:
        label: integers in any number of axes; values above ``structures`` (ignored voxels) count as background.
        structures: K, values 1..K.
        spacing: mm of each axis of ``label``.
        kind: of `BLUR`.
        generator: draws everything.

    Returns:
        float32 of the label's shape, at least `LOWEST`.
    """
    levels = np.arange(1, structures + 2) / (structures + 1)
    if kind == "pet-b":
        levels[1:] = levels[1:][::-1].copy()
    levels[1:] = np.where(generator.random(structures) < 0.5, levels[1:], levels[0])
    levels *= 1 + 0.1 * generator.uniform(-1, 1, structures + 1)
    found = levels[np.where(label > structures, 0, label)]
    found = ndimage.gaussian_filter(found, [BLUR[kind] / mm for mm in spacing], mode="nearest")
    noise = ndimage.gaussian_filter(generator.normal(size=label.shape), 1.0, mode="nearest")
    found = found + NOISE[kind] * noise / max(float(noise.std()), 1e-9)
    return np.maximum(found, LOWEST).astype(np.float32)


def write(dataset: str, target: int, kind: str, missing: float = 0.0, seed: int = 0) -> Path:
    """Write the dataset with one channel more into nnUNet_raw; returns its folder.

    Args:
        dataset: id or name; NIfTI or another format of one channel a file.
        target: a free id.
        kind: of `KINDS`.
        missing: share of the cases whose new channel is zero.
        seed: another one draws other channels.

    Raises:
        ValueError: no such dataset, an id that is taken, a share out of range, or files that cannot be read.
    """
    if not 0 <= missing < 1:
        raise ValueError(f"--missing is a share of the cases, at least 0 and below 1, not {missing}")
    raw = open_raw(dataset)
    old = list(channel_names(raw.json))
    values = [v for name, v in raw.json["labels"].items() if name not in ("background", "ignore")]
    structures = max(int(v) for value in values for v in np.atleast_1d(value))
    suffix = f"_{kind.replace('-', '')}"

    def generator(case: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(case.encode())])

    lacking = set(sorted(raw.cases, key=lambda case: generator(case).random())[: round(missing * len(raw.cases))])
    with new_dataset(raw, target, suffix) as folder:
        for case in raw.cases:
            link_images(raw, case, folder / "imagesTr")
            link_label(raw, case, folder / "labelsTr")
            label = sitk.ReadImage(str(raw.files[case]["label"]))
            image = sitk.ReadImage(str(raw.files[case]["images"][-1]))
            array = sitk.GetArrayFromImage(label).astype(np.int64)
            if case in lacking:
                channel = np.zeros(array.shape, np.float32)
            elif kind == "noise":
                channel = generator(case).normal(size=array.shape).astype(np.float32)
            elif kind == "copy":
                channel = sitk.GetArrayFromImage(image).astype(np.float32)
            else:
                channel = uptake(array, structures, label.GetSpacing()[::-1], kind, generator(case))
            made = sitk.GetImageFromArray(channel)
            made.CopyInformation(image)
            sitk.WriteImage(made, str(folder / "imagesTr" / f"{case}_{len(old):04d}{raw.ending}"))
        names = {str(number): name for number, name in enumerate([*old, kind])}
        write_json(raw, target, folder, raw.cases, {"channel_names": names, "modality": None}, suffix)
    return final_folder(raw, target, suffix)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="id or name in nnUNet_raw")
    parser.add_argument("-o", dest="target", type=int, required=True, help="free id of the new dataset")
    parser.add_argument("--kind", choices=KINDS, default="pet", help="(default: pet)")
    parser.add_argument("--missing", type=float, default=0.0, help="share of the cases without it (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: 0)")
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, but it is {args.seed}")
    try:
        folder = write(args.dataset, args.target, args.kind, args.missing, args.seed)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: SimpleITK cannot read a file
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
