"""Ridge, cross-validation, conformal quantiles, local labels and the alarm against slow counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.estimate.calibration import (
    Calibration,
    Row,
    alarm,
    auc,
    calibrate,
    conformal_quantile,
    fit_line,
    is_outside,
    local_correction,
    out_of_fold,
    quality,
    set_interval,
)
from nnunetv2_ext.estimate.features import NAMES


def rows(number: int, seed: int = 0, structures: tuple[str, ...] = ("a", "b"), noise: float = 0.03) -> list[Row]:
    """Dice that follows the features, two cases a subject."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(number):
        for i, structure in enumerate(structures):
            x = dict(zip(NAMES, rng.normal(size=4)))
            dice = 0.7 - 0.1 * i + 0.08 * x["soft"] - 0.05 * x["ent"] + noise * rng.normal()
            dice = float(np.clip(dice, 0, 1))
            found.append(Row(f"c{n}", f"s{n // 2}", structure, x, dice, hd95=20 * (1 - dice)))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.sampled_from([0.05, 0.1, 0.2]))
def test_the_conformal_rank_is_the_slow_count(residuals: list[float], alpha: float) -> None:
    n = len(residuals)
    # the smallest residual q such that at least (n + 1)(1 - alpha) of n are <= q
    enough = [q for q in sorted(residuals) if sum(r <= q for r in residuals) >= (n + 1) * (1 - alpha) - 1e-9]
    assert conformal_quantile(residuals, alpha) == (enough[0] if enough else None)


def test_eight_cases_have_no_interval_and_nine_have() -> None:
    assert conformal_quantile([0.1] * 8) is None and conformal_quantile([0.1] * 9) == 0.1


def test_intervals_hold_what_they_promise_on_exchangeable_cases() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(2000):
        errors = np.abs(rng.normal(size=41))
        inside.append(errors[-1] <= conformal_quantile(errors[:-1].tolist()))
    assert 0.87 < np.mean(inside) < 0.93


def test_the_line_is_the_slow_ridge() -> None:
    data = rows(30)
    line = fit_line(data, [r.dice for r in data])
    names = np.array([r.structure for r in data])
    x = np.array([[r.features[n] for n in NAMES] for r in data])
    y = np.array([r.dice for r in data])
    z = x - np.array([x[names == s].mean(0) for s in names])
    z = z / z.std(0)
    t = y - np.array([y[names == s].mean() for s in names])

    def loo(penalty: float) -> float:
        errors = []
        for i in range(len(z)):
            keep = np.arange(len(z)) != i
            w = np.linalg.solve(z[keep].T @ z[keep] + penalty * np.eye(4), z[keep].T @ t[keep])
            errors.append((t[i] - z[i] @ w) ** 2)
        return float(np.mean(errors))

    penalty = min(np.logspace(-2, 3, 16), key=loo)
    assert line.slopes == pytest.approx(np.linalg.solve(z.T @ z + penalty * np.eye(4), z.T @ t), abs=1e-8)
    assert line.dice("a", dict.fromkeys(NAMES, 1e3)) in (0.0, 1.0)  # cut to what a Dice can be


def test_no_subject_estimates_itself() -> None:
    data = rows(20, noise=0.0)
    # a feature that names the subject and nothing else: seen in training it would give the Dice away
    rng = np.random.default_rng(1)
    secret = {f"s{n}": float(rng.normal()) for n in range(10)}
    named = [dict.fromkeys(NAMES, 0.0) | {"frag": secret[r.subject]} for r in data]
    shuffled = [Row(r.case, r.subject, r.structure, x, float(rng.uniform())) for r, x in zip(data, named)]
    estimates = out_of_fold(shuffled, [r.dice for r in shuffled])
    assert np.corrcoef(estimates, [r.dice for r in shuffled])[0, 1] < 0.4
    changed = [Row(r.case, r.subject, r.structure, r.features, 0.0 if r.subject == "s3" else r.dice) for r in data]
    before, after = (out_of_fold(d, [r.dice for r in d]) for d in (data, changed))
    own = [r.subject == "s3" for r in data]
    assert np.allclose(before[own], after[own]) and not np.allclose(before, after)


