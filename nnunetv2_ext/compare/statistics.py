"""Paired differences with intervals, and what may be concluded from them.

The paired unit is the case: its score is averaged over an arm's repeats (seeds) first, so that three seeds do not pass
for three times as many patients. The bootstrap draws cases. How much a repeated training changes the answer is another
question, with an interval of its own over the repeats.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from nnunetv2_ext.compare.collect import Scores
from nnunetv2_ext.evaluate.metrics import METRICS

RESAMPLES = 9999
FEW_CASES = 10  # fewer: the interval is rough
TOO_FEW_CASES = 5  # fewer: it is little more than the cases' own range
_TIE = 1e-9

BETTER, WORSE, UNCLEAR, EQUAL = "better", "worse", "unclear", "equal"


@dataclass(frozen=True)
class Interval:
    """A 95 % interval; NaN where there is none."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside; False without an interval."""
        return self.low > 0 or self.high < 0


NO_INTERVAL = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class Difference:
    """One arm minus the first, for one metric and structure.

    Attributes:
        arm: index of the arm.
        metric: key of ``METRICS``.
        column: structure, or the mean over structures.
        per_case: (cases,), NaN where a case does not count.
        mean: over cases.
        interval: bootstrap over cases.
        wins, losses, ties: cases that got better, worse, or stayed.
        by_repeat: mean difference of each repeat: of equal labels if both arms have the same, else of the arm's repeats
            to the first arm's average.
        paired_repeats: whether the labels are the same.
        agreeing: of how many pairs of trainings, and in how many of them the difference has the sign of the mean; pairs
            of equal labels, or all pairs.
        repeat_interval: over repeats (Student's t); none with a single repeat in either arm.
        by_fold: mean difference in each fold.
    """

    arm: int
    metric: str
    column: str
    per_case: npt.NDArray[np.float64]
    mean: float
    interval: Interval
    wins: int
    losses: int
    ties: int
    by_repeat: dict[str, float]
    paired_repeats: bool
    agreeing: tuple[int, int]
    repeat_interval: Interval
    by_fold: dict[str, float]

    @property
    def n(self) -> int:
        """Cases that count."""
        return self.wins + self.losses + self.ties

    @property
    def sign(self) -> int:
        """1 if the arm is better on average, -1 if worse."""
        return int(np.sign(self.mean)) * (1 if METRICS[self.metric].higher_is_better else -1)

    @property
    def direction(self) -> str:
        """better, worse, equal in every case, or unclear: the interval over cases holds zero."""
        if self.n and self.ties == self.n:
            return EQUAL
        if not self.interval.excludes_zero:
            return UNCLEAR
        return BETTER if self.sign > 0 else WORSE


def paired_difference(scores: Scores, arm: int, metric: str, column: int, seed: int = 0) -> Difference:
    """Arm ``arm`` minus the first arm.

    Args:
        scores: what was measured.
        arm: index, from 1.
        metric: key of ``METRICS``.
        column: index in ``scores.columns``.
        seed: of the bootstrap, so that a report can be repeated.
    """
    difference = (scores.case_scores(metric, arm) - scores.case_scores(metric, 0))[:, column]
    defined = np.isfinite(difference)
    values = difference[defined]
    gain = values if METRICS[metric].higher_is_better else -values
    by_repeat, paired, pairs, repeat_interval = _over_repeats(scores, arm, metric, column)
    mean = float(values.mean()) if len(values) else math.nan
    folds = np.array(scores.folds)[defined]
    by_fold = {fold: float(values[folds == fold].mean()) for fold in dict.fromkeys(folds.tolist())}
    return Difference(
        arm=arm,
        metric=metric,
        column=scores.columns[column],
        per_case=difference,
        mean=mean,
        interval=bootstrap_interval(values, seed),
        wins=int((gain > _TIE).sum()),
        losses=int((gain < -_TIE).sum()),
        ties=int((np.abs(gain) <= _TIE).sum()),
        by_repeat=by_repeat,
        paired_repeats=paired,
        agreeing=(len(pairs), int((pairs * np.sign(mean) > 0).sum())),
        repeat_interval=repeat_interval,
        by_fold=by_fold,
    )


def bootstrap_interval(values: npt.NDArray[np.float64], seed: int = 0) -> Interval:
    """95 % interval of the mean, bias-corrected and accelerated (scipy.stats.bootstrap); none below two values.

    Values that are all the same give that value twice.
    """
    if len(values) < 2:
        return NO_INTERVAL
    if np.ptp(values) <= _TIE:
        return Interval(float(values.mean()), float(values.mean()))
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate acceleration is answered below
        found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, random_state=generator).confidence_interval
        if not (math.isfinite(found.low) and math.isfinite(found.high)):
            options = {"n_resamples": RESAMPLES, "random_state": generator, "method": "percentile"}
            found = stats.bootstrap((values,), np.mean, **options).confidence_interval
    return Interval(float(found.low), float(found.high))


