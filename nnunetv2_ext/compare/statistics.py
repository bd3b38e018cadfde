"""Paired differences with intervals, and what may be concluded from them.

The paired unit is the case: its score is averaged over an arm's repeats (seeds) first, so that three seeds do not pass
for three times as many patients. The bootstrap draws subjects, with all their cases, where subjects are known, and else
cases. How much a repeated training changes the answer is another question, with an interval over the repeats.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from nnunetv2_ext.compare.scores import Scores
from nnunetv2_ext.evaluate.intervals import (
    FEW_CASES,
    NO_INTERVAL,
    TIE,
    TOO_FEW_CASES,
    Interval,
    bootstrap_interval,
    signed,
)
from nnunetv2_ext.evaluate.metrics import Metric

BETTER, WORSE, UNCLEAR, EQUAL = "better", "worse", "unclear", "equal"


@dataclass(frozen=True)
class Difference:
    """One arm minus the first, for one metric and structure."""

    arm: str
    first: str
    key: str  # of METRICS
    metric: Metric  # with the unit that the values have
    structure: str  # its name, or MEAN over structures
    per_case: pd.Series  # by case, NaN where it does not count
    mean: float  # over cases
    interval: Interval  # bootstrap over subjects or cases
    units: int  # number of subjects among the cases that count, or of these cases where subjects are not known
    unit: str  # "subjects" or "cases"
    wins: int  # cases that got better
    losses: int
    ties: int
    by_repeat: dict[str, float]  # mean difference to the same label's, or else to the first arm's average
    paired_repeats: bool  # whether the labels are the same
    agreeing: tuple[int, int]  # pairs of trainings (of equal labels, or all), and how many have the sign of the mean
    repeat_interval: Interval  # Student's t; none with a single repeat in either arm or without any spread
    by_fold: dict[str, float]  # mean difference in each fold

    @property
    def n(self) -> int:
        """Cases that count."""
        return self.wins + self.losses + self.ties

    @property
    def direction(self) -> str:
        """better, worse, equal in every case, or unclear: the interval over cases holds zero, or there are too few."""
        if self.n and self.ties == self.n:
            return EQUAL
        if self.units < TOO_FEW_CASES or not self.interval.excludes_zero:
            return UNCLEAR
        return BETTER if (self.mean > 0) == self.metric.higher_is_better else WORSE


def paired_difference(scores: Scores, arm: str, key: str, structure: str, seed: int = 0) -> Difference:
    """Arm ``arm`` minus the first arm; the same ``seed`` of the bootstrap repeats a report."""
    metric, about = scores.metrics[key], scores.per_case
    cells = scores.trainings(key, structure)
    per_case = cells[arm].mean(axis=1) - cells[scores.first].mean(axis=1)
    values = per_case.dropna()
    gain = values if metric.higher_is_better else -values
    about = about.loc[values.index]
    subjects = about["subject"] if "subject" in about else values.index.to_series()
    by_repeat, paired, pairs, repeat_interval = _over_repeats(
        *(cells.loc[values.index, name].mean() for name in (arm, scores.first))
    )
    return Difference(
        arm=arm, first=scores.first, key=key, metric=metric, structure=structure, per_case=per_case,
        mean=float(values.mean()), interval=bootstrap_interval(values, subjects, seed),
        units=subjects.nunique(), unit="subjects" if "subject" in about else "cases",
        wins=int((gain > TIE).sum()), losses=int((gain < -TIE).sum()), ties=int((gain.abs() <= TIE).sum()),
        by_repeat=by_repeat, paired_repeats=paired, repeat_interval=repeat_interval,
        agreeing=(pairs.size, int((pairs * np.sign(values.mean()) > 0).sum())),
        by_fold=values.groupby(about["fold"], sort=False).mean().to_dict(),
    )  # fmt: skip


def _over_repeats(ours: pd.Series, theirs: pd.Series) -> tuple[dict[str, float], bool, np.ndarray, Interval]:
    """``by_repeat``, ``paired_repeats``, the differences of all pairs of trainings, and ``repeat_interval``.

    From the mean of each repeat, by label. Pairs are (repeats,) of the same labels, else (our repeats, their repeats).
    """
    paired = set(ours.index) == set(theirs.index)
    by_repeat = ours - (theirs.loc[ours.index] if paired else theirs.mean())
    pairs = by_repeat.to_numpy() if paired else np.subtract.outer(ours.to_numpy(), theirs.to_numpy())
    interval = NO_INTERVAL
    # trainings that agree to the last digit tell nothing
    if min(pairs.shape) > 1 and np.isfinite(pairs).all() and np.ptp(pairs) > TIE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of precision, where repeats are nearly the same
            test = stats.ttest_1samp(pairs, 0) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
            interval = Interval(*map(float, test.confidence_interval()))
    return by_repeat.to_dict(), paired, pairs, interval


def all_differences(scores: Scores) -> list[Difference]:
    """Every arm against the first, every metric and structure; the mean over structures comes first."""
    *structures, last = scores.columns
    asked = itertools.product(scores.metrics, [arm.name for arm in scores.arms[1:]], [last, *structures])
    return [paired_difference(scores, arm, key, structure) for key, arm, structure in asked]


def headline(differences: Sequence[Difference]) -> str:
    """All metrics of one arm and structure: ``No difference in Dice; HD95 worse by 0.41 mm [0.16, 0.67]``."""
    units = min(d.units for d in differences)
    if units < TOO_FEW_CASES:
        return f"Too few {differences[0].unit} to conclude anything ({units})"
    none = [d.metric.name for d in differences if d.direction in (UNCLEAR, EQUAL)]
    parts = []
    for d in differences:
        if d.metric.name in none[:1]:
            parts.append(f"no difference in {' and '.join(none)}")
        elif d.metric.name not in none:
            low, high = sorted(map(abs, d.interval))
            unit, digits = (f" {d.metric.unit}", 2) if d.metric.unit else ("", 3)
            size = f"{abs(d.mean):.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"
            parts.append(f"{d.metric.name} {d.direction} by {size}")
    return "; ".join([f"{parts[0][0].upper()}{parts[0][1:]}", *parts[1:]])


def verdict(d: Difference) -> str:
    """What may be concluded of one metric, in one sentence; the parts of chance (cases, training) are told apart."""
    if not d.n:
        return f"{d.metric.name}: no case counts, so nothing can be said."
    what = f"{d.metric.name} ({d.structure}) {signed(d.mean)} {d.metric.unit}".rstrip()
    if d.units < 2:
        return f"{what} on a single {d.unit[:-1]}, which says nothing about others."
    over = f"{d.units} subjects" if d.unit == "subjects" else "cases"
    counts = f"better in {d.wins}, worse in {d.losses} of {d.n} cases"
    if d.units < TOO_FEW_CASES:
        conclusion = f"**Too few {d.unit} to conclude anything**: {d.units}; score at least {TOO_FEW_CASES}."
    elif d.direction == EQUAL:
        conclusion = f"**Equal {d.metric.name} in every case.**"
    else:
        few = f" With {d.units} {d.unit} the interval is itself rough." if d.units < FEW_CASES else ""
        conclusion = _conclusion(d) + few
    return f"{what}, 95 % interval {d.interval} over {over}; {counts}. {conclusion}"


def _conclusion(d: Difference) -> str:
    (pairs, agree), word = d.agreeing, d.direction.capitalize()
    span = "" if d.repeat_interval is NO_INTERVAL else f" (interval over repeats: {d.repeat_interval})"
    if d.direction == UNCLEAR:
        claim = f"No difference in {d.metric.name} beyond chance"
        rest = ": the interval holds zero; it also says how large an effect these cases cannot exclude."
    elif pairs < 2:
        claim = f"{word} on these cases, for these two trainings"
        rest = ": a repeated training of either could change it. Add seeds before relying on it."
    elif agree < pairs:
        claim = f"{word} on average, but not in every pair of trainings"
        rest = f" ({agree} of {pairs} agree): luck of the training may be as large as the effect{span}."
    elif d.repeat_interval.excludes_zero:
        claim = f"{word}, beyond chance in cases and in training"
        rest = f": all {pairs} pairs of trainings agree, and the interval over repeats excludes zero{span}."
    else:
        claim = f"{word} on these cases, in all {pairs} pairs of trainings"
        rest = f", but the repeats are too few or too different to exclude luck of the training{span}. Add seeds."
    return f"**{claim}**{rest}"
