"""Which planes and cases a simulated annotator labels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nnunetv2_ext.data.subjects import subjects_by_regex
from nnunetv2_ext.rada.annotation.choose import choose_planes, draw_cases
from nnunetv2_ext.rada.annotation.planes import Planes


def two_classes() -> np.ndarray:
    """Class 1 in 2..5 of axis 0, most in slice 3; class 2 joins it in slice 5 with a single voxel."""
    label = np.zeros((10, 12, 14), dtype=np.int16)
    label[2:6, 4:6, 4:6] = 1
    label[3, 2:9, 2:9] = 1
    label[5, 11, 13] = 2
    return label


def test_largest_takes_most_classes_first() -> None:
    assert choose_planes(two_classes(), (0,), "largest") == Planes(((5,), (), ()))
    only_one = np.where(two_classes() == 2, 0, two_classes())
    assert choose_planes(only_one, (0,), "largest") == Planes(((3,), (), ()))


def test_middle_of_the_extent_on_each_axis() -> None:
    only_one = np.where(two_classes() == 2, 0, two_classes())
    assert choose_planes(only_one, (0, 1, 2), "middle") == Planes(((3,), (5,), (5,)))


def test_several_planes_on_an_axis_are_spread() -> None:
    label = np.zeros((20, 8, 8), dtype=np.int16)
    label[4:16, 2:5, 2:5] = 1
    planes = choose_planes(label, (0, 0, 0), "middle").indices[0]
    assert planes == (5, 9, 13)


def test_more_planes_than_the_organ_is_thick_take_its_neighbours() -> None:
    label = np.zeros((5, 8, 8), dtype=np.int16)
    label[4, 2:5, 2:5] = 1
    assert choose_planes(label, (0, 0, 0), "largest").indices[0] == (2, 3, 4)


def test_more_planes_than_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="6 planes are asked for on axis 0, which has 5 slices"):
        choose_planes(np.ones((5, 8, 8)), (0,) * 6, "largest")


def test_empty_label_and_unknown_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="without foreground"):
        choose_planes(np.zeros((5, 5, 5)), (0,), "largest")
    with pytest.raises(ValueError, match="largest or middle"):
        choose_planes(np.ones((5, 5, 5)), (0,), "best")


CASES = [f"s{n // 2}_{n}" for n in range(20)]


def test_draws_are_seeded_nested_and_exact() -> None:
    draws = [set(draw_cases(CASES, n, 3)) for n in range(1, 20)]
    assert [len(d) for d in draws] == list(range(1, 20))
    assert all(a < b for a, b in pairwise(draws))
    assert draws[4] == set(draw_cases(CASES[::-1], 5, 3)) != set(draw_cases(CASES, 5, 4))


def test_subjects_are_drawn_whole() -> None:
    subjects = subjects_by_regex(CASES, r"^(s\d+)_")
    drawn = draw_cases(CASES, 6, 0, subjects)
    assert len(drawn) == 6 and len({subjects[c] for c in drawn}) == 3
    with pytest.raises(ValueError, match=r"7 cases of whole subjects .* ask for fewer"):
        draw_cases(CASES, 7, 0, subjects)


def test_unusable_cases_and_their_subjects_are_passed_over() -> None:
    assert set(draw_cases(CASES, 10, 0, usable=lambda case: int(case.split("_")[1]) % 2 == 1)) == set(CASES[1::2])
    subjects = subjects_by_regex(CASES, r"^(s\d+)_")
    assert not any(c.startswith("s3_") for c in draw_cases(CASES, 18, 0, subjects, lambda case: case != "s3_6"))
    with pytest.raises(ValueError, match="only 10 of 20"):
        draw_cases(CASES, 11, 0, usable=lambda case: case in CASES[:10])


def test_cases_without_foreground_are_not_a_matter_of_number() -> None:
    with pytest.raises(ValueError, match=r"none of the 20 cases has foreground, .*check the labels"):
        draw_cases(CASES, 1, 0, usable=lambda case: False)
