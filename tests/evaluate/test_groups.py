"""Groups of cases: who is in which, their figures by hand, and intervals against a slow bootstrap."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nnunetv2_ext.evaluate.groups import (
    OTHERS,
    Groups,
    add_groups,
    find_groups,
    gap_figures,
    group_figures,
    worst_groups,
)
from nnunetv2_ext.evaluate.intervals import NO_INTERVAL, gap_interval
from nnunetv2_ext.evaluate.metrics import METRICS

CASES = ["a1", "a2", "b1", "b2"]
SITES = {"a1": "A", "a2": "A", "b1": "B", "b2": "B"}


def table_file(folder: Path, content: str = "case,site\na1,A\na2,A\nb1,B\nb2,B\nunused,\n", name: str = "t.csv") -> str:
    (folder / name).write_text(content)
    return str(folder / name)


def long_table(values: dict[str, list[float]], subjects: list[str] | None = None, metric: str = "dice") -> pd.DataFrame:
    """Groups to the values of their cases, in the order of ``subjects``."""
    rows = [
        {"case": f"{group}{i}", "group": group, "structure": "a", "metric": metric, "value": value}
        for group, some in values.items()
        for i, value in enumerate(some)
    ]
    table = pd.DataFrame(rows)
    return table if subjects is None else table.assign(subject=subjects)


# --- which case is in which group


def test_groups_from_a_table_or_the_record(tmp_path: Path) -> None:
    assert find_groups(f"{table_file(tmp_path)}:site", [], CASES, None) == Groups("site", SITES, None)
    tabs = table_file(tmp_path, "site\tcase\nA\ta1\nA\ta2\n B \tb1\nB\tb2\n", "t.tsv")
    assert find_groups(f"{tabs}:site", [], CASES, None).of == SITES
    recorded = {"nnunetv2_ext": {"site": SITES | {"c": "C"}}}
    # that of another dataset, whose cases are not these, says nothing
    other = {"nnunetv2_ext": {"site": {"x": "A"}}}
    assert find_groups("site", [{}, other, recorded], CASES, {c: c for c in CASES}).of == SITES
    assert find_groups("site", [recorded], CASES, None).unit == "cases"


@pytest.mark.parametrize(
    ("by", "content", "message"),
    [
        ("none.csv:site", None, "the table none.csv does not exist"),
        (":site", None, r"the table \(no name\) does not exist"),
        ("t.csv", "case,site\n", "t.csv names a table without a column: give --by t.csv:COLUMN"),
        ("t.csv:vendor", "case,site\na1,A\n", "must have the columns case,vendor; it has case, site"),
        ("t.csv:site", "site\nA\n", "must have the columns case,site; it has site"),
        ("t.csv:site", "", "must have the columns case,site; it is empty"),
        ("t.csv:site", "case,site\na1,A\na2,\n", "gives no site for cases a2, b1, b2: add it"),
        ("t.csv:site", "case,site\na1,A\na1,B\n", "'a1' two entries of site, 'A' and 'B'"),
        ("t.csv:site", "case,site\na1,A\na2,A\nb1,A\nb2,A\n", "all 4 cases have the site 'A'"),
        ("t.csv:site", "case,site\na1,A\na2,A\nb1,A\nb2,B\n", r"the site 'B' has one case \(case b2\)"),
        ("site", None, "dataset.json does not record a site of its cases; give --by FILE:COLUMN"),
    ],
)
def test_mistakes_are_one_line(by: str, content: str | None, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        table_file(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        find_groups(by, [{"nnunetv2_ext": {}}], CASES, None)
    assert "\n" not in str(error.value)


def test_a_record_of_another_form_and_a_group_of_one_subject(tmp_path: Path) -> None:
    for record in (["A"], {"a1": ["A"]}):
        with pytest.raises(ValueError, match="must be one object"):
            find_groups("site", [{"nnunetv2_ext": {"site": record}}], CASES, None)
    subjects = {"a1": "p", "a2": "p", "b1": "q", "b2": "r"}
    with pytest.raises(ValueError, match=r"the site 'A' has one subject \(cases a1, a2\)"):
        find_groups(f"{table_file(tmp_path)}:site", [], CASES, subjects)
    # the remedy passes the check: one name for A and another group
    joined = table_file(tmp_path, "case,site\na1,B\na2,B\nb1,B\nb2,C\nb3,C\n")
    joined_subjects = subjects | {"b3": "s"}
    assert find_groups(f"{joined}:site", [], [*CASES, "b3"], joined_subjects).of["a1"] == "B"


def test_columns_stand_behind_the_case() -> None:
    frame = pd.DataFrame({"arm": ["x"], "case": ["a1"], "subject": ["old"], "value": [1.0]})
    added = add_groups(frame, Groups("site", SITES, {"a1": "p"}))
    assert list(added) == ["arm", "case", "group", "subject", "value"]
    assert added.loc[0, ["group", "subject"]].tolist() == ["A", "p"]


# --- figures


def test_figures_by_hand() -> None:
    table = long_table({"A": [0.8, 0.6, math.nan], "B": [0.5, 0.1]}, ["p", "p", "q", "r", "s"])
    a, b = group_figures(table).to_dict("records")
    assert (a["group"], a["cases"], a["units"], b["cases"], b["units"]) == ("A", 2, 1, 2, 2)
    assert (a["mean"], a["worst"], b["mean"], b["worst"]) == pytest.approx((0.7, 0.6, 0.3, 0.1))
    assert a["sd"] == pytest.approx(np.std([0.8, 0.6], ddof=1))
    assert math.isnan(a["low"]) and 0.1 <= b["low"] <= 0.3 <= b["high"] <= 0.5
    assert group_figures(long_table({"A": [1.0, 5.0]}, metric="hd95"))["worst"].tolist() == [5]


def test_gaps_by_hand() -> None:
    (two,) = gap_figures(long_table({"A": [0.8, 0.6], "B": [0.5, 0.1, 0.3]})).to_dict("records")
    assert (two["group"], two["other"], two["fewest"]) == ("B", "A", 2)
    assert two["difference"] == pytest.approx(0.3 - 0.7)
    three = gap_figures(long_table({"A": [0.8, 0.6], "B": [0.5, 0.1, 0.3], "C": [0.4, 0.2]}))
    assert three["group"].tolist() == ["A", "B", "C"] and set(three["other"]) == {OTHERS}
    assert three["difference"].tolist() == pytest.approx([0.7 - 1.5 / 5, 0.3 - 2 / 4, 0.3 - 2.3 / 5])


def slow_gap(values: np.ndarray, first: np.ndarray, subjects: np.ndarray) -> tuple[float, float]:
    """BCa by loops (Efron and Tibshirani 1993, equations 14.10 and 14.15, several samples): subjects of one kind are
    drawn together."""
    members = {s: np.flatnonzero(subjects == s) for s in dict.fromkeys(subjects)}
    kinds: dict[tuple[bool, bool], list[np.ndarray]] = {}
    for some in members.values():
        kinds.setdefault((bool(first[some].any()), bool((~first[some]).any())), []).append(some)

    def gap(chosen: list[np.ndarray]) -> float:
        index = np.concatenate(chosen)
        return values[index][~first[index]].mean() - values[index][first[index]].mean()

    generator, found = np.random.default_rng(7), []
    for _ in range(6000):
        drawn = []
        for some in kinds.values():
            drawn += [some[i] for i in generator.integers(len(some), size=len(some))]
        found.append(gap(drawn))
    middle = gap([m for some in kinds.values() for m in some])
    z0 = stats.norm.ppf((np.array(found) < middle).mean() / 2 + (np.array(found) <= middle).mean() / 2)
    top = bottom = 0.0
    for kind, some in kinds.items():
        if (n := len(some)) < 2:
            continue
        rest = [m for k, others in kinds.items() if k != kind for m in others]
        left = np.array([gap([*rest, *some[:i], *some[i + 1 :]]) for i in range(n)])
        influence = (n - 1) * (left.mean() - left)
        top, bottom = top + (influence**3).sum() / n**3, bottom + (influence**2).sum() / n**2
    a, z = top / (6 * bottom**1.5), stats.norm.ppf([0.025, 0.975])
    return tuple(np.quantile(found, stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))))


@pytest.mark.parametrize("travelled", [0, 1, 5], ids=["nobody", "one subject", "five subjects"])
def test_the_interval_of_a_gap_is_that_of_a_slow_bootstrap(travelled: int) -> None:
    """Subjects have one to three cases; those who ``travelled`` have cases in both groups and a level of their own."""
    generator = np.random.default_rng(travelled)
    subjects = np.repeat([f"p{i}" for i in range(24)], generator.integers(1, 4, 24))
    number = np.array([int(s[1:]) for s in subjects])
    first = number < 10
    level = generator.exponential(0.1, 24)[number]
    values = 1 - level - generator.exponential(0.05, len(number)) - 0.1 * ~first
    also = np.flatnonzero(number < travelled)
    first, subjects = np.append(first, np.zeros(len(also), bool)), np.append(subjects, subjects[also])
    values = np.append(values, values[also] - 0.1 - generator.exponential(0.02, len(also)))
    found = gap_interval(pd.Series(values), pd.Series(first), pd.Series(subjects))
    width = found.high - found.low
    assert tuple(found) == pytest.approx(slow_gap(values, first, subjects), abs=0.08 * width)  # noise of 6000 draws
    assert 0.03 < width < 0.3


def test_pairs_of_one_subject_narrow_the_interval() -> None:
    """The same subjects in both groups, with large differences between them and a constant one within."""
    level = np.random.default_rng(0).uniform(0, 1, 12)
    values = pd.Series(np.concatenate([level, level - 0.1 + np.linspace(0, 0.01, 12)]))
    first, people = pd.Series([True] * 12 + [False] * 12), pd.Series([*range(12), *range(12)])
    paired = gap_interval(values, first, people)
    strangers = gap_interval(values, first, pd.Series(range(24)))
    assert paired.high - paired.low < 0.02 < 0.3 < strangers.high - strangers.low


def test_each_draw_has_as_many_subjects_of_a_group() -> None:
    """Of two subjects beside ten, every draw has two; drawn from all twelve, some draws would have none."""
    values = pd.Series([0.4, 0.6, *[0.5] * 10])
    found = gap_interval(values, pd.Series([True] * 2 + [False] * 10), pd.Series(range(12)))
    assert tuple(found) == pytest.approx((-0.1, 0.1))  # the mean of the two is 0.4, 0.5 or 0.6


def test_no_interval_of_a_gap() -> None:
    values = pd.Series([0.5, 0.6, 0.7])
    assert gap_interval(values, pd.Series([True, False, False]), pd.Series(list("abc"))) is NO_INTERVAL
    assert gap_interval(values, pd.Series([True] * 3), pd.Series(list("abc"))) is NO_INTERVAL
    # two subjects a side, but each the only one of its kind: nothing is drawn
    both = gap_interval(pd.Series([0.1, 0.2, 0.3, 0.4]), pd.Series([True, True, False, False]), pd.Series(list("abbc")))
    assert both is NO_INTERVAL
    constant = gap_interval(pd.Series([0.5, 0.5, 0.25, 0.25]), pd.Series([True, True, False, False]),
                            pd.Series(list("abcd")))  # fmt: skip
    assert tuple(constant) == (-0.25, -0.25)


# --- words


def words(values: dict[str, list[float]], metric: str = "dice") -> str:
    table = long_table(values, metric=metric)
    (line,) = worst_groups(group_figures(table), gap_figures(table), {metric: METRICS[metric]}, "cases")
    return line


def test_the_worst_group_in_words() -> None:
    low, high = [0.5, 0.52, 0.48, 0.5, 0.51], [0.8, 0.82, 0.78, 0.8, 0.81]
    for one, other in (("A", "B"), ("B", "A")):  # whichever of the two is named first
        line = words({one: low, other: high})
        assert line.startswith(f"Dice: worst group **{one}**, 0.502, -0.300 [-0.3")
        assert f"against {other}: worse beyond chance in cases." in line
    assert words({"A": low, "B": high}, "hd95").startswith("HD95: worst group **B**, 0.802 mm, +0.300 mm [+0.2")
    assert "no difference between them beyond chance" in words({"A": low, "B": low})
    assert "too few cases to conclude anything (4 on one side; 5 are needed)" in words({"A": low[:4], "B": high})
    line = words({"A": low, "B": high, "C": high})
    assert "-0.300 [-0.3" in line and f"against {OTHERS}" in line
    assert line.endswith("The worst of 3 was picked after looking.")
    assert "fewer than two groups have a case that counts" in words({"A": low, "B": [math.nan] * 5})


def test_json_of_a_record_is_read_as_it_is(tmp_path: Path) -> None:
    """Sites that look like numbers stay names, also from JSON."""
    content = json.loads('{"nnunetv2_ext": {"site": {"a1": 1, "a2": 1, "b1": 2, "b2": 2}}}')
    assert set(find_groups("site", [content], CASES, None).of.values()) == {"1", "2"}
    file = table_file(tmp_path, "case,site\na1,01\na2,01\nb1,NA\nb2,NA\n")
    assert set(find_groups(f"{file}:site", [], CASES, None).of.values()) == {"01", "NA"}
