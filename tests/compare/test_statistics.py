"""Pairs, intervals and conclusions, against numbers made by hand and simulated experiments."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from scipy import stats

from nnunetv2_ext.compare import collect, statistics
from nnunetv2_ext.compare.collect import Scores, common_cases
from nnunetv2_ext.compare.runs import Arm, Repeat
from nnunetv2_ext.compare.statistics import NO_INTERVAL, bootstrap_interval, paired_difference, verdict
from nnunetv2_ext.evaluate.folder import Source
from nnunetv2_ext.evaluate.metrics import Rules
from nnunetv2_ext.evaluate.structures import Labels, Structure

A, B = Structure("a", (1,)), Structure("b", (2,))


def scores_of(*arms: np.ndarray, labels=None, metric="dice", folds=None, structures=(A,)) -> Scores:
    """Arms as (repeats, cases) or (repeats, cases, structures)."""
    arrays = [np.asarray(a, dtype=float) for a in arms]
    arrays = [a[..., None] if a.ndim == 2 else a for a in arrays]
    cases = arrays[0].shape[1]
    names = labels or [[f"seed {i}" for i in range(len(a))] for a in arrays]
    source = Source(Labels(tuple(structures)), Rules((metric,), {s.name: 1.0 for s in structures}))
    states = [np.full(a.shape, "found") for a in arrays]
    return Scores(
        [Arm(f"arm{i}", [Repeat(label, {}) for label in some]) for i, some in enumerate(names)],
        [f"case{i}" for i in range(cases)], folds or ["0"] * cases, source, states, {metric: arrays}, [],
    )  # fmt: skip


def test_the_unit_is_a_case_averaged_over_repeats() -> None:
    plain = [[0.5, 0.7, 0.9], [0.7, 0.7, 0.7]]
    ours = [[0.8, 0.7, 0.8], [0.8, 0.7, 0.8]]
    d = paired_difference(scores_of(plain, ours, folds=["0", "0", "1"]), 1, "dice", 0)
    assert d.per_case == pytest.approx([0.2, 0, 0]) and d.mean == pytest.approx(0.2 / 3)
    assert (d.n, d.wins, d.losses, d.ties) == (3, 1, 0, 2)
    assert d.by_repeat == pytest.approx({"seed 0": 0.2 / 3, "seed 1": 0.2 / 3})
    assert d.by_fold == pytest.approx({"0": 0.1, "1": 0})


def test_copies_of_a_repeat_are_no_further_patients() -> None:
    generator = np.random.default_rng(0)
    plain, ours = generator.uniform(0.5, 1, (2, 1, 20))
    once = paired_difference(scores_of(plain, ours), 1, "dice", 0)
    thrice = paired_difference(scores_of(np.repeat(plain, 3, 0), np.repeat(ours, 3, 0)), 1, "dice", 0)
    assert thrice.n == once.n == 20
    assert (thrice.interval.low, thrice.interval.high) == pytest.approx((once.interval.low, once.interval.high))


def test_lower_is_better_for_distances() -> None:
    d = paired_difference(scores_of([[5.0, 4.0, 3.0, 6.0]], [[2.0, 3.0, 2.5, 1.0]], metric="hd95"), 1, "hd95", 0)
    assert d.wins == 4 and d.mean < 0 and d.sign == 1 and d.direction == "better"


def test_the_mean_over_structures_is_a_column_of_its_own() -> None:
    plain = np.array([[[0.5, 0.1], [0.6, math.nan]]])
    ours = np.array([[[0.7, 0.1], [0.6, math.nan]]])
    scores = scores_of(plain, ours, structures=(A, B))
    assert scores.columns == ["a", "b", "mean of structures"]
    assert paired_difference(scores, 1, "dice", 1).n == 1
    assert paired_difference(scores, 1, "dice", 2).per_case == pytest.approx([0.1, 0.0])
    assert [d.column for d in statistics.all_differences(scores)] == ["mean of structures", "a", "b"]


@given(some.arrays(float, st.integers(2, 30), elements=st.floats(-1, 1)))
@settings(max_examples=15, deadline=None)
def test_an_interval_is_ordered_repeatable_and_within_the_data(values: np.ndarray) -> None:
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    assert values.min() - 1e-9 <= interval.low <= interval.high <= values.max() + 1e-9


def test_no_interval_from_one_case_and_none_around_a_constant() -> None:
    assert bootstrap_interval(np.array([0.3])) is NO_INTERVAL and bootstrap_interval(np.array([])) is NO_INTERVAL
    constant = bootstrap_interval(np.full(9, 0.25))
    assert (constant.low, constant.high) == (0.25, 0.25) and constant.excludes_zero
    assert not NO_INTERVAL.excludes_zero


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        interval = bootstrap_interval(generator.normal(0.1, 0.2, 30))
        hits += interval.low <= 0.1 <= interval.high
    assert hits >= 51  # 57 expected; 50 or fewer has a probability below 0.005 at 95 % and is likely below 80 %


def test_the_interval_over_repeats_is_students() -> None:
    plain = np.array([[0.70] * 12, [0.72] * 12, [0.71] * 12])
    ours = np.array([[0.80] * 12, [0.80] * 12, [0.84] * 12])
    d = paired_difference(scores_of(plain, ours), 1, "dice", 0)
    differences = np.array([0.10, 0.08, 0.13])
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert d.paired_repeats and (d.repeat_interval.low, d.repeat_interval.high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half)
    )
    # repeats without common names: nothing to pair
    d = paired_difference(
        scores_of(plain, ours, labels=[["r0", "r1", "r2"], ["seed 0", "seed 1", "seed 2"]]), 1, "dice", 0
    )
    assert not d.paired_repeats and d.by_repeat["seed 2"] == pytest.approx(0.13)
    assert d.repeat_interval.low < 0.31 / 3 < d.repeat_interval.high
    assert d.agreeing == (9, 9)
    one = paired_difference(scores_of(plain[:1], ours[:1]), 1, "dice", 0)
    assert one.repeat_interval is NO_INTERVAL


def conclusion(plain, ours, **options) -> str:
    return verdict(paired_difference(scores_of(plain, ours, **options), 1, "dice", 0), "new", "old")


def test_conclusions_tell_the_kinds_of_chance_apart() -> None:
    cases = np.random.default_rng(2).uniform(0.6, 0.8, 20)
    small = np.random.default_rng(3).normal(0, 0.01, 20)
    assert "No difference beyond chance" in conclusion([cases], [cases + small - small.mean()])
    assert "Better on these cases, for these two trainings" in conclusion([cases], [cases + 0.1 + small])
    assert "Worse on these cases, for these two trainings" in conclusion([cases], [cases - 0.1 + small])
    certain = conclusion([cases] * 3, [cases + 0.1, cases + 0.11, cases + 0.105 + small])
    assert "Better, beyond chance in cases and in training" in certain
    assert "in all 2 pairs of trainings**, but the repeats are too few" in conclusion(
        [cases] * 2, [cases + 0.02, cases + 0.2]
    )
    assert "not in every pair of trainings** (1 of 2 agree)" in conclusion(
        [cases] * 2, [cases - 0.02, cases + 0.2 + small]
    )
    assert "Equal in every case" in conclusion([cases], [cases])
    assert "itself rough" in conclusion([cases[:6]], [cases[:6] + 0.1 + small[:6]])
    assert "Too few cases to conclude anything**: 4" in conclusion([cases[:4]], [cases[:4] + 0.1])
    assert "single case" in conclusion([cases[:1]], [cases[:1] + 0.1])
    nothing = np.full((1, 3), math.nan)
    assert "nothing can be said" in conclusion(nothing, nothing)


def test_luck_of_the_training_is_not_taken_for_an_effect() -> None:
    """Two trainers that are the same, networks that scatter: the cases alone are certain, the repeats are not."""
    generator = np.random.default_rng(4)
    cases = generator.uniform(0.6, 0.8, 30)
    claims = 0
    for _ in range(30):
        arms = [[cases + generator.normal(0, 0.05) + generator.normal(0, 0.005, 30) for _ in range(3)] for _ in "ab"]
        d = paired_difference(scores_of(*arms), 1, "dice", 0)
        assert d.interval.excludes_zero or abs(d.mean) < 0.01
        claims += "beyond chance in cases and in training" in verdict(d, "new", "old")
    assert claims <= 5  # 1.5 expected at 5 %; more than 5 has a probability of 0.3 %


def test_a_reference_that_scatters_is_seen_without_common_seeds() -> None:
    names = [["r0", "r1"], ["seed 0", "seed 1"]]
    d = paired_difference(scores_of([[0.5] * 9, [0.2] * 9], [[0.45] * 9, [0.47] * 9], labels=names), 1, "dice", 0)
    assert d.direction == "better" and d.agreeing == (4, 2) and not d.repeat_interval.excludes_zero
    assert "not in every pair of trainings" in verdict(d, "new", "old")


def test_a_structure_that_is_rightly_left_out_beats_an_invented_one() -> None:
    nan = math.nan
    states = [np.array([[["absent"], ["absent"], ["found"]]]), np.array([[["invented"], ["absent"], ["missed"]]])]
    values = [np.array([[[nan], [nan], [0.8]]]), np.array([[[0.0], [nan], [0.0]]])]
    first, second = common_cases(values, states, higher=True)
    assert first.ravel() == pytest.approx([1, nan, 0.8], nan_ok=True)
    assert second.ravel() == pytest.approx([0, nan, 0], nan_ok=True)
    distances = [np.array([[[nan], [nan], [2.0]]]), np.array([[[30.0], [nan], [nan]]])]
    first, second = common_cases(distances, states, higher=False)
    # the third has no distance in one arm (--empty leave-out) and counts for neither
    assert first.ravel() == pytest.approx([0, nan, nan], nan_ok=True)
    assert second.ravel() == pytest.approx([30, nan, nan], nan_ok=True)
    assert "rightly left it out" in collect.COMMON_RULE
