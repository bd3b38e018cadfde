"""Low-resolution labels by hand-made cells, against a slow reference, and the table of mask channels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.jras.labels import adaptive_pool, low_res_labels, low_res_shape, mask_lut

IGNORE = 9


def one_cell(values: list[int]) -> int:
    """The label of a single cell that holds ``values``; -2 is outside the image."""
    labels = torch.tensor(values, dtype=torch.int16).reshape(2, 2, -1)
    return int(low_res_labels(labels, (1, 1, 1), (labels == IGNORE) | (labels == -2)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0] * 8, 0),
        ([1] * 8, 1),
        ([1] + [0] * 7, 0),  # 12.5 % foreground
        ([1, 1] + [0] * 6, 1),  # exactly 25 %
        ([1, 2] + [0] * 6, 1),  # foreground counts together; the lowest of equals
        ([2, 2, 1] + [0] * 5, 2),
        ([3, 3, 1, 2] + [0] * 4, 3),
        ([1, 1, 2] + [2] + [0] * 4, 1),
        ([-1] * 6 + [2, 2], 2),  # -1 is background
        ([IGNORE] * 4 + [0] * 4, 0),  # exactly half is not more than half
        ([IGNORE] * 5 + [0] * 3, 255),
        ([IGNORE] * 5 + [1] * 3, 255),
        ([IGNORE] * 4 + [1] * 2 + [0] * 2, 1),
        ([-2] * 5 + [1] * 3, 255),  # outside the image
        ([-2] * 3 + [IGNORE] * 2 + [1] * 3, 255),
    ],
)
def test_hand_made_cells(values, expected):
    assert one_cell(values) == expected


def test_an_ignored_foreground_voxel_does_not_count():
    labels = torch.tensor([1, 1, 1, 2, 0, 0, 0, 0], dtype=torch.int16).reshape(2, 2, 2)
    ignored = labels == 1
    assert low_res_labels(labels, (1, 1, 1), ignored).item() == 0  # 12.5 % are left
    assert low_res_labels(labels, (1, 1, 1), torch.zeros_like(ignored)).item() == 1


def slow_reference(labels: np.ndarray, shape: tuple[int, ...], ignored: np.ndarray) -> np.ndarray:
    """The rule, cell by cell, in integer arithmetic."""
    result = np.zeros(shape, dtype=np.uint8)
    for cell in np.ndindex(*shape):
        where = tuple(
            slice(i * size // n, math.ceil((i + 1) * size / n)) for i, size, n in zip(cell, labels.shape, shape)
        )
        inside, hidden = labels[where].ravel(), ignored[where].ravel()
        seen = inside[~hidden & (inside > 0)].tolist()
        if 2 * hidden.sum() > hidden.size:
            result[cell] = 255
        elif 4 * len(seen) >= hidden.size and seen:
            result[cell] = min(set(seen), key=lambda value: (-seen.count(value), value))
    return result


@settings(max_examples=60, deadline=None)
@given(
    size=st.lists(st.integers(3, 9), min_size=2, max_size=3),
    cells=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    seed=st.integers(0, 10**6),
)
def test_equals_a_slow_reference_also_where_cells_overlap(size, cells, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([-2, -1, 0, 0, 0, 1, 2, 3, IGNORE], size=size).astype(np.int16)
    ignored = (labels == IGNORE) | (labels == -2)
    shape = tuple(cells[: len(size)])
    got = low_res_labels(torch.from_numpy(labels), shape, torch.from_numpy(ignored))
    np.testing.assert_array_equal(got.numpy(), slow_reference(labels, shape, ignored))


def test_labels_lie_where_the_image_does():
    image = torch.zeros(1, 1, 13, 9, 7)
    image[..., 4:9, 2:7, 0:5] = 1
    shape = (5, 4, 3)
    labels = low_res_labels(image[0, 0].short(), shape, torch.zeros_like(image[0, 0], dtype=torch.bool))
    assert torch.equal(labels == 1, adaptive_pool(image, shape)[0, 0] >= 0.25 - 1e-6)


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ((128, 128, 128), (32, 32, 32)),
        ((40, 56, 40), (10, 14, 10)),
        ((512, 512), (128, 128)),
        ((16, 24, 16), (8, 8, 8)),
        ((4, 24, 33), (4, 8, 9)),
    ],
)
def test_low_res_shape(patch, expected):
    assert low_res_shape(patch) == expected
    assert low_res_shape(patch, 1) == patch


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
