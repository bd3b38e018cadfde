"""Pairs, intervals and conclusions, against numbers made by hand and simulated experiments."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from scipy import stats

from nnunetv2_ext.compare import scores, statistics
from nnunetv2_ext.compare.arms import Arm, Repeat
from nnunetv2_ext.compare.scores import Scores, common_values
from nnunetv2_ext.compare.statistics import headline, paired_difference, verdict
from nnunetv2_ext.evaluate.folder import MEAN, Source
from nnunetv2_ext.evaluate.intervals import NO_INTERVAL, bootstrap_interval
from nnunetv2_ext.evaluate.metrics import Rules
from nnunetv2_ext.evaluate.structures import Labels, Structure

A, B = Structure("a", (1,)), Structure("b", (2,))


def scores_of(*arms, labels=None, metrics=("dice",), folds=None, structures=(A,), subjects=None) -> Scores:
    """Arms as (repeats, cases) or (repeats, cases, structures) or (repeats, cases, structures, metrics)."""
    arrays = [np.asarray(a, dtype=float) for a in arms]
    arrays = [a.reshape(*a.shape, *[1] * (4 - a.ndim)) for a in arrays]
    names = labels or [[f"seed {i}" for i in range(len(a))] for a in arrays]
    source = Source(Labels(tuple(structures)), Rules(tuple(metrics), {s.name: 1.0 for s in structures}))
    rows = [
        {"arm": f"arm{a}", "repeat": names[a][r], "fold": folds[c] if folds else "0", "case": f"case{c}"}
        | ({"subject": subjects[c]} if subjects else {})
        | {"structure": structures[s].name, "state": "found", "metric": metrics[m], "value": array[r, c, s, m]}
        for a, array in enumerate(arrays)
        for r, c, s, m in np.ndindex(array.shape)
    ]
    table = pd.DataFrame(rows)
    files = table.drop(columns=["structure", "state", "metric", "value"]).drop_duplicates()
    files = files.assign(spacing=[(1.0, 1.0, 1.0)] * len(files), spacing_known=True, remark="")
    given = [Arm(f"arm{i}", [Repeat(label, {}) for label in some]) for i, some in enumerate(names)]
    return Scores(source, table, files, arms=given)


def difference_of(*arms, metric="dice", structure="a", **options) -> statistics.Difference:
    """Of the second arm."""
    return paired_difference(scores_of(*arms, metrics=(metric,), **options), "arm1", metric, structure)


def test_the_unit_is_a_case_averaged_over_repeats() -> None:
    plain = [[0.5, 0.7, 0.9], [0.7, 0.7, 0.7]]
    ours = [[0.8, 0.7, 0.8], [0.8, 0.7, 0.8]]
    d = difference_of(plain, ours, folds=["0", "0", "1"])
    assert d.per_case.tolist() == pytest.approx([0.2, 0, 0]) and d.mean == pytest.approx(0.2 / 3)
    assert (d.n, d.wins, d.losses, d.ties) == (3, 1, 0, 2)
    assert d.by_repeat == pytest.approx({"seed 0": 0.2 / 3, "seed 1": 0.2 / 3})
    assert d.by_fold == pytest.approx({"0": 0.1, "1": 0})


def test_copies_of_a_repeat_are_no_further_patients() -> None:
    generator = np.random.default_rng(0)
    plain, ours = generator.uniform(0.5, 1, (2, 1, 20))
    once = difference_of(plain, ours)
    thrice = difference_of(np.repeat(plain, 3, 0), np.repeat(ours, 3, 0))
    assert thrice.n == once.n == 20
    assert (thrice.interval.low, thrice.interval.high) == pytest.approx((once.interval.low, once.interval.high))


def test_lower_is_better_for_distances() -> None:
    d = difference_of([[5.0, 4.0, 3.0, 6.0, 7.0]], [[2.0, 3.0, 2.5, 1.0, 3.0]], metric="hd95")
    assert d.wins == 5 and d.mean < 0 and d.direction == "better"


def test_the_mean_over_structures_is_a_column_of_its_own() -> None:
    plain = np.array([[[0.5, 0.1], [0.6, math.nan]]])
    ours = np.array([[[0.7, 0.1], [0.6, math.nan]]])
    both = scores_of(plain, ours, structures=(A, B))
    assert both.columns == ["a", "b", MEAN] == ["a", "b", "mean of structures"]
    assert paired_difference(both, "arm1", "dice", "b").n == 1
    assert paired_difference(both, "arm1", "dice", MEAN).per_case.tolist() == pytest.approx([0.1, 0.0])
    assert [d.structure for d in statistics.all_differences(both)] == ["mean of structures", "a", "b"]


@given(some.arrays(float, st.integers(2, 30), elements=st.floats(-1, 1)))
@settings(max_examples=15, deadline=None)
def test_an_interval_is_ordered_repeatable_and_within_the_data(drawn: np.ndarray) -> None:
    values = pd.Series(drawn)
    interval = bootstrap_interval(values)
    assert interval == bootstrap_interval(values)
    assert values.min() - 1e-9 <= interval.low <= interval.high <= values.max() + 1e-9


def test_no_interval_from_one_case_and_none_around_a_constant() -> None:
    assert (
        bootstrap_interval(pd.Series([0.3])) is NO_INTERVAL
        and bootstrap_interval(pd.Series([], dtype=float)) is NO_INTERVAL
    )
    constant = bootstrap_interval(pd.Series([0.25] * 9))
    assert (constant.low, constant.high) == (0.25, 0.25) and constant.excludes_zero
    assert not NO_INTERVAL.excludes_zero


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        interval = bootstrap_interval(pd.Series(generator.normal(0.1, 0.2, 30)))
        hits += interval.low <= 0.1 <= interval.high
    assert hits >= 51  # 57 expected; 50 or fewer has a probability below 0.005 at 95 % and is likely below 80 %


def test_the_interval_over_repeats_is_students() -> None:
    plain = np.array([[0.70] * 12, [0.72] * 12, [0.71] * 12])
    ours = np.array([[0.80] * 12, [0.80] * 12, [0.84] * 12])
    d = difference_of(plain, ours)
    differences = np.array([0.10, 0.08, 0.13])
    half = stats.t.ppf(0.975, 2) * differences.std(ddof=1) / math.sqrt(3)
    assert d.paired_repeats and (d.repeat_interval.low, d.repeat_interval.high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half)
    )
    # repeats without common names: nothing to pair
    d = difference_of(plain, ours, labels=[["r0", "r1", "r2"], ["seed 0", "seed 1", "seed 2"]])
    assert not d.paired_repeats and d.by_repeat["seed 2"] == pytest.approx(0.13)
    welch = stats.ttest_ind(ours[:, 0], plain[:, 0], equal_var=False).confidence_interval()
    assert (d.repeat_interval.low, d.repeat_interval.high) == pytest.approx((welch.low, welch.high))
    assert d.agreeing == (9, 9)
    one = difference_of(plain[:1], ours[:1])
    assert one.repeat_interval is NO_INTERVAL


def conclusion(plain, ours, **options) -> str:
    return verdict(difference_of(plain, ours, **options))


def test_conclusions_tell_the_kinds_of_chance_apart() -> None:
    cases = np.random.default_rng(2).uniform(0.6, 0.8, 20)
    small = np.random.default_rng(3).normal(0, 0.01, 20)
    assert "No difference in Dice beyond chance" in conclusion([cases], [cases + small - small.mean()])
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
    assert "Equal Dice in every case" in conclusion([cases], [cases])
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
        d = difference_of(*arms)
        assert d.interval.excludes_zero or abs(d.mean) < 0.01
        claims += "beyond chance in cases and in training" in verdict(d)
    assert claims <= 5  # 1.5 expected at 5 %; more than 5 has a probability of 0.3 %


def test_a_reference_that_scatters_is_seen_without_common_seeds() -> None:
    names = [["r0", "r1"], ["seed 0", "seed 1"]]
    d = difference_of([[0.5] * 9, [0.2] * 9], [[0.45] * 9, [0.47] * 9], labels=names)
    assert d.direction == "better" and d.agreeing == (4, 2) and not d.repeat_interval.excludes_zero
    assert "not in every pair of trainings" in verdict(d)


def test_a_structure_that_is_rightly_left_out_beats_an_invented_one() -> None:
    nan = math.nan
    states = [["absent", "absent", "found"], ["invented", "absent", "missed"]]

    def common(metric: str, *values: list[float]) -> list:
        rows = [
            {"arm": a, "case": c, "structure": "a", "state": states[a][c], "metric": metric, "value": values[a][c]}
            for a, c in np.ndindex(2, 3)
        ]
        return common_values(pd.DataFrame(rows)).tolist()

    found = common("dice", [nan, nan, 0.8], [0.0, nan, 0.0])
    assert found == pytest.approx([1, nan, 0.8, 0, nan, 0], nan_ok=True)
    # the third has no distance in one arm (--empty leave-out) and counts for neither
    found = common("hd95", [nan, nan, 2.0], [30.0, nan, nan])
    assert found == pytest.approx([0, nan, nan, 30, nan, nan], nan_ok=True)
    assert "rightly left it out" in scores.COMMON_RULE


# --- subjects


def test_subjects_are_drawn_with_all_of_their_cases() -> None:
    """Cases copied within a subject are no further patients: the interval stays as wide as without the copies."""
    values = np.random.default_rng(5).normal(0.02, 0.05, 12)
    once = bootstrap_interval(pd.Series(values))
    copied, owners = pd.Series(np.repeat(values, 4)), pd.Series(np.repeat(np.arange(12), 4))
    grouped = bootstrap_interval(copied, owners)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    alone = bootstrap_interval(copied)
    assert alone.high - alone.low < 0.6 * (once.high - once.low)  # half as wide: four times as many "cases"


def test_a_subject_with_more_cases_weighs_more() -> None:
    """The interval is one of the mean over cases: drawn subjects bring all of their cases into sum and number."""
    values = pd.Series([0.1, 0.1, 0.1, -0.2, 0.3, 0.05, 0.0])
    owners = pd.Series(["p", "p", "p", "q", "r", "s", "t"])
    found = bootstrap_interval(values, owners)
    generator = np.random.default_rng(0)
    members = [values[owners == o].to_numpy() for o in "pqrst"]
    draws = [np.concatenate([members[i] for i in generator.integers(0, 5, 5)]).mean() for _ in range(4000)]
    low, high = np.percentile(draws, (2.5, 97.5))
    assert found.low == pytest.approx(low, abs=0.03) and found.high == pytest.approx(high, abs=0.03)


def test_few_subjects_are_few_however_many_cases_they_have() -> None:
    plain = np.random.default_rng(6).uniform(0.5, 0.6, (1, 12))
    owners = ["p", "q", "r", "s"] * 3
    d = difference_of(plain, plain + 0.1 + plain / 10, subjects=owners)
    assert (d.n, d.units, d.unit) == (12, 4, "subjects")
    assert d.interval.excludes_zero and d.direction == "unclear"
    assert "Too few subjects to conclude anything**: 4" in verdict(d)
    assert headline([d]) == "Too few subjects to conclude anything (4)"
    assert "over cases" in verdict(difference_of(plain, plain + 0.1)) and "over 4 subjects" in verdict(d)


# --- the answer in words


def test_the_answer_covers_all_metrics() -> None:
    generator = np.random.default_rng(7)
    dice, hd95 = generator.uniform(0.7, 0.8, 20), generator.uniform(1, 3, 20)
    noise = generator.normal(0, 0.01, 20)
    noise -= noise.mean()

    def sentence(dice_gain, hd95_gain, nsd_gain=0 * noise) -> str:
        plain = np.stack([dice, hd95, dice], -1)[None, :, None]
        ours = np.stack([dice + dice_gain, hd95 + hd95_gain, dice + nsd_gain], -1)[None, :, None]
        return headline(statistics.all_differences(scores_of(plain, ours, metrics=("dice", "hd95", "nsd"))))

    assert re.fullmatch(
        r"No difference in Dice and NSD; HD95 worse by 0\.41 mm \[0\.3\d, 0\.4\d\]", sentence(noise, 0.41 + 10 * noise)
    )
    assert re.fullmatch(
        r"Dice worse by 0\.100 \[0\.09\d, 0\.10\d\]; no difference in HD95; NSD better by 0.020 \[0.020, 0.020\]",
        sentence(noise - 0.1, noise, np.full(20, 0.02)),
    )


def test_trainings_without_any_spread_are_not_evidence() -> None:
    cases = np.random.default_rng(8).uniform(0.6, 0.8, 20)
    d = difference_of([cases] * 3, [cases + 0.1 + cases / 20] * 3)
    assert d.repeat_interval is NO_INTERVAL and "beyond chance in cases and in training" not in verdict(d)
