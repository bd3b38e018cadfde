"""Thickened planes survive nnU-Net's own resampling; thin ones do not, and nothing hidden is used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

from nnunetv2_ext.rada.annotation.lost import unmatched
from nnunetv2_ext.rada.annotation.planes import Planes, find_planes, on_planes
from nnunetv2_ext.rada.annotation.slabs import sample_positions, slab_for, thicken

IGNORE = 3


def organ(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Two classes side by side in an ellipsoid somewhere in the volume."""
    random = np.random.RandomState(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    centre, radius = random.uniform(-0.4, 0.4, 3), random.uniform(0.3, 0.9, 3)
    inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius)) < 1
    return np.where(inside, 1 + (grid[random.randint(3)] > 0), 0).astype(np.int16)


def sparse(dense: np.ndarray, planes: Planes) -> np.ndarray:
    return np.where(on_planes(dense.shape, planes), dense, IGNORE).astype(np.int16)


def resample(label: np.ndarray, spacing: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """As nnU-Net's default plans do with labels."""
    shape = compute_new_shape(label.shape, spacing, target)
    return resample_data_or_seg_to_shape(
        label[None], shape, spacing, target, is_seg=True, order=1, order_z=0, force_separate_z=None
    )[0]


_sizes = st.tuples(*[st.integers(8, 26)] * 3)
_factors = st.tuples(*[st.one_of(st.floats(0.5, 5), st.sampled_from([0.5, 0.9, 1.0, 1.1, 2.0, 3.0, 4.0, 5.0]))] * 3)


@settings(max_examples=60, deadline=None)
@given(shape=_sizes, factors=_factors, base=st.sampled_from([(1, 1, 1), (3, 1, 1), (1, 1, 5)]), seed=st.integers(0, 99))
def test_every_plane_survives_resampling(shape, factors, base, seed) -> None:
    """Factors 0.5 to 5 on each axis by itself, isotropic and anisotropic (nnU-Net then treats one axis apart)."""
    random = np.random.RandomState(seed)
    planes = Planes(tuple((int(random.randint(n)),) for n in shape))
    target = tuple(b * f for b, f in zip(base, factors))
    new = compute_new_shape(shape, base, target)
    thick, slabs = thicken(sparse(organ(shape, seed), planes), IGNORE, planes, new)
    after = find_planes(resample(thick, base, target), IGNORE)
    before = find_planes(thick, IGNORE)
    assert all(set(p) <= set(b) for p, b in zip(planes.indices, before.indices))
    assert unmatched(before, after, shape, new) == []
    # no thicker than it must be: ceil(old / new), and where slices are refined at most one more
    assert all(slab.stop - slab.start <= np.ceil(a / b) + (a < b) for slab, a, b in zip(slabs, shape, new))


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0, 5.0])
def test_thin_planes_vanish_without_thickening(factor) -> None:
    """The check must be able to fail: at these factors most single slices lie between the samples."""
    dense, target = organ((40, 40, 40), 0), (factor,) * 3
    lost = 0
    for index in range(10, 20):
        planes = Planes(((index,), (), ()))
        after = find_planes(resample(sparse(dense, planes), (1, 1, 1), target), IGNORE)
        lost += len(unmatched(planes, after, dense.shape, compute_new_shape(dense.shape, (1, 1, 1), target)))
    assert lost >= 5


def test_where_slabs_cross_the_nearer_plane_wins() -> None:
    planes = Planes(((10,), (10,), ()))
    label = np.full((21, 21, 21), IGNORE, dtype=np.int16)
    label[10], label[:, 10] = 1, 2  # the planes contradict each other everywhere beside their crossing
    thick, slabs = thicken(label, IGNORE, planes, (3, 3, 21))
    assert [slab.stop - slab.start for slab in slabs] == [7, 7]
    for i in range(7, 14):
        for j in range(7, 14):
            if i == 10 or j == 10:
                continue  # annotated
            nearer = {-1: 1, 1: 2, 0: 1}[int(np.sign(abs(i - 10) - abs(j - 10)))]  # of equally near ones axis 0's
            assert (thick[i, j] == nearer).all(), (i, j)


