"""One draw of intensities for a group of samples, and a spatial transform of its own for each."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core.randomness import drawing_from
from nnunetv2_ext.parts.shared_draw import SharedDraw, curve, intensity_range

LIMITS = np.array([[-2.0, 3.0]])


def nnunets(patch=(24, 24), **options):
    return nnUNetTrainer.get_training_transforms(patch, (-0.3, 0.3), None, (0, 1), False, **options)


def test_of_a_constant_image_query_and_guides_are_equal_and_of_other_seeds_not():
    """Away from the corners, where rotation brings in what is outside, and up to noise, which mirroring turns."""
    draw, other = SharedDraw(nnunets(), 0.5, LIMITS), 0
    for seed in range(40):
        draw.seeds = [seed, seed, seed + 1000]
        label = torch.zeros(1, 40, 40, dtype=torch.int16)
        images = [draw(image=torch.full((1, 40, 40), 1.3), segmentation=label.clone())["image"] for _ in range(3)]
        middle = [float(image[0, 8:16, 8:16].mean()) for image in images]
        assert middle[0] == pytest.approx(middle[1], abs=0.15), seed
        other += abs(middle[0] - middle[2]) > 0.15
    assert other > 10


def test_the_intensity_transforms_of_a_group_are_the_same_to_the_bit():
    whole = nnunets()
    whole.transforms = [t for t in whole.transforms if not isinstance(t, (SpatialTransform, MirrorTransform))]
    draw = SharedDraw(whole, 0.5, LIMITS)
    image = torch.randn(1, 24, 24, generator=torch.Generator().manual_seed(0))
    changed = 0
    for seed in range(30):
        draw.seeds = [seed, seed]
        one, other = (draw(image=image.clone(), segmentation=None)["image"] for _ in range(2))
        assert torch.equal(one, other)
        changed += not torch.equal(one, image)
    assert changed > 15


def test_spatial_transforms_stay_independent():
    draw, image = SharedDraw(nnunets((40, 40)), 1.0, LIMITS), torch.zeros(1, 40, 40)
    image[:, :20, :20] = 1
    draw.seeds = [5] * 24
    label = (image > 0).to(torch.int16)
    found = [draw(image=image.clone(), segmentation=label.clone())["segmentation"] for _ in range(24)]
    corners = {(bool(x[0, 5, 5]), bool(x[0, 5, -6]), bool(x[0, -6, 5])) for x in found}
    assert len(corners) >= 3


def test_other_random_numbers_go_on_as_if_nothing_was_drawn():
    draws = random.random, np.random.random, lambda: torch.rand(1).item()
    found = []
    for between in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if between:
            with drawing_from(7):
                assert [one() for one in draws] != []
        found.append([one() for one in draws])
    assert found[0] == found[1]


def test_a_curve_increases_keeps_its_ends_and_has_slope_one_outside():
    knots = np.array([0, 0.5, 0.6, 1.0])
    x = torch.linspace(-3, 4, 200)
    y = curve(x, -2, 3, knots)
    assert (y.diff() > 0).all()
    outside = (x < -2) | (x > 3)
    assert torch.allclose(y[outside], x[outside], atol=1e-5)
    assert float(curve(torch.tensor([-2 + 5 / 3]), -2, 3, knots)) == pytest.approx(-2 + 5 * 0.5, abs=1e-5)


def test_the_share_of_curves_is_that_of_the_setting_and_cascade_channels_are_left_alone():
    image = torch.linspace(-2, 3, 16).view(1, 4, 4).repeat(2, 1, 1)
    changed = 0
    draw = SharedDraw(ComposeTransforms([]), 0.3, LIMITS)
    for seed in range(400):
        draw.seeds = [seed]
        found = draw(image=image.clone())["image"]
        assert torch.equal(found[1], image[1])
        changed += not torch.equal(found[0], image[0])
    assert 90 < changed < 150
    draw = SharedDraw(ComposeTransforms([]), 0.0, LIMITS)
    draw.seeds = [0]
    assert torch.equal(draw(image=image.clone())["image"], image)


def test_the_range_of_intensities_is_that_of_nearly_all_voxels():
    class Data:
        identifiers = ("a", "b")

        def load_case(self, case):
            values = np.arange(10000.0).reshape(1, 10, 10, 100) + (0 if case == "a" else 100)
            return np.concatenate((values, values * 2)), None, None, {}

    found = intensity_range(Data(), 1)
    assert found.shape == (1, 2) and found[0] == pytest.approx([50 + 50, 50 + 9949], abs=1)
