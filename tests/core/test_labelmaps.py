"""Label maps for pictures: numbers and names agree, for classes, regions and the ignore label."""

from __future__ import annotations

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.core.labelmaps import class_names, foreground_names, logits_to_labels, target_to_labels

CLASSES = {"labels": {"background": 0, "liver": 1, "spleen": 2}}
CLASSES_IGNORE = {"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
REGIONS_IGNORE = {
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
    "regions_class_order": [1, 2],
}


def manager(dataset_json: dict) -> LabelManager:
    return LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))


def test_names_of_classes_are_those_of_the_dataset():
    assert class_names(CLASSES, manager(CLASSES)) == {1: "liver", 2: "spleen"}
    assert class_names(CLASSES_IGNORE, manager(CLASSES_IGNORE)) == {1: "liver", 2: "spleen", 3: "ignore"}


def test_names_of_the_foreground_are_in_the_order_of_nnunets_dice():
    shuffled = {"labels": {"spleen": 2, "background": 0, "ignore": 3, "liver": 1}}
    assert foreground_names(shuffled, manager(shuffled)) == ["liver", "spleen"]
    assert foreground_names(REGIONS_IGNORE, manager(REGIONS_IGNORE)) == ["whole", "core"]


def test_regions_are_numbered_in_the_order_of_the_network_s_heads():
    assert class_names(REGIONS, manager(REGIONS)) == {1: "whole", 2: "core"}
    assert class_names(REGIONS_IGNORE, manager(REGIONS_IGNORE)) == {1: "whole", 2: "core", 3: "ignore"}
    assert manager(REGIONS).foreground_regions == [(1, 2), 2]


def test_class_logits_become_the_largest_class():
    logits = torch.tensor([[3.0, 0.0, -1.0], [1.0, 2.0, -2.0], [0.0, 1.0, 5.0]])[:, None]  # (classes, 1, 3)
    assert logits_to_labels(logits, manager(CLASSES)).tolist() == [[0, 1, 2]]


def test_region_logits_become_the_last_region_that_holds_the_voxel():
    logits = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, 1.0]])[:, None]
    assert logits_to_labels(logits, manager(REGIONS)).tolist() == [[0, 1, 2, 2]]


def test_class_targets_keep_their_values_and_the_ignore_label():
    target = torch.tensor([[[0, 1, 3]]], dtype=torch.int16)
    assert target_to_labels(target, manager(CLASSES_IGNORE)).tolist() == [[0, 1, 3]]


def test_region_targets_agree_with_nnunet_s_own_transform():
    from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

    labels = manager(REGIONS_IGNORE)
    regions = [*labels.foreground_regions, labels.ignore_label]
    seg = torch.tensor([[[0, 1, 2, 3]]])
    target = ConvertSegmentationToRegionsTransform(regions, channel_in_seg=0)(segmentation=seg)["segmentation"]
    drawn = target_to_labels(target, labels)
    assert drawn.tolist() == [[0, 1, 2, 3]]
    names = class_names(REGIONS_IGNORE, labels)
    assert [names.get(int(value), "background") for value in np.unique(drawn)] == [
        "background",
        "whole",
        "core",
        "ignore",
    ]


def test_maps_are_on_the_cpu_and_leave_the_input_alone():
    logits = torch.randn(3, 4, 4, 4, requires_grad=True)
    before = logits.detach().clone()
    result = logits_to_labels(logits, manager(CLASSES))
    assert isinstance(result, np.ndarray) and result.shape == (4, 4, 4)
    assert torch.equal(logits, before)