def test_slab_repeats_the_plane_and_never_shows_hidden_labels() -> None:
    dense = organ((20, 20, 20), 3)
    planes = Planes(((9,), (), ()))
    hidden = dense.copy()
    hidden[[0, 1, 2, 8, 10, 11]] = 2 - hidden[[0, 1, 2, 8, 10, 11]]
    thick, slabs = thicken(sparse(dense, planes), IGNORE, planes, (7, 7, 7))
    again, _ = thicken(sparse(hidden, planes), IGNORE, planes, (7, 7, 7))
    assert np.array_equal(thick, again)
    (slab,) = slabs
    assert slab.start <= 9 < slab.stop and slab.stop - slab.start == 3
    for index in range(20):
        expected = dense[9] if slab.start <= index < slab.stop else np.full((20, 20), IGNORE)
        assert np.array_equal(thick[index], expected)


def test_true_planes_win_where_slabs_cross() -> None:
    dense = organ((24, 24, 24), 5)
    planes = Planes(((12,), (10,), (11,)))
    label = sparse(dense, planes)
    thick, _ = thicken(label, IGNORE, planes, (8, 8, 8))
    assert np.array_equal(thick[label != IGNORE], label[label != IGNORE])
    assert (thick != IGNORE).sum() > (label != IGNORE).sum()


def test_nothing_changes_where_nothing_is_resampled() -> None:
    planes = Planes(((2, 3), (), (0,)))
    label = sparse(organ((9, 10, 11), 1), planes)
    thick, slabs = thicken(label, IGNORE, planes, label.shape)
    assert np.array_equal(thick, label)
    assert [(s.axis, s.first, s.last, s.start, s.stop) for s in slabs] == [(0, 2, 3, 2, 4), (2, 0, 0, 0, 1)]


def test_refined_plane_with_intricate_borders_is_doubled() -> None:
    """A checkerboard of classes loses its borders to the ignored neighbours when the axis is refined by 10 %."""
    label = np.full((9, 20, 20), IGNORE, dtype=np.int16)
    label[4] = np.indices((20, 20)).sum(0) % 2  # the nearest sample is 0.45 slices away
    shape, spacing = (10, 22, 22), (1.0, 1.0, 1.0)
    target = tuple(s * a / b for s, a, b in zip(spacing, label.shape, shape))
    planes = Planes(((4,), (), ()))
    assert not find_planes(resample(label, spacing, target), IGNORE)
    thick, slabs = thicken(label, IGNORE, planes, shape)
    assert slabs[0].stop - slabs[0].start == 2
    assert find_planes(resample(thick, spacing, target), IGNORE).indices[0]


@settings(max_examples=100, deadline=None)
@given(old=st.integers(1, 60), factor=st.floats(1, 6), first=st.integers(0, 59), length=st.integers(1, 4))
def test_slab_holds_its_run_and_a_sample_between_its_outer_slices(old, factor, first, length) -> None:
    first = min(first, old - 1)
    last = min(first + length - 1, old - 1)
    new = max(1, round(old / factor))
    start, stop = slab_for(first, last, old, new)
    assert 0 <= start <= first and last < stop <= old
    samples = sample_positions(old, new)
    assert ((samples >= start - 1e-5) & (samples <= stop - 1 + 1e-5)).any()


def test_hand_computed_slabs() -> None:
    assert list(sample_positions(6, 3)) == [0.5, 2.5, 4.5]
    assert slab_for(3, 3, 6, 3) == (2, 4)  # slices 2 and 3 surround the sample 2.5; 3 and 4 hold none
    assert slab_for(3, 4, 6, 3) == (2, 5)
    assert slab_for(5, 5, 6, 6) == (5, 6)
    assert slab_for(0, 0, 10, 2) == (0, 5)  # samples 2 and 7
