"""Surfaces and distances against hand-made numbers, a slow loop and two independent implementations."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from nnunetv2_ext.evaluate import metrics
from nnunetv2_ext.parts.surface import bounding_box, drop_thin_axes, surface, surface_distances

SPACINGS = st.tuples(*[st.sampled_from((0.3, 0.7, 1.0, 2.5))] * 3)
MASKS = some.arrays(bool, (4, 5, 3), elements=st.booleans())


def slow_surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxel by voxel, in words: a voxel inside with a face neighbour outside, the image's edge included."""
    found = []
    for voxel in map(tuple, np.argwhere(mask)):
        neighbours = [
            tuple(v + step * (a == axis) for a, v in enumerate(voxel)) for axis in range(mask.ndim) for step in (-1, 1)
        ]
        inside = [all(0 <= v < n for v, n in zip(p, mask.shape)) and bool(mask[p]) for p in neighbours]
        if not all(inside):
            found.append(voxel)
    return found


def slow_distances(a: np.ndarray, b: np.ndarray, spacing) -> list[float]:
    """Every pair of surface voxels."""
    points = [np.array(p) * spacing for p in slow_surface(b)]
    return [min(float(np.linalg.norm(np.array(p) * spacing - q)) for q in points) for p in slow_surface(a)]


@given(MASKS)
@settings(max_examples=50, deadline=None)
def test_surface_equals_the_slow_one(mask: np.ndarray) -> None:
    assert sorted(map(tuple, np.argwhere(surface(mask)))) == sorted(slow_surface(mask))


@given(MASKS, MASKS, SPACINGS)
@settings(max_examples=50, deadline=None)
def test_distances_equal_those_of_all_pairs(ours: np.ndarray, theirs: np.ndarray, spacing) -> None:
    to_truth, to_prediction = surface_distances(ours, theirs, spacing)
    if ours.any() and theirs.any():
        assert np.allclose(sorted(to_truth), sorted(slow_distances(ours, theirs, np.array(spacing))))
        assert np.allclose(sorted(to_prediction), sorted(slow_distances(theirs, ours, np.array(spacing))))
    else:
        assert len(to_truth) == len(to_prediction) == 0


@given(MASKS, MASKS, SPACINGS)
@settings(max_examples=30, deadline=None)
def test_swapping_both_swaps_the_distances_and_moving_both_changes_nothing(ours, theirs, spacing) -> None:
    straight, swapped = surface_distances(ours, theirs, spacing), surface_distances(theirs, ours, spacing)
    assert np.array_equal(straight[0], swapped[1]) and np.array_equal(straight[1], swapped[0])
    wide = [np.pad(m, ((3, 1), (2, 2), (0, 4))) for m in (ours, theirs)]
    assert np.allclose(straight[0], surface_distances(*wide, spacing)[0])


def blobs(seed: int, shape=(20, 24, 18)) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping, ragged ellipsoids; the second touches the edge of the image."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    masks = []
    for centre in (generator.uniform(-0.2, 0.2, 3), generator.uniform(0.1, 0.5, 3)):
        radius = np.linalg.norm(grid - centre[:, None, None, None], axis=0)
        masks.append(radius + 0.1 * generator.standard_normal(shape) < generator.uniform(0.4, 0.7))
    return masks[0], masks[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.3, 3.0)])
def test_hd95_and_nsd_equal_monai(seed: int, spacing) -> None:
    pytest.importorskip("monai")
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    ours, theirs = blobs(seed)
    a, b = (torch.from_numpy(m.astype(np.uint8))[None, None] for m in (ours, theirs))
    distances = surface_distances(ours, theirs, spacing)
    expected = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=list(spacing))
    assert metrics.hd95(*distances) == pytest.approx(expected.item(), rel=1e-5)
    for tolerance in (0.0, 1.1, 2.9):
        options = {"include_background": True, "spacing": list(spacing), "use_subvoxels": False}
        expected = compute_surface_dice(a, b, [tolerance], **options)
        assert metrics.nsd(*distances, tolerance) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_hd95_and_nsd_equal_what_simpleitk_gives(seed: int) -> None:
    """SimpleITK's own contour and exact distance map (Maurer), the recipe of its segmentation evaluation notebook."""
    ours, theirs = blobs(seed)
    spacing = (3.0, 1.3, 0.5)  # of the array's axes

    def image(mask: np.ndarray) -> sitk.Image:
        result = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
        result.SetSpacing(spacing[::-1])
        return result

    def directed(a: sitk.Image, b: sitk.Image) -> np.ndarray:
        far = sitk.SignedMaurerDistanceMap(sitk.LabelContour(b), squaredDistance=False, useImageSpacing=True)
        return np.abs(sitk.GetArrayFromImage(far)[sitk.GetArrayFromImage(sitk.LabelContour(a)) > 0])

    expected = directed(image(ours), image(theirs)), directed(image(theirs), image(ours))
    distances = surface_distances(ours, theirs, spacing)
    assert [len(d) for d in distances] == [len(d) for d in expected]
    assert metrics.hd95(*distances) == pytest.approx(max(np.percentile(d, 95) for d in expected), rel=1e-5)
    within = sum(int((d <= 1.05).sum()) for d in expected)
    assert metrics.nsd(*distances, 1.05) == pytest.approx(within / sum(len(d) for d in expected))


def test_a_slice_is_scored_in_its_plane() -> None:
    disc = np.zeros((1, 9, 9), dtype=bool)
    disc[0, 2:7, 2:7] = True
    (flat,), spacing = drop_thin_axes((999.0, 2.0, 1.0), disc)
    assert flat.shape == (9, 9) and spacing == [2.0, 1.0]
    assert surface(flat).sum() == 16  # the outline only; in 3-D all 25 voxels touch the next slice
    assert drop_thin_axes((1, 2, 3), np.ones((1, 1, 1)))[0][0].shape == (1,)


def test_box_is_clipped_to_the_image() -> None:
    mask = np.zeros((5, 6), dtype=bool)
    mask[0, 2:4] = True
    assert bounding_box(mask) == (slice(0, 2), slice(1, 5))


def test_a_border_to_ignored_voxels_is_no_surface() -> None:
    mask = np.zeros((7, 7), dtype=bool)
    mask[1:6, 1:4] = True
    unknown = np.zeros_like(mask)
    unknown[:, 4:] = True  # the structure may go on there
    assert surface(mask)[3, 3] and not surface(mask, unknown)[3, 3]
    assert surface(mask, unknown)[1, 3] and surface(mask, unknown)[3, 1]
    # a structure that only borders on ignored voxels has no surface at all
    unknown = ~mask
    assert [len(d) for d in surface_distances(mask, mask, (1, 1), unknown)] == [0, 0]
