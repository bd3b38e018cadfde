"""Where ``nnUNetv2_ext guides`` looks in an image."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2_ext.jras.look import middle_corner


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
