"""Bootstrap intervals of a mean over cases, and of the difference of the means of two groups; subjects are drawn."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

RESAMPLES = 9999
FEW_CASES = 10  # fewer (subjects where known): the interval is rough
TOO_FEW_CASES = 5  # fewer: it is little more than the cases' own range
TIE = 1e-9


class Interval(NamedTuple):
    """A 95 % interval; NaN where there is none."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:  # False without an interval
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"[{signed(self.low)}, {signed(self.high)}]" if math.isfinite(self.low) else "-"


NO_INTERVAL = Interval(math.nan, math.nan)


def signed(value: float) -> str:
    """``+0.012``; ``-`` for none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}"


def bootstrap_interval(values: pd.Series, subjects: pd.Series | None = None, seed: int = 0) -> Interval:
    """95 % interval of the mean of cases, bias-corrected and accelerated (scipy.stats.bootstrap).

    Subjects are drawn, each with all of its cases; without ``subjects`` each case is its own. Both are by case.
    ``NO_INTERVAL`` below two subjects; values that are all the same give that value twice.
    """
    sums = values.groupby(np.arange(len(values)) if subjects is None else subjects.to_numpy()).agg(["sum", "count"])
    if len(sums) < 2:
        return NO_INTERVAL
    if np.ptp(values.to_numpy()) <= TIE:
        return Interval(float(values.mean()), float(values.mean()))
    return _bootstrap(
        (sums["sum"].to_numpy(), sums["count"].to_numpy()),
        lambda total, number, axis: total.sum(axis) / number.sum(axis),
        seed,
        paired=True,
    )


def gap_interval(values: pd.Series, first: pd.Series, subjects: pd.Series, seed: int = 0) -> Interval:
    """95 % interval of the mean of the cases where ``first`` is False minus that where it is True (scipy.stats).

    All three are by case. Subjects are drawn with all of their cases: those of either group by themselves, and those
    with cases in both groups together, so that the number of each kind stays. ``NO_INTERVAL``: a group has fewer than
    two subjects; a subject that is the only one of its kind is in every draw.
    """
    side = first.map({True: "one", False: "other"})
    sums = values.groupby([subjects.to_numpy(), side.to_numpy()]).agg(["sum", "count"]).unstack(fill_value=0)
    if sums["count"].shape[1] < 2 or (sums["count"] > 0).sum().min() < 2:
        return NO_INTERVAL
    one, other = ((sums["sum", name].to_numpy(float), sums["count", name].to_numpy(float)) for name in ("one", "other"))
    kind = (one[1] > 0) + 2 * (other[1] > 0)
    strata = [np.flatnonzero(kind == k) for k in (1, 2, 3)]
    drawn = [some for some in strata if len(some) > 1]
    if not drawn:
        return NO_INTERVAL
    fixed = np.concatenate([np.empty(0, int), *(some for some in strata if len(some) == 1)])

    def gap(*chosen: npt.NDArray[np.intp], axis: int) -> Any:
        def mean(side: Sequence[npt.NDArray[np.float64]]) -> Any:
            total, number = (sum(part[index].sum(axis) for index in chosen) + part[fixed].sum() for part in side)
            return total / number

        return mean(other) - mean(one)

    if values.groupby(side.to_numpy()).agg(np.ptp).max() <= TIE:
        middle = float(gap(*drawn, axis=0))
        return Interval(middle, middle)
    return _bootstrap(drawn, gap, seed, paired=False)


def _bootstrap(data: Sequence[Any], statistic: Callable[..., Any], seed: int, *, paired: bool) -> Interval:
    generator = np.random.default_rng(seed)
    for method in ("BCa", "percentile"):  # the latter where the acceleration is degenerate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                data, statistic, paired=paired, vectorized=True, n_resamples=RESAMPLES, method=method,
                random_state=generator,
            ).confidence_interval  # fmt: skip
        if np.isfinite(found).all():
            break
    return Interval(float(found.low), float(found.high))
