"""Pairs of labels that are told apart by their side."""

import numpy as np
import pytest

from nnunetv2_ext.data.mirror import MirrorPair, pairs_by_name, pairs_by_shape, thumbnail


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["kidney_left", "liver", "kidney_right"], [("kidney_left", "kidney_right")]),
        (["LeftLung", "RightLung", "trachea"], [("LeftLung", "RightLung")]),
        (["hippocampus-L", "hippocampus-R"], [("hippocampus-L", "hippocampus-R")]),
        (["Anterior", "Posterior"], [("Anterior", "Posterior")]),
        (["rib_left_1", "rib_left_2", "rib_right_1"], [("rib_left_1", "rib_right_1")]),  # not 2 with 1
        (["kidney_left", "lung_right"], []),  # two different organs
        (["left atrium", "right ventricle", "liver", "spleen"], []),
        (["lesion", "rest"], []),  # l and r within words
    ],
)
def test_names_that_differ_in_a_side_only(names: list[str], pairs: list[tuple[str, str]]) -> None:
    assert [(pair.first, pair.second) for pair in pairs_by_name(names)] == pairs


def two_lungs() -> np.ndarray:
    """(Z, Y, X): 1 and 2 are mirror images along x, 3 lies across the middle."""
    label = np.zeros((10, 12, 20), np.int16)
    label[2:8, 3:9, 2:6] = 1
    label[2:5, 3:5, 5:7] = 1
    label[np.flip(label, 2) == 1] = 2
    label[8:, 4:8, 8:12] = 3
    return label


def test_mirror_images_are_found_along_their_axis() -> None:
    found = pairs_by_shape([two_lungs()], {"one": 1, "two": 2, "middle": 3})
    assert found == [MirrorPair("one", "two", 2, 1.0)]
    assert str(found[0]) == "one and two mirror into each other (axis 2, Dice 1.00)"


def test_the_median_of_the_maps_counts_and_empty_ones_do_not() -> None:
    values = {"one": 1, "two": 2}
    without = np.where(two_lungs() == 2, 0, two_lungs())
    assert pairs_by_shape([two_lungs(), without, without], values)
    lopsided = two_lungs()
    lopsided[lopsided == 2] = 0
    lopsided[0, 0, 15:19] = 2
    assert pairs_by_shape([two_lungs(), lopsided, lopsided], values) == []


def test_nested_labels_are_their_own_mirror_images() -> None:
    label = np.zeros((12, 12, 12), np.int16)
    label[2:10, 2:10, 2:10] = 1
    label[4:8, 4:8, 4:8] = 2
    assert pairs_by_shape([label], {"shell": 1, "core": 2}) == []


def test_a_shifted_copy_is_not_a_mirror_image() -> None:
    label = np.zeros((4, 12, 20), np.int16)
    wedge = np.tril(np.ones((8, 8), bool))
    label[:, 2:10, 1:9][:, wedge] = 1
    label[:, 2:10, 11:19][:, wedge] = 2
    assert pairs_by_shape([label], {"a": 1, "b": 2}) == []
    label[:, 2:10, 11:19] = 2 * wedge[:, ::-1]
    assert [pair.axis for pair in pairs_by_shape([label], {"a": 1, "b": 2})] == [2]


def test_a_large_map_is_thinned_out_and_keeps_its_pairs() -> None:
    large = two_lungs().repeat(20, 0).repeat(20, 1).repeat(20, 2)
    small = thumbnail(large)
    assert max(small.shape) <= 48 and large.shape == (200, 240, 400)
    [pair] = pairs_by_shape([small], {"one": 1, "two": 2})
    assert pair.axis == 2 and pair.dice is not None and pair.dice > 0.9
