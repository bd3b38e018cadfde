"""Logits and training targets as label maps to draw, for datasets with classes and with (overlapping) regions."""

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor


def class_names(dataset_json: dict, labels: LabelManager) -> dict[int, str]:
    """Label value (as in the maps below) to name, without the background; with ``ignore`` where the dataset has it."""
    names = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    if labels.has_regions:  # drawn in head order, later regions over earlier ones
        classes = dict(enumerate(names, 1))
    else:
        classes = {int(value): name for name, value in dataset_json["labels"].items() if name in names}
    if labels.ignore_label is not None:
        classes[int(labels.ignore_label) if not labels.has_regions else len(names) + 1] = "ignore"
    return classes


def names_of_values(dataset_json: dict) -> dict[int, str]:
    """Value in nnU-Net's segmentation files to name, without the background; of regions that whose value it writes."""
    labels = {name: value for name, value in dataset_json["labels"].items() if name not in ("background", "ignore")}
    order = dataset_json.get("regions_class_order")
    return {int(value): name for value, name in zip(labels.values() if order is None else order, labels)}


def foreground_names(dataset_json: dict, labels: LabelManager) -> list[str]:
    """Names of the foreground classes or regions in the order in which nnU-Net lists their Dice."""
    return [name for _, name in sorted(class_names(dataset_json, labels).items()) if name != "ignore"]


def structures_of(dataset_json: dict, labels: LabelManager) -> dict[str, int | tuple[int, ...]]:
    """Name to label value, or to the values of a region, in the order of the heads without the background."""
    values = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    return dict(zip(foreground_names(dataset_json, labels), values, strict=True))


def logits_to_labels(logits: Tensor, labels: LabelManager) -> np.ndarray:
    """(heads, *S) to one value per voxel: the class, or 1 + index of the last region that contains the voxel."""
    if not labels.has_regions:
        return logits.argmax(0).cpu().numpy()
    return _last_region((logits > 0).cpu().numpy())


def target_to_labels(target: Tensor, labels: LabelManager) -> np.ndarray:
    """(1 or regions, *S) training target to one value per voxel, numbered like ``logits_to_labels``.

    The ignore label keeps its value.
    """
    if not labels.has_regions:
        return target[0].cpu().numpy()
    return _last_region((target > 0).cpu().numpy())


def _last_region(regions: np.ndarray) -> np.ndarray:
    result = np.zeros(regions.shape[1:], dtype=np.int64)
    for number, region in enumerate(regions, 1):
        result[region] = number
    return result
