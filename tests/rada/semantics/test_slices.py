"""From a plane to a square picture: geometry in mm, boxes, intensities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nnunetv2_ext.rada.semantics.slices import (
    Box,
    box_around,
    cut,
    empty_box,
    encoder_input,
    intensity_window,
    letterbox,
    rescale,
)


def disc(height, width, centre, radius, spacing=(1.0, 1.0)):
    rows, columns = np.indices((height, width))
    return ((rows - centre[0]) * spacing[0]) ** 2 + ((columns - centre[1]) * spacing[1]) ** 2 <= radius**2


def test_window_is_the_percentiles_of_the_whole_volume():
    volume = np.random.default_rng(0).normal(size=(9, 10, 11)).astype(np.float32)
    assert intensity_window(volume) == pytest.approx(tuple(np.percentile(volume, (0.5, 99.5))))


def test_window_of_a_large_volume_is_nearly_that():
    volume = np.random.default_rng(0).normal(size=(200, 150, 150)).astype(np.float32)
    assert intensity_window(volume) == pytest.approx(tuple(np.percentile(volume, (0.5, 99.5))), abs=0.02)


def test_window_needs_finite_numbers():
    with pytest.raises(ValueError, match="not finite"):
        intensity_window(np.array([[[0.0, np.nan, 1.0]]]))


def test_rescale():
    found = rescale(np.array([-3.0, -1.0, 0.0, 1.0, 7.0]), (-1.0, 1.0))
    assert found.tolist() == [0, 0, 0.5, 1, 1]
    assert found.dtype == np.float32
    assert rescale(np.ones(3), (1.0, 1.0)).tolist() == [0, 0, 0]


def test_letterbox_equals_pillows_bicubic_of_the_padded_square():
    """What CLIP's own preparation does with a square picture: pillow's bicubic, antialiased."""
    picture = np.random.default_rng(1).random((60, 60)).astype(np.float32)
    picture = np.pad(picture[:, 10:50], ((0, 0), (10, 10)))  # as if padded to a square before
    expected = np.asarray(Image.fromarray(picture).resize((24, 24), Image.Resampling.BICUBIC)).clip(0, 1)
    np.testing.assert_allclose(letterbox(picture, (1.0, 1.0), 24), expected, atol=1e-4)
    found = letterbox(picture[:, 10:50], (1.0, 1.0), 24).numpy()
    np.testing.assert_allclose(found[:, 6:18], expected[:, 6:18], atol=1e-4)  # but for what bleeds into the padding
    assert (found[:, :4] == 0).all() and (found[:, 20:] == 0).all()


def test_a_disc_in_mm_is_a_disc_in_the_square():
    """Slices of 1 x 4 mm: a ball's outline must not become an ellipse."""
    spacing = (4.0, 1.0)
    picture = disc(25, 100, (12, 50), 30, spacing)
    square = letterbox(picture, spacing, 100).numpy() > 0.5
    rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
    assert abs(len(rows) - len(columns)) <= 4
    assert abs(rows.mean() - columns.mean()) <= 2
    assert abs(square.sum() - np.pi * 30**2) < 0.06 * np.pi * 30**2


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.tuples(st.floats(0.3, 6), st.floats(0.3, 6)),
    st.integers(8, 48),
)
def test_letterbox_is_square_finite_centred_and_fills_one_side(height, width, spacing, size):
    square = letterbox(np.ones((height, width)), spacing, size)
    assert square.shape == (size, size) and square.dtype == torch.float32
    assert bool(((square >= 0) & (square <= 1)).all())
    rows, columns = torch.nonzero(square.any(1)).flatten(), torch.nonzero(square.any(0)).flatten()
    assert max(len(rows), len(columns)) == size
    for span in (rows, columns):
        assert abs(int(span[0]) - (size - 1 - int(span[-1]))) <= 1
    ratio = (height * spacing[0]) / (width * spacing[1])
    expected = (size, size / ratio) if ratio >= 1 else (size * ratio, size)
    assert len(rows) == pytest.approx(expected[0], abs=1.01) and len(columns) == pytest.approx(expected[1], abs=1.01)


