"""Cases in folders of images and labels, named as nnU-Net names them, and their preprocessing for a trained model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext.data.case import Volume, read_image, read_label_map, require_same_grid
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.data.raw import declared_values


def find_pairs(images: Path, labels: Path, dataset_json: Mapping[str, Any]) -> dict[str, tuple[list[Path], Path]]:
    """Case to its channels' files, in the order of the model's channels, and its label's; sorted.

    Args:
        images, labels: folders, with files named CASE_0000.nii.gz and CASE.nii.gz.
        dataset_json: of the model.

    Raises:
        ValueError: no folder, no case, an image without label or the reverse, or other channels than the model's.
    """
    ending = str(dataset_json["file_ending"])
    for folder, what in ((images, "images"), (labels, "labels")):
        if not folder.is_dir():
            raise ValueError(f"the folder of {what}, {folder}, does not exist")
    there = cases_of_images(images, ending)
    labelled = {name: labels / f"{name}{ending}" for name in _names(labels, ending)}
    if not there and not labelled:
        raise ValueError(f"{images} and {labels} hold no file that ends in {ending}, as the model's images do")
    if lonely := sorted(there.keys() - labelled.keys()):
        raise ValueError(
            f"case {lonely[0]} has an image and no label {labels / (lonely[0] + ending)}: draw it, or move the image "
            "away"
        )
    if lonely := sorted(labelled.keys() - there.keys()):
        missing = images / f"{lonely[0]}_0000{ending}"
        raise ValueError(f"case {lonely[0]} has a label and no image {missing}: add the image, or move the label away")
    return {case: (require_channels(case, there[case], dataset_json), labelled[case]) for case in sorted(there)}


def cases_of_images(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Case to its channels' files in a folder of images as nnU-Net names them; sorted.

    Its own listing forks a pool of processes, some of which never end (data/raw.py).

    Raises:
        ValueError: no folder, or a file that is not named CASE_0000.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder of images, {folder}, does not exist")
    found: dict[str, list[Path]] = {}
    for name in _names(folder, ending):
        case, _, channel = name.rpartition("_")
        file = folder / f"{name}{ending}"
        if not case or len(channel) != 4 or not channel.isdecimal():
            raise ValueError(f"{file} is not named CASE_0000{ending}: rename it as nnU-Net asks")
        found.setdefault(case, []).append(file)
    return dict(sorted(found.items()))


def require_channels(case: str, files: Sequence[Path], dataset_json: Mapping[str, Any]) -> list[Path]:
    """The files of a case in the order of the model's channels; ValueError, with their names: others are there."""
    ending, names = dataset_json["file_ending"], channel_names(dataset_json)
    wanted = {f"{case}_{number:04d}{ending}": name for number, name in enumerate(names)}
    there = {file.name: file for file in files}
    if missing := [f"{wanted[file]} ({file})" for file in wanted if file not in there]:
        raise ValueError(
            f"case {case} lacks the channel {', '.join(missing)}, which the model was trained with; it wants "
            f"{', '.join(names)}: add the file"
        )
    if further := sorted(there.keys() - wanted.keys()):
        raise ValueError(
            f"case {case} has {len(there)} channels, and the model wants {', '.join(names)}: move {further[0]} and its "
            "like away"
        )
    return [there[file] for file in wanted]


def _names(folder: Path, ending: str) -> list[str]:
    """Of the files, without their ending."""
    files = (p.name for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))
    return sorted(name.removesuffix(ending) for name in files)


def preprocess_case(
    case: str, images: Sequence[Path], label: Path | None, plans: Any, configuration: Any, dataset_json: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Image ``(C, X, Y, Z)``, label ``(1, X, Y, Z)`` or None, and nnU-Net's properties, as a model's plans say.

    Raises:
        ValueError: files that are missing, damaged or do not fit together, or label values unknown to the model.
    """
    reader, seg = plans.image_reader_writer_class(), None
    image, properties = read_image(case, images, reader)
    if label is not None:
        seg, of_label = read_label_map(case, label, reader)
        here, there = Volume("label", seg.shape, of_label), Volume("image", image.shape[1:], properties)
        require_same_grid(case, here, there, "give the label of this image")
        known = declared_values(dataset_json["labels"])
        if unknown := sorted(set(np.unique(seg).tolist()) - known):
            raise ValueError(
                f"case {case}: {label} holds the label values {', '.join(map(str, unknown))}, which the model does not "
                f"know (it knows {', '.join(map(str, sorted(known)))}): renumber them as the model's dataset.json does"
            )
        seg = seg[None]
    preprocessor = configuration.preprocessor_class(verbose=False)
    return preprocessor.run_case_npy(image, seg, properties, plans, configuration, dataset_json)
