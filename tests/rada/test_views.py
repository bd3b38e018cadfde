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

from nnunetv2_ext.rada.annotation.planes import Planes
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
        if not on and label[voxel] not in (IGNORE, -1):
            near = ({voxel[axis] - 1, voxel[axis] + 1} & set(planes.indices[axis]) for axis in range(3))
            on = [1 << axis for axis, found in enumerate(near) if found] or [AXES]
        bits[voxel] = INSIDE + sum(on)
    return bits


def test_a_frayed_edge_of_a_slab_belongs_to_its_axis_also_where_the_crop_ends_between_them():
    label = sparse_label((8, 8, 8), Planes(((3, 4), (), ())))
    label[5, 2:4, 2:4] = 1
    label[7, 0, 0] = 1
    bits = LazyTarget(label[None], IGNORE, Planes(((3, 4), (), ())))[:, :, :, :][1]
    assert set(bits[5].ravel()) == {INSIDE, INSIDE | 1} and bits[7, 0, 0] == INSIDE | AXES
    part = LazyTarget(label[None], IGNORE, Planes(((3, 4), (), ())))[:, 5:8, :, :][1]
    assert (part == bits[5:]).all()


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


def test_mirroring_carries_the_bits_and_keeps_intersections():
    planes = Planes(((8,), (10,), (6,)))
    bits = torch.from_numpy(view_map(sparse_label((16, 20, 12), planes), IGNORE, planes))
    assert bits[8, 10, 6] == INSIDE | AXES and bits[8, 10, 0] == INSIDE | 3 and bits[0, 0, 6] == INSIDE | 4
    mirrored = MirrorTransform(allowed_axes=(0,))._apply_to_segmentation(bits[None], axes=[0])
    assert torch.equal(mirrored[0], bits.flip(0))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize(
    ("rotation", "scaling"), [((0.4, 0.5), (0.8, 0.9)), ((0.4, 0.5), (1.2, 1.3)), ((-0.5, -0.4), (1, 1))]
)
def test_rotation_and_scaling_carry_label_and_bits_to_where_the_planes_go(rotation, scaling):
    """Both channels in one call, as in training, against the voxels whose origin lies on the plane by arithmetic."""
    shape, at = (32, 40, 28), (18, 15, 12)
    planes = Planes(((at[0],), (at[1],), (at[2],)))
    label = sparse_label(shape, planes)
    label[label != IGNORE] = 1  # at class borders two labels compete, which says nothing about where the plane is
    target = torch.from_numpy(np.stack([label, view_map(label, IGNORE, planes)]).astype(np.int16))
    np.random.seed(0)
    turn = SpatialTransform(
        shape,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_rotation=1,
        rotation=rotation,
        p_scaling=1,
        scaling=scaling,
        p_synchronize_scaling_across_axes=1,
        bg_style_seg_sampling=False,
        border_mode_seg="constant",
        padding_value_seg=-1,
    )
    drawn = turn.get_parameters(image=torch.zeros(1, *shape))
    label, bits = turn.apply({"segmentation": target}, **drawn)["segmentation"].numpy()
    assert set(np.unique(bits)) <= {-1, *target[1].unique().tolist()}  # no sum of two masks, no mixture
    centre = (np.array(shape) - 1) / 2
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    origin = (voxels - centre) @ drawn["affine"].T + centre
    inside = ((origin > -0.5) & (origin < np.array(shape) - 0.5)).all(-1)
    assert ((bits != -1) == inside).mean() > 0.99
    everywhere = np.zeros(shape, bool)
    for axis in range(3):
        expected = inside & (np.abs(origin[..., axis] - at[axis]) < 0.5)
        assert expected.sum() > 400
        assert overlap(expected, (bits > 0) & ((bits & 1 << axis) != 0)) >= 0.97
        everywhere |= expected
    assert overlap(everywhere, label == 1) >= 0.97
    assert overlap((bits > 0) & ((bits & AXES) != 0), label == 1) >= 0.97


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
