"""A comparison within and between groups of cases, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnunetv2_ext.cli import dispatch
from nnunetv2_ext.compare import statistics
from nnunetv2_ext.compare.groups import compare_groups
from nnunetv2_ext.evaluate.groups import Groups
from nnunetv2_ext.evaluate.intervals import gap_interval
from tests.compare.conftest import save, truth_of, world  # noqa: F401
from tests.compare.test_statistics import scores_of

# by case: home is as good as before, away gains 0.1, with some spread; two seeds, whose mean counts
HOME, AWAY = np.array([0.80, 0.82, 0.84, 0.78, 0.81, 0.83]), np.array([0.60, 0.58, 0.65, 0.55, 0.62, 0.61])
WIGGLE = np.array([0.01, -0.01, 0.02, -0.02, 0.01, -0.01])
GROUPS = Groups("site", {f"case{i}": "home" if i < 6 else "away" for i in range(12)}, None)


def compared(subjects=None):
    plain = np.concatenate([HOME, AWAY])
    ours = plain + np.concatenate([WIGGLE, 0.1 + WIGGLE])
    scores = scores_of([plain + 0.01, plain - 0.01], [ours + 0.02, ours - 0.02], subjects=subjects)
    groups = GROUPS if subjects is None else GROUPS._replace(subjects={f"case{i}": s for i, s in enumerate(subjects)})
    return scores, compare_groups(scores, groups, statistics.all_differences(scores))


def test_within_and_between_groups() -> None:
    _, by = compared()
    assert list(by.within) == ["away", "home"]
    (away,), (home,) = by.within.values()
    assert (away.n, home.n) == (6, 6) and (away.mean, home.mean) == pytest.approx((0.1, 0.0))
    assert away.direction == "better" and home.direction == "unclear"
    means = by.figures.set_index(["arm", "group"])["mean"]
    assert means["arm0", "away"] == pytest.approx(AWAY.mean()) and means["arm1", "home"] == pytest.approx(HOME.mean())
    gaps = by.gaps.set_index("arm")["difference"]
    assert gaps["arm0"] == pytest.approx(HOME.mean() - AWAY.mean())
    assert gaps["arm1"] == pytest.approx(gaps["arm0"] - 0.1)
    (gain,) = by.gain_gaps.itertuples()
    assert (gain.group, gain.other) == ("home", "away") and gain.difference == pytest.approx(-0.1)
    values = pd.Series([*WIGGLE, *(0.1 + WIGGLE)])
    expected = gap_interval(values, pd.Series([False] * 6 + [True] * 6), pd.Series(range(12)))
    assert (gain.low, gain.high) == pytest.approx(tuple(expected), abs=0.002) and gain.high < -0.08


def test_words_for_each_group_and_between_them() -> None:
    _, by = compared()
    words = dict(by.answers("a"))
    away, home, gains, plain, ours = words
    assert away.startswith("**away** (6 cases): arm1 against arm0: Dice better by 0.100")
    assert home == "**home** (6 cases): arm1 against arm0: No difference in Dice."
    assert gains == "arm1 minus arm0:" and words[gains][0].startswith("Dice: worst group **home**, 0.000, -0.100 [")
    assert words[gains][0].endswith("against away: worse beyond chance in cases.")
    assert (plain, ours) == ("arm0:", "arm1:")
    assert all("worst group **away**" in words[arm][0] and "against home" in words[arm][0] for arm in (plain, ours))


def test_subjects_are_drawn_with_all_their_cases() -> None:
    subjects = [f"p{i // 2}" for i in range(12)]  # three in each group
    scores, by = compared(subjects)
    assert by.groups.unit == "subjects" and set(by.figures["units"]) == {3} and by.gaps["fewest"].tolist() == [3, 3]
    assert "too few subjects" in by.answers("a")[-1][1][0]
    assert by.within["home"][0].units == 3 and by.within["home"][0].unit == "subjects"
    assert len(scores.only(["case0", "case1"]).cases) == 2


def test_predictions_of_two_sites(world, monkeypatch, capsys) -> None:  # noqa: F811
    """Ours is as far off as the old one at site A, and perfect at site B."""
    for name in ("draw_boxes", "draw_differences"):
        monkeypatch.setattr(f"nnunetv2_ext.compare.plots.{name}", lambda *args: None)
    rows = ["case,site"]
    for site in "AB":
        for case in (f"{site}_{i}" for i in range(5)):
            rows.append(f"{case},{site}")
            save(Path("truth") / f"{case}.nii.gz", truth_of(case))
            for name, shift in (("old", 2), ("new", 2 if site == "A" else 0)):
                save(Path(name) / f"{case}.nii.gz", np.roll(truth_of(case), shift, axis=2))
    Path("cases.csv").write_text("\n".join(rows))
    command = ["compare", "-d", "5", "--predictions", "old", "old", "--predictions", "new", "new", "--truth", "truth"]
    command += ["--metrics", "dice", "--worst", "0", "-o", "out"]
    assert dispatch.main([*command, "--by", "cases.csv:site"]) == 0
    text = capsys.readouterr().out
    assert (
        "## Groups by site (mean of structures)" in text and "**A** (5 cases): new against old: No difference" in text
    )
    assert "**B** (5 cases): new against old: Dice better by 0.500 [0.500, 0.500]" in text
    assert "new minus old:\n  - Dice: worst group **A**, 0.000, -0.500 [-0.500, -0.500] against B: worse" in text
    assert "new:\n  - Dice: worst group **A**, 0.500, -0.500" in text
    content = json.loads(Path("out/comparison.json").read_text())["by_groups"]
    # a: 6 voxels wide and moved by 2, b: 3 wide
    gains = {(f["structure"], f["group"]): f["mean"] for f in content["gains"]["figures"]}
    assert (gains["a", "B"], gains["b", "B"], gains["a", "A"]) == pytest.approx((1 / 3, 2 / 3, 0))
    assert {d["reading"] for d in content["within"]["A"]} == {"equal"}
    assert pd.read_csv("out/cases.csv")["group"].value_counts().to_dict() == {"A": 20, "B": 20}
    assert pd.read_csv("out/differences.csv")["group"].nunique() == 2

    assert dispatch.main([*command, "--by", "site"]) == 2
    assert "dataset.json does not record a site" in capsys.readouterr().err
    file = world.truth.parent / "dataset.json"
    record = {"site": dict(row.split(",") for row in rows[1:])}
    file.write_text(json.dumps({**json.loads(file.read_text()), "nnunetv2_ext": record}))
    assert dispatch.main([*command, "--by", "site"]) == 0
    assert "**B** (5 cases)" in capsys.readouterr().out
    Path("cases.csv").write_text("\n".join(rows[:-1]))
    assert dispatch.main([*command, "--by", "cases.csv:site"]) == 2
    assert "cases.csv gives no site for case B_4: add it" in capsys.readouterr().err
