"""Planes are found where whole slices are annotated, and nowhere else."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.rada.annotation.planes import (
    Planes,
    consecutive_runs,
    find_planes,
    on_planes,
    scribbled,
)

IGNORE = 3


def with_planes(shape: tuple[int, ...], *indices: list[int], value: int = 0) -> np.ndarray:
    """All ignore but the given slices of axis 0, 1, 2."""
    label = np.full(shape, IGNORE, dtype=np.int16)
    for axis, slices in enumerate(indices):
        label[(slice(None),) * axis + (slices,)] = value
    return label


def test_one_plane_on_each_axis() -> None:
    planes = find_planes(with_planes((20, 22, 24), [5], [7], [23]), IGNORE)
    assert planes == Planes(((5,), (7,), (23,)))
    assert planes and planes.axes == (0, 1, 2) and planes.count == 3
    assert planes.describe() == "axis0 [5]  axis1 [7]  axis2 [23]"


def test_nothing_annotated_is_no_plane() -> None:
    planes = find_planes(np.full((8, 9, 10), IGNORE), IGNORE)
    assert not planes and planes.axes == () and planes.describe() == "axis0 []  axis1 []  axis2 []"


def test_dense_label_has_planes_everywhere() -> None:
    planes = find_planes(np.zeros((4, 5, 6), dtype=np.int8), IGNORE)
    assert planes.indices == (tuple(range(4)), tuple(range(5)), tuple(range(6)))
    assert planes.describe() == "axis0 [0-3]  axis1 [0-4]  axis2 [0-5]"


@pytest.mark.parametrize(("missing", "found"), [(20, True), (21, False)])
def test_plane_needs_95_percent(missing: int, found: bool) -> None:
    label = with_planes((10, 20, 20), [4])
    label[4].reshape(-1)[:missing] = IGNORE  # of 400
    assert (find_planes(label, IGNORE).indices[0] == (4,)) is found


def test_outside_of_the_body_counts_as_annotated_but_makes_no_plane_of_its_own() -> None:
    label = with_planes((10, 12, 14), [4])
    label[4, :6] = -1  # half of the plane is air
    label[0] = -1  # a slice of air
    assert find_planes(label, IGNORE) == Planes(((4,), (), ()))
    label[0, 3, 3] = 1  # with one labelled voxel it is annotated
    assert find_planes(label, IGNORE).indices[0] == (0, 4)


def test_thick_crossing_slabs_do_not_make_planes_of_what_is_between() -> None:
    """Two axes annotated at 16 of 20 slices leave 4 % of a slice of the third free: it is still no plane."""
    slabs = [i for i in range(20) if i % 5]
    label = with_planes((20, 20, 20), slabs, slabs, [7])
    assert (label[:, :, 3] != IGNORE).mean() == pytest.approx(0.96)
    assert find_planes(label, IGNORE) == Planes((tuple(slabs), tuple(slabs), (7,)))


def test_incomplete_plane_among_crossing_slabs_is_a_plane() -> None:
    slabs = [i for i in range(20) if i % 5]
    label = with_planes((40, 20, 40), [], slabs, [])
    label[7, :-1] = 1  # without its last row of 20, i.e. without 5 %
    label[7, :, :4] = 1
    assert find_planes(label, IGNORE).indices[0] == (7,)


def test_scribbles_are_neither_on_a_plane_nor_beside_one() -> None:
    label = with_planes((10, 12, 14), [4])
    label[7, 2:5, 3] = 1
    label[5, 1, 1] = 1  # of a thick plane, frayed by resampling
    label[8, 0, 0] = -1  # nobody drew this
    planes = find_planes(label, IGNORE)
    assert planes == Planes(((4,), (), ()))
    assert sorted(map(tuple, np.argwhere(scribbled(label, IGNORE, planes)))) == [(7, 2, 3), (7, 3, 3), (7, 4, 3)]


def test_two_dimensional_label_is_refused() -> None:
    with pytest.raises(ValueError, match="3-D configuration"):
        find_planes(np.zeros((4, 4)), IGNORE)


@given(st.sets(st.integers(-5, 40)))
def test_runs_of_neighbours(indices: set[int]) -> None:
    runs = consecutive_runs(indices)
    assert sorted(indices) == [i for first, last in runs for i in range(first, last + 1)]
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(runs))  # none of them can be joined


def test_runs_by_hand() -> None:
    assert consecutive_runs(()) == []
    assert consecutive_runs((9, 1, 2, 5, 7, 8)) == [(1, 2), (5, 5), (7, 9)]


def test_shifted_and_described_runs() -> None:
    planes = Planes(((1, 2, 3, 7), (4, 5), ()))
    assert planes.describe() == "axis0 [1-3,7]  axis1 [4,5]  axis2 []"
    assert planes.shifted((10, 0, 3)) == Planes(((11, 12, 13, 17), (4, 5), ()))


_indices = st.lists(st.integers(0, 11), max_size=3, unique=True)


@settings(max_examples=60, deadline=None)
@given(first=_indices, second=_indices, third=_indices, values=st.integers(0, 2**31))
def test_finds_exactly_the_planes_that_were_drawn(first, second, third, values) -> None:
    """Shapes are large enough that few planes never add up to 95 % of a slice they do not hold."""
    drawn = with_planes((12, 13, 14), first, second, third)
    random = np.random.RandomState(values).randint(0, 3, drawn.shape)
    label = np.where(drawn == IGNORE, IGNORE, random)
    planes = find_planes(label, IGNORE)
    assert planes == Planes((tuple(sorted(first)), tuple(sorted(second)), tuple(sorted(third))))
    assert np.array_equal(on_planes(label.shape, planes), label != IGNORE)
    assert not scribbled(label, IGNORE, planes).any()