def test_one_subject_or_a_structure_of_one_subject_is_refused_by_name() -> None:
    one = [Row("a", "s", "x", dict.fromkeys(NAMES, 0.0), 0.5), Row("b", "s", "x", dict.fromkeys(NAMES, 1.0), 0.6)]
    with pytest.raises(ValueError, match="at least two"):
        calibrate(one)
    rare = [*rows(8), Row("c9", "s9", "rare", dict.fromkeys(NAMES, 0.0), 0.5)]
    with pytest.raises(ValueError, match=r"rare occurs in one subject only \(s9\)"):
        calibrate(rare)


def test_a_fit_survives_json() -> None:
    import json

    found = calibrate(rows(24))
    again = Calibration.from_dict(json.loads(json.dumps(found.as_dict())))
    for r in rows(5, seed=3):
        assert again.line.predict(r.structure, r.features) == pytest.approx(
            found.line.predict(r.structure, r.features), abs=1e-9
        )
        assert again.ranks and found.ranks and again.ranks.rank(r.structure, r.features)
        assert again.ranks == found.ranks
    assert again.quantile == found.quantile and again.interval("a", 0.95)[1] == 1.0  # type: ignore[index]


def test_local_labels_by_hand() -> None:
    offset, half = local_correction([0.5, 0.6, 0.7], [0.6, 0.8, 0.7], 0.05)
    assert offset == pytest.approx((-0.1 - 0.2 + 0.0) / 4)
    # each error beside the offset of the two others: -0.2 / 3, -0.1 / 3, -0.3 / 3
    assert half == pytest.approx(max(0.1 - 0.2 / 3, 0.2 - 0.1 / 3, 0.3 / 3))
    assert local_correction([0.5] * 3, [0.5] * 3, 0.05) == (0.0, 0.05)
    assert local_correction([0.5] * 3, [0.5] * 3, None) == (0.0, None)
    _, own = local_correction([0.5, 0.9] * 5, [0.7] * 10, 0.01)
    assert own is not None and own > 0.15
    with pytest.raises(ValueError, match="at least 3"):
        local_correction([0.5, 0.5], [0.5, 0.5], 0.1)


def test_the_alarm_is_a_count_of_surprises() -> None:
    assert alarm([True] * 5, 40) and not alarm([True] + [False] * 20, 40) and not alarm([], 40)
    calibration = calibrate(rows(30))
    near, far = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 30.0)
    assert is_outside(calibration, "a", near) is False and is_outside(calibration, "a", far) is True
    assert is_outside(calibrate(rows(6)), "a", far) is None


def test_a_set_is_surer_than_a_case_and_needs_nine_patients() -> None:
    calibration = calibrate(rows(40))
    few, many = (set_interval(calibration, "a", n) for n in (2, 50))
    assert few is not None and many is not None
    assert few[1] - few[0] > 2 * (many[1] - many[0]) and few[0] < 0 < few[1]
    assert set_interval(calibrate(rows(12)), "a", 5) is None


@pytest.mark.parametrize(
    ("positive", "score", "expected"),
    [([True, True, False], [3, 2, 1], 1.0), ([True, False], [1, 1], 0.5), ([True, False, True], [1, 2, 3], 0.5)],
)
def test_auc_counts_pairs(positive: list[bool], score: list[float], expected: float) -> None:
    assert auc(positive, np.array(score)) == expected


def test_quality_by_hand() -> None:
    found: Any = quality([0.5, 0.9, 0.8], [0.6, 0.9, 0.7], [0.05, 0.05, None], 0.7)
    assert found["mae"] == pytest.approx(0.2 / 3) and found["inside"] == 0.5 and found["auc"] == 1.0
    assert math.isnan(quality([0.9], [0.9], [None], 0.7)["auc"])


def test_boundaries_are_ranked_by_thirds_and_never_in_mm() -> None:
    data = rows(40, noise=0.0)
    found = calibrate(data).ranks
    assert found is not None and set(found.thirds) == {"a", "b"} and min(found.rho.values()) > 0.9
    own = sorted((r for r in data if r.structure == "a"), key=lambda r: r.hd95 or 0)
    ranks = [found.rank("a", r.features) for r in own]
    assert ranks[0] == "low" and ranks[20] == "medium" and ranks[-1] == "high"
    assert found.rank("c", own[0].features) == ""
    few = [Row(r.case, r.subject, r.structure, r.features, r.dice) for r in data[:-16]] + data[-16:]
    assert calibrate(few).ranks is None  # eight a structure
