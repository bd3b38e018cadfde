"""Where ``nnUNetv2_ext guides`` looks in an image."""

from __future__ import annotations

import numpy as np
import pytest

from nnunetv2_ext.jras.look import crop, middle_patch


def test_the_patch_lies_around_what_was_found_and_inside_the_image():
    found = np.zeros((20, 30, 40), bool)
    found[15:20, 9:12, 20:23] = True
    assert middle_patch(found, (8, 8, 8)) == ((12, 6, 17), (8, 8, 8))


def test_a_2d_patch_is_the_fullest_slice():
    found = np.zeros((5, 20, 20), bool)
    found[1, 0:2, 0:2], found[3, 10:14, 10:14] = True, True
    corner, patch = middle_patch(found, (8, 8))
    assert corner[0] == 3 and patch == (1, 8, 8) and corner[1:] == (8, 8)


@pytest.mark.parametrize("found", [np.zeros((6, 20, 20), bool), np.ones((6, 20, 20), bool)])
def test_an_image_smaller_than_the_patch_is_padded_with_zeros(found):
    corner, patch = middle_patch(found, (16, 8, 8))
    assert corner == (-5, 6, 6)
    cut = crop(np.ones((2, 6, 20, 20)), corner, patch)
    assert cut.shape == (2, 16, 8, 8) and cut.sum() == 2 * 6 * 64 and cut[:, 5:11].all()
