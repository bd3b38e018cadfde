"""The view map: lazy crops equal the full map, and nnU-Net's own crop and augmentation carry it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.rada.planes import Planes
from nnunetv2_ext.rada.views import AXES, INSIDE, NOTHING, LazyTarget, view_map, view_masks

IGNORE = 3


def sparse_label(shape, planes: Planes, scribbles=(), seed: int = 0) -> np.ndarray:
    """Random classes 0..2 on the planes and at the scribbles, ignore elsewhere."""
    dense = np.random.default_rng(seed).integers(0, 3, shape).astype(np.int8)
    label = np.full(shape, IGNORE, np.int8)
    for axis in range(3):
        for index in planes.indices[axis]:
            where = (slice(None),) * axis + (index,)
            label[where] = dense[where]
    for voxel in scribbles:
        label[voxel] = dense[voxel]
    return label


def slow_map(label: np.ndarray, planes: Planes) -> np.ndarray:
    bits = np.zeros(label.shape, np.int16)
    for voxel in np.ndindex(*label.shape):
        on = [1 << axis for axis in range(3) if voxel[axis] in planes.indices[axis]]
        scribble = not on and label[voxel] not in (IGNORE, -1)
        bits[voxel] = INSIDE + sum(on) + (AXES if scribble else 0)
    return bits


indices = st.lists(st.integers(0, 5), max_size=2, unique=True).map(sorted).map(tuple)
planes = st.builds(Planes, st.tuples(indices, indices, indices))


@settings(max_examples=40, deadline=None)
@given(
    planes=planes,
    scribbles=st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=3),
    corner=st.tuples(*[st.integers(-4, 5)] * 3),
    size=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_nnunets_crop_of_the_lazy_map_is_the_crop_of_the_full_one(planes, scribbles, corner, size):
    shape = (6, 7, 8)
    label = sparse_label(shape, planes, scribbles)
    full = view_map(label, IGNORE, planes)
    assert (full == slow_map(label, planes)).all()
    box = [[max(c, 1 - s), max(c, 1 - s) + s] for c, s in zip(corner, size)]  # at least one voxel is inside
    ours = crop_and_pad_nd(LazyTarget(label[None], IGNORE, planes), box, -1, cast_cropped_to=np.int16)
    assert ours.dtype == np.int16
    expected = crop_and_pad_nd(np.stack((label, full)), box, -1, cast_cropped_to=np.int16)
    np.testing.assert_array_equal(ours, expected)


def test_voxels_outside_the_body_box_count_on_planes_only():
    planes = Planes(((2,), (), ()))
    label = sparse_label((4, 4, 4), planes)
    label[2, 0, 0] = label[0, 0, 0] = -1
    bits = view_map(label, IGNORE, planes)
    assert bits[2, 0, 0] == INSIDE | 1 and bits[0, 0, 0] == INSIDE


def test_propagated_planes_are_six_further_channels():
    label = sparse_label((4, 5, 6), Planes(((2,), (), ())))
    propagated = np.random.default_rng(0).integers(0, 5, (2, 3, 4, 5, 6)).astype(np.uint8)
    box = [[1, 4], [0, 6], [2, 5]]
    target = crop_and_pad_nd(LazyTarget(label[None], IGNORE, Planes(), propagated), box, -1, cast_cropped_to=np.int16)
    assert target.shape == (8, 3, 6, 3)
    np.testing.assert_array_equal(target[2:, :, :5], propagated.reshape(6, 4, 5, 6)[:, 1:4, :5, 2:5])
    empty = LazyTarget(label[None], IGNORE, Planes(), NOTHING)[:, 0:4, 0:5, 0:6]
    assert (empty[2:5] == IGNORE).all() and (empty[5:] == 255).all()


def test_mirroring_and_rotation_carry_the_bits_and_keep_intersections():
    planes = Planes(((8,), (10,), (6,)))
    bits = torch.from_numpy(view_map(sparse_label((16, 20, 12), planes), IGNORE, planes))
    assert bits[8, 10, 6] == INSIDE | AXES and bits[8, 10, 0] == INSIDE | 3 and bits[0, 0, 6] == INSIDE | 4
    mirrored = MirrorTransform(allowed_axes=(0,))._apply_to_segmentation(bits[None], axes=[0])
    assert torch.equal(mirrored[0], bits.flip(0))
    torch.manual_seed(0)
    np.random.seed(0)
    turn = SpatialTransform(
        (16, 20, 12),
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=1,
        rotation=(0.4, 0.5),
        p_scaling=1,
        scaling=(0.8, 0.9),
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    turned = turn(image=torch.zeros(1, 16, 20, 12), segmentation=bits[None])["segmentation"][0]
    assert set(turned.unique().tolist()) <= {-1, *bits.unique().tolist()}
    for bit in (1, 2, 4):
        assert (turned.clamp_min(0) & bit).any()


@pytest.mark.parametrize(
    ("axes", "number", "masks"),
    [
        ((0, 1, 2), 3, (0b011, 0b101, 0b110)),
        ((0, 2), 3, (0b101, 0b001, 0b100)),
        ((1, 2), 3, (0b110, 0b010, 0b100)),
        ((1,), 3, (0b111,) * 3),
        ((), 3, (0b111,) * 3),
        ((0, 1, 2), 1, (0b111,)),
        ((0,), 1, (0b111,)),
    ],
)
def test_views_by_the_axes_that_have_planes(axes, number, masks):
    assert view_masks(axes, number) == masks
