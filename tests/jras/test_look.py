"""Where ``nnUNetv2_ext guides`` looks in an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY
from nnunetv2_ext.jras.build import group_ids
from nnunetv2_ext.jras.look import known_case, middle_corner


def test_the_patch_lies_around_what_was_found_and_inside_the_image():
    found = np.zeros((20, 30, 40), bool)
    found[15:20, 9:12, 20:23] = True
    assert middle_corner(found, (8, 8, 8)) == (12, 6, 17)


def test_a_2d_patch_is_the_fullest_slice():
    found = np.zeros((5, 20, 20), bool)
    found[1, 0:2, 0:2], found[3, 10:14, 10:14] = True, True
    assert middle_corner(found, (8, 8)) == (3, 8, 8)


@pytest.mark.parametrize("found", [np.zeros((6, 20, 20), bool), np.ones((6, 20, 20), bool)])
def test_an_image_smaller_than_the_patch_lies_in_its_middle(found):
    assert middle_corner(found, (16, 8, 8)) == (-5, 6, 6)


@pytest.mark.parametrize(
    ("image", "regex", "known"),
    [
        ("heart_1_0000.nii.gz", None, "heart_1"),
        ("heart_2_0000.nii.gz", None, None),
        ("heart_1b_0000.nii.gz", r"^(heart_\d)", "heart_1b"),  # another case of a subject in the bank
        ("scan.nii.gz", r"^(heart_\d)", None),  # the expression finds no subject in it
    ],
)
def test_a_case_of_the_bank_is_known_by_its_name(tmp_path: Path, image: str, regex: str | None, known: str | None):
    key, subjects = b"0123456789abcdef", {"heart_1": "heart_1"}
    state = {"methods": {"jras": {"group_key": key}}, "settings": {"group_regex": regex}}
    weights = {"bank.groups": group_ids(["heart_1", "liver"], key, subjects)}
    torch.save({"network_weights": weights, EXTENSION_KEY: state}, tmp_path / "c.pth")
    assert known_case(tmp_path / "c.pth", {"file_ending": ".nii.gz"}, Path("somewhere", image)) == known
    torch.save({"network_weights": weights}, tmp_path / "exported.pth")
    assert known_case(tmp_path / "exported.pth", {"file_ending": ".nii.gz"}, Path(image)) is None
