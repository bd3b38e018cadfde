"""One slice's labels on its neighbour."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_closing, binary_opening, gaussian_filter

from nnunetv2_ext.rada.propagation.registration import carry_over, clean, correlation


def disc(centre, radius, shape=(64, 72)):
    rows, columns = np.indices(shape)
    return (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2


def picture(mask, seed=0):
    return gaussian_filter(mask.astype(np.float64), 1.0) * 100 + np.random.default_rng(seed).normal(size=mask.shape)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_equal_slices_return_the_mask():
    mask = disc((30, 30), 12).astype(np.uint8)
    image = picture(mask)
    found = carry_over(mask, image, image.copy())
    assert np.array_equal(found, mask) and found is not mask


@pytest.mark.parametrize("shift", [(3, 0), (0, 4), (-2, 3)])
def test_labels_follow_what_moved(shift):
    before, after = disc((30, 34), 14), disc((30 + shift[0], 34 + shift[1]), 14)
    found = carry_over(before.astype(np.uint8), picture(before, 1), picture(after, 2)) == 1
    assert dice(found, after) > 0.95 > dice(before, after) + 0.02
    assert set(np.unique(found)) <= {0, 1}


def test_labels_follow_growth_and_keep_their_values():
    inner, outer = disc((30, 34), 7), disc((30, 34), 15)
    labels = np.where(inner, 7, np.where(outer, 200, 0)).astype(np.uint8)
    image = gaussian_filter(np.where(inner, 200.0, np.where(outer, 100.0, 0.0)), 1)
    bigger_inner, bigger_outer = disc((30, 34), 9), disc((30, 34), 18)
    target = gaussian_filter(np.where(bigger_inner, 200.0, np.where(bigger_outer, 100.0, 0.0)), 1)
    found = carry_over(labels, image, target)
    assert found.dtype == np.uint8 and set(np.unique(found)) <= {0, 7, 200}
    assert dice(found == 7, bigger_inner) > 0.87 > dice(inner, bigger_inner) + 0.1
    assert dice(found > 0, bigger_outer) > 0.95 > dice(outer, bigger_outer) + 0.1


def test_another_brightness_is_matched():
    before, after = disc((30, 30), 14), disc((32, 32), 14)
    found = carry_over(before.astype(np.uint8), picture(before, 1), 3 * picture(after, 2) + 50)
    assert dice(found == 1, after) > 0.94


@pytest.mark.parametrize("shape", [(1, 30), (3, 3), (4, 40)])
def test_narrow_slices(shape):
    rng = np.random.default_rng(0)
    labels = (rng.random(shape) > 0.5).astype(np.uint8)
    assert carry_over(labels, rng.random(shape), rng.random(shape)).shape == shape


@pytest.mark.parametrize("constant", ["source", "target", "both"])
def test_constant_slices_leave_labels_alone(constant):
    mask = disc((30, 30), 10)
    source = np.zeros(mask.shape) if constant != "target" else picture(mask)
    target = np.ones(mask.shape) if constant != "source" else picture(mask)
    assert np.array_equal(carry_over(mask.astype(np.uint8), source, target), mask)


def test_correlation():
    rng = np.random.default_rng(0)
    a, b = rng.random((8, 9)), rng.random((8, 9))
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert correlation(a, -a) == pytest.approx(-1)
    assert correlation(np.ones((3, 3)), np.ones((3, 3))) == 1.0
    assert correlation(np.ones((3, 3)), np.zeros((3, 3))) == 0.0
    assert correlation(a, np.zeros_like(a)) == 0.0


def test_cleaning_is_opening_and_closing():
    mask = disc((30, 30), 15)
    mask[30, 44:50] = True  # a whisker
    mask[16, 30], mask[5, 5] = False, True  # a notch, a speck
    found = clean(mask.astype(np.uint8), 9)
    kernel = np.ones((5, 5))
    assert np.array_equal(found == 1, binary_closing(binary_opening(mask, kernel), kernel))
    assert not found[5, 5] and not found[30, 48]


def test_small_classes_are_left_alone():
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[4:11, 4:11] = 1
    labels[3, 3] = 1
    labels[10, 10] = 0  # 49 pixels with a speck
    assert np.array_equal(clean(labels, 9), labels)
    labels[10, 10] = 1  # 50: now the speck goes
    assert clean(labels, 9)[3, 3] == 0 and clean(labels, 9).sum() == 49


def test_classes_that_would_lose_their_shape_are_left_alone():
    labels = np.zeros((40, 60), dtype=np.uint8)
    labels[10, :] = 1  # 60 pixels, one thick: nothing of it would stay
    labels[20:30, 20:30] = 2
    labels[20:30, 40:51] = 3
    labels[15:20, 40] = 3  # 5 of 115 pixels
    found = clean(labels, 9)
    assert np.array_equal(found == 1, labels == 1) and np.array_equal(found == 2, labels == 2)
    assert not (found[15:20, 40] == 3).any() and (found == 3).sum() == 110


def test_image_border_erodes_nothing():
    labels = np.zeros((30, 40), dtype=np.uint8)
    labels[:12, :15] = 1
    labels[20:, 30:] = 2
    assert np.array_equal(clean(labels, 9), labels)


def test_classes_do_not_take_from_each_other_and_ignored_pixels_stay():
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[5:20, 5:20] = 1
    labels[5:20, 20:35] = 2
    labels[10:12, 10:12] = 2  # inside of class 1: opening removes it from 2; no other class takes it
    labels[30:, :] = 9
    labels[12, 25] = 9
    found = clean(labels, 9)
    assert np.array_equal(found == 9, labels == 9)
    changed = found != labels
    assert set(np.unique(labels[changed & (found > 0)])) <= {0}, "only background becomes a class"
    assert (found[13:19, 6:9] == 1).all() and (found[13:19, 30:34] == 2).all()
