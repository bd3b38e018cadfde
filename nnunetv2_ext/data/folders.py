"""Cases in folders of images and labels, named as nnU-Net names them, and their preprocessing for a trained model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext.data.case import Volume, read_image, read_label_map, require_same_grid
from nnunetv2_ext.data.raw import declared_values


def find_pairs(images: Path, labels: Path, dataset_json: Mapping[str, Any]) -> dict[str, tuple[list[Path], Path]]:
    """Case to its channels' files and its label's.

    Raises:
        ValueError: no folder, no case, an image without label or the reverse, or another number of channels.
    """
    ending, channels = dataset_json["file_ending"], len(dataset_json.get("channel_names", ()))
    for folder in (images, labels):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give one with files that end in {ending}")
    wanted = {p.name.removesuffix(ending): p for p in sorted(labels.iterdir()) if p.name.endswith(ending)}
    there = cases_of_images(images, ending)
    if not wanted or not there:
        empty = labels if not wanted else images
        raise ValueError(f"{empty} has no file that ends in {ending}: give at least one labelled case")
    if lonely := sorted(set(there) ^ set(wanted)):
        what = "a label, but no image" if lonely[0] in wanted else "an image, but no label"
        raise ValueError(f"case {lonely[0]} has {what} (CASE_0000{ending}, CASE{ending}): add it, or take the case out")
    for case, found in there.items():
        if [p.name for p in found] != [f"{case}_{channel:04d}{ending}" for channel in range(channels)]:
            raise ValueError(
                f"case {case} has the channel files {', '.join(p.name for p in found)}, and the model takes {channels} "
                f"channel(s), {case}_0000{ending} and so on: give just those"
            )
    return {case: (there[case], wanted[case]) for case in sorted(wanted)}


def cases_of_images(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Case to its channels' files in a folder of images as nnU-Net names them."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        stem = file.name.removesuffix(ending)
        if file.name.endswith(ending) and len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdigit():
            found.setdefault(stem[:-5], []).append(file)
    return found


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