def test_cut_pads_with_zeros():
    picture = np.arange(1.0, 13).reshape(3, 4)
    assert cut(picture, Box(1, 1, 2, 2)).tolist() == [[6, 7], [10, 11]]
    assert cut(picture, Box(-1, 3, 2, 3)).tolist() == [[0, 0, 0], [4, 0, 0]]
    assert cut(picture, Box(5, 5, 2, 2)).tolist() == [[0, 0], [0, 0]]


def test_box_has_a_margin_and_is_square_in_mm():
    mask = np.zeros((100, 200), dtype=bool)
    mask[40:60, 80:160] = True  # 20 x 2 mm = 40 mm by 80 x 1 mm = 80 mm
    box = box_around(mask, (2.0, 1.0))
    assert (box.height * 2.0, box.width * 1.0) == (120.0, 120.0)  # 80 mm and 25 % of it on both sides
    assert box == Box(top=20, left=60, height=60, width=120)


def test_box_around_a_pixel_is_not_tiny():
    mask = np.zeros((64, 64), dtype=bool)
    mask[30, 30] = True
    box = box_around(mask, (1.0, 1.0))
    assert (box.height, box.width) == (32, 32)
    assert box.top <= 30 - 15 and box.top + box.height >= 30 + 15


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 30), st.tuples(st.floats(0.5, 5), st.floats(0.5, 5)))
def test_boxes_hold_the_mask_or_nothing_of_it(seed, height, width, spacing):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < 0.2
    mask[rng.integers(height), rng.integers(width)] = True
    box = box_around(mask, spacing)
    assert cut(mask, box).sum() == mask.sum()
    if mask.all():
        with pytest.raises(ValueError, match="no background"):
            empty_box(~mask, spacing)
    else:
        box = empty_box(~mask, spacing)
        assert box.height >= 1 and box.width >= 1
        assert cut(~mask, box).all(), "all of it is background, and inside of the slice"


def test_largest_empty_square_against_a_loop():
    rng = np.random.default_rng(5)
    for _ in range(20):
        background = rng.random((12, 15)) > 0.07
        best = max(
            side
            for side in range(1, 13)
            if any(background[r : r + side, c : c + side].all() for r in range(13 - side) for c in range(16 - side))
        )
        box = empty_box(background, (1.0, 1.0))
        assert box.height == box.width
        assert box.height in (best, best - 1), "odd sides only: centred on a pixel"


def test_empty_mask_has_no_box():
    with pytest.raises(ValueError, match="empty mask"):
        box_around(np.zeros((4, 4), dtype=bool), (1.0, 1.0))


def test_alpha_shows_the_whole_slice_and_the_mask():
    picture = np.random.default_rng(2).random((40, 30)).astype(np.float32)
    mask = disc(40, 30, (20, 15), 8)
    image, alpha = encoder_input(picture, mask, (1.0, 1.0), 40, "alpha")
    assert image.shape == (3, 40, 40) and alpha.shape == (1, 40, 40)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    np.testing.assert_allclose(image[0, :, 5:35], picture, atol=1e-5)
    np.testing.assert_allclose(alpha[0, :, 5:35], mask, atol=1e-5)
    assert not alpha[0, :, :5].any() and not alpha[0, :, 35:].any()


def test_crop_shows_the_box_and_a_full_mask():
    picture = np.zeros((100, 100), dtype=np.float32)
    mask = disc(100, 100, (30, 70), 20)
    picture[mask] = 1
    image, alpha = encoder_input(picture, mask, (1.0, 1.0), 64, "crop")
    assert bool((alpha == 1).all())
    share = float((image[0] > 0.5).float().mean())
    assert share == pytest.approx(np.pi * 20**2 / (41 * 1.5) ** 2, rel=0.06), (
        "the disc fills the box but for the margin"
    )
    image, _ = encoder_input(picture, ~mask, (1.0, 1.0), 64, "crop", background=True)
    assert not image.any(), "the background's box holds no foreground"
