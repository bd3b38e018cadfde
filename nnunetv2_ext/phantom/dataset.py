"""A folder of phantom scans in nnU-Net's raw dataset format (nnU-Net, documentation/dataset_format.md)."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from nnunetv2_ext.data.find import matching
from nnunetv2_ext.phantom.image import MIN_VOXELS, check_arguments, make_phantom

_CONTRASTS = ("T1", "T2")  # the order of the channels
_SIZE_SPREAD = 0.08  # half range of the sizes of the cases, relative


def write_phantom_dataset(
    raw: Path | str,
    dataset_id: int,
    name: str = "Phantom",
    num_train: int = 20,
    num_test: int = 5,
    seed: int = 0,
    shape: Sequence[int] = (48, 64, 56),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    num_organs: int = 3,
    regions: bool = False,
    ignore: bool = False,
    channels: int = 1,
    vary_size: bool = True,
    bias_field: float = 0.3,
    noise: float = 0.03,
) -> Path:
    """Write `raw/DatasetXXX_name` with imagesTr, labelsTr, imagesTs, labelsTs (for evaluation) and dataset.json.

    Args:
        raw: Folder that `nnUNet_raw` names; made if missing.
        dataset_id: 1..999.
        name: Letters, digits, `_` and `-`.
        num_train: Cases in imagesTr, >= 1; nnU-Net's five-fold split needs 5.
        num_test: Cases in imagesTs, >= 0. They share no seed with the training cases.
        seed: Another seed gives other patients.
        shape: Mean size in voxels along X, Y, Z.
        spacing: mm along X, Y, Z.
        num_organs: Labels 1..num_organs.
        regions: Train on the overlapping regions `whole` = all organs together and `organ_2`, `organ_3`, ... instead
            of on single labels (organ_1 is what remains of `whole`); needs num_organs >= 2. Files hold single labels.
        ignore: Add the label `ignore`, num_organs + 1: rectangles in about a third of the Z slices of about half of
            the training cases (always the first). labelsTs stays complete.
        channels: 1 for T1, 2 for T1 and T2 of the same patient.
        vary_size: Sizes differ by up to 8 % per axis between cases, otherwise all have `shape`.
        bias_field, noise: As in `make_phantom`.

    Returns the dataset's folder. ValueError: an argument is out of range, or `raw` already holds a dataset of this id.
    """
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"dataset_id must be from 1 to 999, got {dataset_id}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"dataset name may hold letters, digits, '_' and '-' only, got {name!r}")
    if num_train < 1 or num_test < 0:
        raise ValueError(f"num_train must be >= 1 and num_test >= 0, got {num_train} and {num_test}")
    if regions and num_organs < 2:
        raise ValueError(f"regions=True needs num_organs >= 2, got {num_organs}")
    if not 1 <= channels <= len(_CONTRASTS):
        raise ValueError(f"channels must be 1 (T1) or 2 (T1 and T2), got {channels}")
    check_arguments(seed, shape, spacing, num_organs, _CONTRASTS[0], bias_field=bias_field, noise=noise)
    folder = Path(raw) / f"Dataset{dataset_id:03d}_{name}"
    if taken := matching(Path(raw), dataset_id):
        raise ValueError(f"{taken[0]} exists and is not overwritten: remove it or choose another dataset id")

    for sub in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / sub).mkdir(parents=True)
    for index in range(num_train + num_test):
        split = "Tr" if index < num_train else "Ts"
        case = f"{name.lower()}_{index:03d}"
        generator = np.random.default_rng([seed, index])
        patient = int(generator.integers(2**32))
        factors = 1 + _SIZE_SPREAD * generator.uniform(-1, 1, 3) if vary_size else (1, 1, 1)
        size = [max(MIN_VOXELS, round(n * f)) for n, f in zip(shape, factors)]
        for channel, contrast in enumerate(_CONTRASTS[:channels]):
            image, label = make_phantom(patient, size, spacing, num_organs, contrast, bias_field, noise)
            _save(image, spacing, folder / f"images{split}" / f"{case}_{channel:04d}.nii.gz")
        if ignore and split == "Tr" and (index == 0 or generator.random() < 0.5):
            _add_ignore(generator, label, num_organs + 1)
        _save(label, spacing, folder / f"labels{split}" / f"{case}.nii.gz")

    organs = tuple(range(1, num_organs + 1))
    overlapping = {"whole": organs, **{f"organ_{k}": (k,) for k in organs[1:]}}
    labels = {"background": 0, **(overlapping if regions else {f"organ_{k}": k for k in organs})}
    labels |= {"ignore": num_organs + 1} if ignore else {}
    generate_dataset_json(
        str(folder),
        channel_names=dict(enumerate(_CONTRASTS[:channels])),
        labels=labels,
        num_training_cases=num_train,
        file_ending=".nii.gz",
        # later regions overwrite earlier ones: what only `whole` claims becomes 1
        regions_class_order=organs if regions else None,
        dataset_name=folder.name,
        description="Synthetic scans made by nnunetv2_ext.phantom",
        license="CC0-1.0",
        converted_by="nnunetv2-ext",
    )
    return folder


def _add_ignore(generator: np.random.Generator, label: npt.NDArray[np.uint8], value: int) -> None:
    """Set one rectangle in each of a third of the Z slices of `label` (X, Y, Z) to `value`, in place."""
    slices = generator.choice(label.shape[2], size=max(1, label.shape[2] // 3), replace=False)
    for z in slices:
        size = [int(generator.integers(n // 4, n // 2 + 1)) for n in label.shape[:2]]
        start = [int(generator.integers(n - s + 1)) for n, s in zip(label.shape[:2], size)]
        label[start[0] : start[0] + size[0], start[1] : start[1] + size[1], z] = value


def _save(array: npt.NDArray[np.float32] | npt.NDArray[np.uint8], spacing: Sequence[float], path: Path) -> None:
    """Write an (X, Y, Z) array; SimpleITK's own arrays are (Z, Y, X)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing([float(s) for s in spacing])
    sitk.WriteImage(image, str(path))