def _over_repeats(
    scores: Scores, arm: int, metric: str, column: int
) -> tuple[dict[str, float], bool, npt.NDArray[np.float64], Interval]:
    """Mean difference of each repeat, whether repeats are paired, the pairs' differences, and the interval of the mean
    over repeated trainings (on these cases)."""
    ours, theirs = (_repeat_means(scores, metric, index, column) for index in (arm, 0))
    labels, others = ([r.label for r in scores.arms[index].repeats] for index in (arm, 0))
    paired = set(labels) == set(others)
    if paired:
        pairs = np.array([ours[i] - theirs[others.index(label)] for i, label in enumerate(labels)])
        differences = dict(zip(labels, pairs.tolist(), strict=True))
    else:
        pairs = np.subtract.outer(ours, theirs).ravel()
        differences = {label: ours[i] - float(np.mean(theirs)) for i, label in enumerate(labels)}
    if min(len(ours), len(theirs)) < 2 or not np.isfinite(pairs).all():
        return differences, paired, pairs, NO_INTERVAL
    if np.ptp(pairs) <= _TIE:
        return differences, paired, pairs, Interval(float(pairs.mean()), float(pairs.mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of precision, where repeats are nearly the same
        test = stats.ttest_1samp(pairs, 0) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
        interval = test.confidence_interval()
    return differences, paired, pairs, Interval(float(interval.low), float(interval.high))


def _repeat_means(scores: Scores, metric: str, arm: int, column: int) -> list[float]:
    """(repeats,): mean over the cases that count."""
    values = scores.table(metric, arm)[:, :, column]
    return [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else math.nan for row in values]


def all_differences(scores: Scores) -> list[Difference]:
    """Every arm against the first, every metric and column; the mean over structures comes first."""
    order = [len(scores.columns) - 1, *range(len(scores.columns) - 1)]
    return [
        paired_difference(scores, arm, metric, column)
        for metric in scores.source.rules.metrics
        for arm in range(1, len(scores.arms))
        for column in order
    ]


def verdict(difference: Difference, name: str, first: str) -> str:
    """What may be concluded, in one sentence; the parts of chance (cases, training) are told apart."""
    d, unit = difference, METRICS[difference.metric].unit
    if not d.n:
        return f"{name}: no case counts for {METRICS[d.metric].name}, so nothing can be said."
    what = f"{METRICS[d.metric].name} ({d.column}) {signed(d.mean)}{' ' + unit if unit else ''}"
    counts = f"better in {d.wins}, worse in {d.losses} of {d.n} cases"
    if d.n < 2:
        return f"{name} against {first}: {what} on a single case, which says nothing about others."
    span = f"95 % interval {signed(d.interval.low)} to {signed(d.interval.high)} over cases"
    return f"{name} against {first}: {what}, {span}; {counts}. {_conclusion(d)}"


def _conclusion(d: Difference) -> str:
    if d.n < TOO_FEW_CASES:
        return f"**Too few cases to conclude anything**: {d.n}; score at least {TOO_FEW_CASES}."
    few = f" With {d.n} cases the interval is itself rough." if d.n < FEW_CASES else ""
    if d.direction == EQUAL:
        return "**Equal in every case.**"
    if d.direction == UNCLEAR:
        return (
            "**No difference beyond chance**: the interval holds zero; it also says how large an effect, in either "
            f"direction, these cases cannot exclude.{few}"
        )
    pairs, agree = d.agreeing
    word = d.direction.capitalize()
    if pairs < 2:
        return (
            f"**{word} on these cases, for these two trainings**: a repeated training of either could change it, which "
            f"one repeat cannot show. Add seeds before relying on it.{few}"
        )
    if agree < pairs:
        return (
            f"**{word} on average, but not in every pair of trainings** ({agree} of {pairs} agree): luck of the "
            f"training may be as large as the effect{_repeat_span(d)}.{few}"
        )
    if d.repeat_interval.excludes_zero:
        low, high = signed(d.repeat_interval.low), signed(d.repeat_interval.high)
        return (
            f"**{word}, beyond chance in cases and in training**: all {pairs} pairs of trainings agree and the "
            f"interval over repeats ({low} to {high}) excludes zero.{few}"
        )
    return (
        f"**{word} on these cases, in all {pairs} pairs of trainings**, but the repeats are too few or too different "
        f"to exclude luck of the training{_repeat_span(d)}. Add seeds.{few}"
    )


def _repeat_span(d: Difference) -> str:
    low, high = d.repeat_interval.low, d.repeat_interval.high
    return f" (interval over repeats: {signed(low)} to {signed(high)})" if math.isfinite(low) else ""


def signed(value: float) -> str:
    """``+0.012``; ``-`` for none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}"
