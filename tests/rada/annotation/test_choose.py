"""Which planes and cases a simulated annotator labels."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_ext.rada.annotation.choose import choose_planes, draw_cases, subjects_of
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
    subjects = subjects_of(CASES, regex=r"^(s\d+)_")
    drawn = draw_cases(CASES, 6, 0, subjects)
    assert len(drawn) == 6 and len({subjects[c] for c in drawn}) == 3
    with pytest.raises(ValueError, match=r"7 cases of whole subjects .* ask for fewer"):
        draw_cases(CASES, 7, 0, subjects)


def test_unusable_cases_and_their_subjects_are_passed_over() -> None:
    assert set(draw_cases(CASES, 10, 0, usable=lambda case: int(case.split("_")[1]) % 2 == 1)) == set(CASES[1::2])
    subjects = subjects_of(CASES, regex=r"^(s\d+)_")
    assert not any(c.startswith("s3_") for c in draw_cases(CASES, 18, 0, subjects, lambda case: case != "s3_6"))
    with pytest.raises(ValueError, match="only 10 of 20"):
        draw_cases(CASES, 11, 0, usable=lambda case: case in CASES[:10])


def test_subjects_from_a_file_or_an_expression(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(dict.fromkeys(CASES, "one")))
    assert set(subjects_of(CASES, table=file).values()) == {"one"}
    assert subjects_of(CASES) is None
    assert subjects_of(CASES, regex=r"s\d+")["s3_7"] == "s3"


@pytest.mark.parametrize(
    ("regex", "content", "message"),
    [
        ("(", None, "no regular expression"),
        ("^x", None, "gives no subject for 20 cases, e.g. s0_0"),
        ("s", "{}", "not both"),
        (None, "[]", "must hold one object"),
        (None, "{", "cannot be read as JSON"),
        (None, '{"s0_0": "a"}', "no subject for 19 cases, e.g. s0_1"),
    ],
)
def test_unusable_groups_are_refused(tmp_path: Path, regex, content, message) -> None:
    table = None
    if content is not None:
        table = tmp_path / "groups.json"
        table.write_text(content)
    with pytest.raises(ValueError, match=message):
        subjects_of(CASES, regex, table)
