"""Intervals, warnings and tables."""

import math

import numpy as np
import pytest
from scipy import stats

from nnunetv2_ext.adapt.report import Comparison, Pictured, warning, write_csv


def comparison(before: list[float], after: list[float]) -> Comparison:
    return Comparison(
        "new site, fold 0",
        {str(n): {"a": value, "b": value} for n, value in enumerate(before)},
        {str(n): {"a": value, "b": value} for n, value in enumerate(after)},
    )


def test_the_interval_is_students_of_the_paired_differences() -> None:
    before, after = [0.5, 0.6, 0.7], [0.6, 0.62, 0.75]
    mean, low, high = comparison(before, after).difference()
    changes = np.subtract(after, before)
    half = stats.t.ppf(0.975, 2) * changes.std(ddof=1) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((changes.mean(), changes.mean() - half, changes.mean() + half))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([0.5, 0.6, 0.7], [0.6, 0.7, 0.81], None),
        ([0.5, 0.6, 0.7], [0.9, 0.61, 0.69], "within its interval"),
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.61], "within its interval"),
        ([0.5], [0.6], "one case tells nothing"),
        ([0.5], [], None),
    ],
)
def test_a_gain_that_may_be_chance_is_warned_of(before: list[float], after: list[float], words: str | None) -> None:
    said = warning(comparison(before, after))
    assert said is None if words is None else said is not None and words in said


def test_structures_empty_in_both_do_not_count() -> None:
    one = Comparison("old", {"x": {"a": 0.5, "b": math.nan}}, {"x": {"a": 0.7, "b": math.nan}})
    assert one.mean(one.before) == 0.5 and one.difference()[0] == pytest.approx(0.2)
    assert "| b | - | - | - |" in one.table() and "| a | 0.500 | 0.700 | +0.200 |" in one.table()


def test_the_table_of_cases_has_blanks_for_what_is_unknown(tmp_path) -> None:
    write_csv(tmp_path / "dice.csv", {"0": [comparison([0.25], [])]})
    assert (tmp_path / "dice.csv").read_text().splitlines()[1] == '0,"new site, fold 0",0,a,0.25000,'


def test_the_picture_cuts_thick_slices_and_else_along_the_patient() -> None:
    empty = np.zeros((2, 2, 2))
    along_y = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])  # the second axis runs to the head
    one = Pictured("c", empty, empty, empty, None, (1.0, 1.0, 1.0), along_y)
    assert one.axis == 1
    assert Pictured("c", empty, empty, empty, None, (1.0, 1.0, 5.0), along_y).axis == 2
    assert Pictured("c", empty, empty, empty, None, (1.0, 1.0, 1.0)).axis == 0
