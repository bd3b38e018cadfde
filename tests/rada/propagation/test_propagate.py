"""Planes spread to the slices beside them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from nnunetv2_ext.core.processes import usable_cpus
from nnunetv2_ext.rada.annotation.cases import CaseSource, SparseCase
from nnunetv2_ext.rada.propagation import propagate as module
from nnunetv2_ext.rada.propagation.propagate import (
    NONE,
    plane_weight,
    propagate,
    propagate_cases,
    read_propagated,
    voxel_weights,
)

IGNORE = 2


def tube(shape=(14, 40, 44), tilt=0.7):
    """A tube along axis 0 whose centre moves by `tilt` voxels per slice: dense label and image."""
    rows, columns = np.indices(shape[1:])
    dense = np.stack([(rows - 16 - tilt * i) ** 2 + (columns - 20) ** 2 <= 10**2 for i in range(shape[0])]).astype(
        np.int8
    )
    image = gaussian_filter(dense.astype(np.float32), (0, 1, 1)) * 10
    return dense, image + np.random.default_rng(0).normal(size=shape).astype(np.float32) * 0.1


def keep(dense, planes):
    label = np.full_like(dense, IGNORE)
    for axis, indices in enumerate(planes):
        for index in indices:
            where = (slice(None),) * axis + (index,)
            label[where] = dense[where]
    return label


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_tilted_tube_is_followed():
    dense, image = tube()
    planes = ((7,), (), ())
    found = propagate(image, keep(dense, planes), planes, IGNORE, max_distance=4)
    assert found.labels.shape == found.distances.shape == (3, *dense.shape)
    assert found.labels.dtype == found.distances.dtype == np.uint8
    assert found.distances[0, :, 0, 0].tolist() == [NONE] * 3 + [4, 3, 2, 1, 0, 1, 2, 3, 4] + [NONE] * 2
    for index in range(3, 12):
        moved = dice(found.labels[0, index] == 1, dense[index] == 1)
        assert moved > 0.92
        if abs(index - 7) >= 3:
            assert moved > dice(dense[7] == 1, dense[index] == 1) + 0.03, "better than a copy of the plane"
    assert (found.labels[0][[0, 1, 2, 12, 13]] == IGNORE).all()


def test_axes_without_planes_hold_the_annotation_alone():
    dense, image = tube()
    planes = ((7,), (), ())
    label = keep(dense, planes)
    found = propagate(image, label, planes, IGNORE)
    for axis in (1, 2):
        assert np.array_equal(found.labels[axis], label)
        assert np.array_equal(found.distances[axis], np.where(label == IGNORE, NONE, 0))


def test_equal_slices_return_the_mask():
    rng = np.random.default_rng(0)
    image = np.broadcast_to(rng.random((30, 31)), (9, 30, 31))
    plane = (rng.random((30, 31)) > 0.5).astype(np.int8)  # even what opening would erase
    dense = np.broadcast_to(plane, image.shape)
    found = propagate(image, keep(dense, ((4,), (), ())), ((4,), (), ()), IGNORE, max_distance=3)
    assert (found.labels[0][1:8] == plane).all()
    assert (found.labels[0][[0, 8]] == IGNORE).all()


def test_annotation_wins_on_every_axis():
    dense, image = tube()
    planes = ((7,), (15, 16), (21,))
    label = keep(dense, planes)
    label[3, 30:34, 2:6] = 1  # a scribble that contradicts what is carried there
    found = propagate(image, label, planes, IGNORE)
    known = label != IGNORE
    for axis in range(3):
        assert np.array_equal(found.labels[axis][known], label[known])
        assert (found.distances[axis][known] == 0).all()
        assert (found.distances[axis][~known] > 0).all()
        assert np.array_equal(found.labels[axis] == IGNORE, found.distances[axis] == NONE)


def test_the_number_of_threads_changes_nothing(monkeypatch):
    dense, image = tube((9, 40, 44))
    planes = ((4,), (), ())
    first = propagate(image, keep(dense, planes), planes, IGNORE, 3)
    monkeypatch.setattr(module, "usable_cpus", lambda: usable_cpus() % 2 + 1)
    second = propagate(image, keep(dense, planes), planes, IGNORE, 3)
    assert np.array_equal(first.labels, second.labels) and np.array_equal(first.distances, second.distances)


def test_it_stops_where_slices_do_not_look_alike():
    dense, image = tube(tilt=0.0)
    image[9:] = np.random.default_rng(1).normal(size=image[9:].shape)
    planes = ((7,), (), ())
    found = propagate(image, keep(dense, planes), planes, IGNORE, max_distance=5)
    assert found.distances[0, :, 0, 0].tolist() == [NONE, NONE, 5, 4, 3, 2, 1, 0, 1] + [NONE] * 5


@pytest.mark.parametrize("empty", [0.0, 3.0])
def test_it_stops_at_empty_slices(empty):
    dense, image = tube(tilt=0.0)
    image[9:] = empty
    found = propagate(image, keep(dense, ((7,), (), ())), ((7,), (), ()), IGNORE, max_distance=5)
    assert (found.distances[0][9:] == NONE).all() and (found.distances[0][8] == 1).all()


def test_planes_at_the_border_and_empty_planes():
    dense, image = tube(tilt=0.0)
    planes = ((0, 13), (0,), ())  # the second axis's plane holds background only
    found = propagate(image, keep(dense, planes), planes, IGNORE, max_distance=2)
    assert found.distances[0, :, 20, 20].tolist() == [0, 1, 2] + [NONE] * 8 + [2, 1, 0]
    # noise alone does not correlate, so nothing is carried there
    assert set(np.unique(found.distances[1])) <= {0, NONE}
    assert not ((found.labels[1] == 1) & (found.distances[1] > 0)).any()


def test_outside_of_the_body_counts_as_background():
    dense, image = tube(tilt=0.0)
    label = keep(dense, ((7,), (), ()))
    plain = propagate(image, label, ((7,), (), ()), IGNORE)
    label[7][label[7] == 0] = -1
    marked = propagate(image, label, ((7,), (), ()), IGNORE)
    assert np.array_equal(plain.labels, marked.labels)


def test_ignored_pixels_of_a_plane_say_nothing_further_on():
    dense, image = tube(tilt=0.0)
    label = keep(dense, ((7,), (), ()))
    label[7, :3, :20] = IGNORE
    found = propagate(image, label, ((7,), (), ()), IGNORE)
    assert (found.distances[0][5:10, 0, 5] == NONE).all() and (found.labels[0][5:10, 0, 5] == IGNORE).all()


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 39), min_size=1, max_size=6), st.integers(1, 12))
def test_each_slice_belongs_to_the_nearest_plane(planes, max_distance):
    """Against a loop over slices; a tie goes to the lower plane."""
    found = {}
    for plane, step, count in module._walks(sorted(planes), 40, max_distance):
        for number in range(1, count + 1):
            assert plane + step * number not in found
            found[plane + step * number] = plane
    expected = {}
    for index in set(range(40)) - planes:
        nearest = min(planes, key=lambda plane: (abs(plane - index), plane))
        if abs(nearest - index) <= max_distance:
            expected[index] = nearest
    assert found == expected


def test_many_classes_need_wider_numbers():
    dense, image = tube(tilt=0.0)
    label = np.where(dense == 1, 300, 0).astype(np.int16)
    label[:7], label[8:] = 301, 301
    found = propagate(image, label, ((7,), (), ()), 301, max_distance=1)
    assert found.labels.dtype == np.int16 and set(np.unique(found.labels)) == {0, 300, 301}


@pytest.mark.parametrize(
    ("t", "expected"),
    [(0.0, 0.95), (0.1, 0.95), (0.25, 0.8535534), (0.5, 0.5), (0.75, 0.1464466), (1.0, 0.0)],
)
def test_plane_weight(t, expected):
    assert plane_weight(t) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_voxel_weights_against_a_loop(t):
    distances = torch.tensor([[0, 1, 2], [6, 254, 255]], dtype=torch.uint8)
    expected = [[math.nan if d == 255 else plane_weight(t) ** d for d in row] for row in distances.tolist()]
    found = voxel_weights(distances, t)
    torch.testing.assert_close(found, torch.tensor(expected).nan_to_num(0.0))
    assert found.dtype == torch.float32 and found[0, 0] == 1


@pytest.fixture
def cases():
    """Two cases, and the names of those that were read."""
    loaded = []

    def source(name, tilt):
        dense, image = tube((8, 24, 26), tilt)

        def load():
            loaded.append(name)
            return SparseCase(image, keep(dense, ((4,), (), ())), (1.0, 1.0, 1.0))

        return CaseSource(name, ((4,), (), ()), 0, load)

    return [source("a", 0.2), source("b", 0.5)], loaded


def run(cases, root, **changes):
    arguments = {"key": {"plans": "x"}, "ignore": IGNORE, "max_distance": 2, "log": lambda _: None}
    return propagate_cases(cases, root, **{**arguments, **changes})


def test_files_hold_what_is_computed_and_are_made_once(cases, tmp_path):
    sources, loaded = cases
    paths = run(sources, tmp_path)
    assert loaded == ["a", "b"] and list(paths) == ["a", "b"]
    case = sources[0].load()
    expected = propagate(case.image, case.label, ((4,), (), ()), IGNORE, 2)
    found = read_propagated(paths["a"])
    assert found.shape == (2, 3, 8, 24, 26) and found.dtype == np.uint8
    assert np.array_equal(found[0], expected.labels) and np.array_equal(found[1], expected.distances)
    assert np.array_equal(found[:, 0, 2:5, 3:9, :], np.stack((expected.labels, expected.distances))[:, 0, 2:5, 3:9, :])
    loaded.clear()
    assert run(sources, tmp_path) == paths and loaded == []
    assert paths["a"].stat().st_size < expected.labels.nbytes


def test_what_changed_is_computed_again(cases, tmp_path):
    (a, b), loaded = cases
    paths = run([a, b], tmp_path)
    loaded.clear()
    run([replace(a, state=1), b], tmp_path)
    assert loaded == ["a"], "files"
    run([replace(a, state=1), replace(b, planes=((4,), (1,), ()))], tmp_path)
    assert loaded == ["a", "b"], "planes"
    for changes in ({"key": {"plans": "y"}}, {"max_distance": 1}):
        loaded.clear()
        assert run([a], tmp_path, **changes)["a"] != paths["a"] and loaded == ["a"]


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_damaged_file_is_computed_again(cases, tmp_path, content):
    sources, loaded = cases
    path = run(sources[:1], tmp_path)["a"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    loaded.clear()
    run(sources[:1], tmp_path)
    assert loaded == ["a"] and read_propagated(path)[:].shape == (2, 3, 8, 24, 26)


def test_interrupted_run_goes_on(cases, tmp_path):
    (a, b), loaded = cases

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([a, replace(b, load=die)], tmp_path)
    run([a, b], tmp_path)
    assert loaded == ["a", "b"]
