"""What a stored label means to the mask channels."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.jras.labels import mask_lut


def test_lut_of_classes_is_the_identity_and_knows_no_ignore_label():
    lut = mask_lut(LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None))
    assert lut.shape == (256, 3)
    assert torch.equal(lut[:3], torch.eye(3, dtype=torch.uint8))
    assert not lut[3:].any()


def test_lut_of_regions_is_membership_in_the_order_of_the_heads():
    manager = LabelManager({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3])
    lut = mask_lut(manager)
    assert lut[:4].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert not lut[4:].any()


def test_a_label_a_byte_cannot_hold_is_refused():
    labels = {"background": 0} | {f"o{i}": i for i in range(1, 256)}
    with pytest.raises(ValueError, match="label 255"):
        mask_lut(LabelManager(labels, None))
