"""Dice of label maps, by hand."""

import math

import numpy as np
import pytest

from nnunetv2_ext.parts.dice import dice


def test_dice_by_hand() -> None:
    found, truth = np.array([1, 1, 0, 2, 3]), np.array([1, 0, 0, 2, 9])
    structures = {"one": 1, "both": (1, 2), "invented": 3, "nowhere": 7}
    scores = dice(found, truth, None, structures)
    assert scores["one"] == pytest.approx(2 / 3) and scores["both"] == pytest.approx(4 / 5)
    assert scores["invented"] == 0 and math.isnan(scores["nowhere"])
    assert math.isnan(dice(found, truth, truth == 9, structures)["invented"])
