"""From features to an expected Dice with an interval: ridge, cross-validation by patients, conformal quantiles.

Split-conformal prediction with the finite-sample rank: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random
World" (2005); Lei et al., JASA 2018 (arXiv 1604.04173), section 2.2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from nnunetv2_ext.estimate.features import share_of_logit

Array = npt.NDArray[np.float64]

ALPHA = 0.1  # intervals hold 1 - ALPHA
FOLDS = 10
PENALTIES = np.logspace(-2, 3, 16)
MIN_LOCAL, OWN_QUANTILE = 3, 9  # local labels: the fewest, and from when on their own quantile is taken
_ALARM = 0.01
_DRAWS = 2000


@dataclass(frozen=True)
class Row:
    """One structure of one case of the fit; `hd95` in mm, None where one of the two surfaces is missing."""

    case: str
    subject: str
    structure: str
    features: Mapping[str, float]
    dice: float
    corrupted: bool = False
    hd95: float | None = None


@dataclass(frozen=True)
class Line:
    """A fitted ridge: a mean for each structure, and slopes that all share."""

    names: Sequence[str]  # of the features
    centre: Mapping[str, Sequence[float]]  # of the features, by structure
    mean: Mapping[str, float]  # of what is estimated, by structure
    scale: Sequence[float]  # of the features
    slopes: Sequence[float]

    def predict(self, structure: str, features: Mapping[str, float]) -> float:
        """Of one case."""
        z = (self.point(features) - np.asarray(self.centre[structure])) / np.asarray(self.scale)
        return float(self.mean[structure] + z @ np.asarray(self.slopes))

    def dice(self, structure: str, features: Mapping[str, float]) -> float:
        """Expected Dice, cut to 0 .. 1."""
        return float(np.clip(self.predict(structure, features), 0, 1))

    def point(self, features: Mapping[str, float]) -> Array:
        """The features in the order of `names`."""
        return np.array([features[name] for name in self.names])


def fit_line(rows: Sequence[Row], target: Sequence[float]) -> Line:
    """Ridge over standardised features with an intercept for each structure; the penalty by leave-one-out."""
    features = list(rows[0].features)
    x = np.array([[row.features[name] for name in features] for row in rows])
    y = np.asarray(target, dtype=float)
    names = np.array([row.structure for row in rows])
    centre = {str(s): x[names == s].mean(0) for s in np.unique(names)}
    mean = {str(s): float(y[names == s].mean()) for s in np.unique(names)}
    z = x - np.array([centre[str(s)] for s in names])
    scale = np.where(z.std(0) > 1e-9, z.std(0), 1.0)
    ridge = RidgeCV(alphas=PENALTIES, fit_intercept=False)  # leave-one-out
    ridge.fit(z / scale, y - np.array([mean[str(s)] for s in names]))
    centres = {s: c.tolist() for s, c in centre.items()}
    return Line(features, centres, mean, scale.tolist(), np.ravel(ridge.coef_).tolist())


def out_of_fold(rows: Sequence[Row], target: Sequence[float]) -> Array:
    """Of each row the estimate by a line that has not seen its subject.

    Raises:
        ValueError: fewer than two subjects, or a structure that only one of them has.
    """
    subjects = [row.subject for row in rows]
    number = len(set(subjects))
    if number < 2:
        raise ValueError(f"the cases of the fit are of {number} subject; estimates need at least two")
    estimates = np.full(len(rows), np.nan)
    for train, test in GroupKFold(min(FOLDS, number)).split(rows, groups=subjects):
        line = fit_line([rows[i] for i in train], [target[i] for i in train])
        for i in test:
            if rows[i].structure not in line.mean:
                raise ValueError(
                    f"the structure {rows[i].structure} occurs in one subject only ({rows[i].subject}): nothing can be "
                    "said about it; leave its case out, or fit on more folds"
                )
            estimates[i] = line.predict(rows[i].structure, rows[i].features)
    return estimates


def conformal_quantile(residuals: Sequence[float], alpha: float = ALPHA) -> float | None:
    """The ceil((n + 1)(1 - alpha))-th smallest residual; None if there are too few for any (n < 9 at alpha 0.1)."""
    rank = math.ceil((len(residuals) + 1) * (1 - alpha) - 1e-9)
    return None if rank > len(residuals) else float(sorted(residuals)[rank - 1])


@dataclass(frozen=True)
class Ranks:
    """Boundary distance as a rank among the calibration cases; its intervals in mm would be too wide to print.

    Attributes:
        line: estimates log(1 + HD95 in mm).
        thirds: by structure the out-of-fold estimates that part low, medium and high.
        rho: Spearman's, of out-of-fold estimates and truth, by structure.
    """

    line: Line
    thirds: Mapping[str, Sequence[float]]
    rho: Mapping[str, float]

    def rank(self, structure: str, features: Mapping[str, float]) -> str:
        """``low``, ``medium`` or ``high``; empty where too few cases have the structure."""
        if structure not in self.thirds:
            return ""
        value = self.line.predict(structure, features)
        return ("low", "medium", "high")[int(np.searchsorted(self.thirds[structure], value))]


@dataclass(frozen=True)
class Calibration:
    """What a fit leaves: the line, how far it errs, and how the features of its cases scatter.

    Attributes:
        line: fitted on all rows.
        quantile: half width of the interval by structure; None: too few cases.
        rows: of the fit, with their out-of-fold estimates (keys case, subject, structure, dice, estimate, soft,
            corrupted); ``soft``: soft Dice as it is, for comparison.
        clouds: of the clean cases by structure: their features, leave-one-out distances.
        ranks: None: too few cases.
    """

    line: Line
    quantile: Mapping[str, float | None]
    rows: Sequence[Mapping[str, Any]]
    clouds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ranks: Ranks | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Calibration":
        """Counterpart of `as_dict`."""
        ranks = content["ranks"]
        return Calibration(
            Line(**content["line"]),
            content["quantile"],
            content["rows"],
            content["clouds"],
            Ranks(**{**ranks, "line": Line(**ranks["line"])}) if ranks else None,
        )

    def interval(self, structure: str, estimate: float, quantile: float | None = None) -> tuple[float, float] | None:
        """Lowest and highest Dice, cut to 0 .. 1; None where there are too few cases for an interval."""
        half = self.quantile[structure] if quantile is None else quantile
        return None if half is None else (max(0.0, estimate - half), min(1.0, estimate + half))


def calibrate(rows: Sequence[Row]) -> Calibration:
    """Fit everything. Raises ValueError as `out_of_fold`."""
    dice = [row.dice for row in rows]
    estimates = np.clip(out_of_fold(rows, dice), 0, 1)
    structures = list(dict.fromkeys(row.structure for row in rows))
    quantile = {
        s: conformal_quantile([abs(r.dice - e) for r, e in zip(rows, estimates) if r.structure == s])
        for s in structures
    }
    table = [
        {
            "case": row.case,
            "subject": row.subject,
            "structure": row.structure,
            "dice": row.dice,
            "estimate": float(estimate),
            "soft": share_of_logit(row.features["soft"]),
            "corrupted": row.corrupted,
        }
        for row, estimate in zip(rows, estimates)
    ]
    line = fit_line(rows, dice)
    clouds = {s: _cloud(line, [r for r in rows if r.structure == s and not r.corrupted]) for s in structures}
    return Calibration(line, quantile, table, {s: c for s, c in clouds.items() if c is not None}, _ranks(rows))


def _ranks(rows: Sequence[Row]) -> Ranks | None:
    known = [row for row in rows if row.hd95 is not None]
    members: dict[str, list[Row]] = {}
    for row in known:
        members.setdefault(row.structure, []).append(row)
    enough = {s for s, own in members.items() if len(own) >= OWN_QUANTILE and len({r.subject for r in own}) > 1}
    known = [row for row in known if row.structure in enough]
    if not known:
        return None
    truth = np.log1p(np.array([row.hd95 for row in known], dtype=float))
    estimates = out_of_fold(known, truth.tolist())
    names = np.array([row.structure for row in known])
    thirds = {s: np.quantile(estimates[names == s], (1 / 3, 2 / 3)).tolist() for s in sorted(enough)}
    rho = {s: float(np.nan_to_num(spearman(estimates[names == s], truth[names == s]))) for s in sorted(enough)}
    return Ranks(fit_line(known, truth.tolist()), thirds, rho)


def spearman(one: Array, other: Array) -> float:
    """Correlation of ranks; NaN where one of the two does not vary."""
    varied = np.ptp(one) > 0 and np.ptp(other) > 0
    return float(stats.spearmanr(one, other).statistic) if varied else math.nan


# ---- unlike the calibration cases?


def _cloud(line: Line, rows: Sequence[Row]) -> dict[str, Any] | None:
    if len(rows) <= len(line.names) + 2:
        return None
    x = np.array([line.point(row.features) for row in rows])
    distances = [_distance(x[i], np.delete(x, i, 0)) for i in range(len(x))]
    return {"features": x.tolist(), "distances": distances}


def _distance(point: Array, others: Array) -> float:
    covariance = np.cov(others.T) + 1e-6 * np.eye(len(point))
    difference = point - others.mean(0)
    return float(difference @ np.linalg.solve(covariance, difference))


def is_outside(calibration: Calibration, structure: str, features: Mapping[str, float]) -> bool | None:
    """Whether the features lie further out than those of every calibration case; None where there are too few."""
    cloud = calibration.clouds.get(structure)
    if cloud is None:
        return None
    distance = _distance(calibration.line.point(features), np.asarray(cloud["features"]))
    return distance > max(cloud["distances"])


def alarm(outside: Sequence[bool], calibration_cases: int) -> bool:
    """Whether more cases lie outside than chance allows: binomial test at 0.01 with the chance 1 / (n + 1) each."""
    if not outside:
        return False
    test = stats.binomtest(sum(outside), len(outside), 1 / (calibration_cases + 1), alternative="greater")
    return bool(test.pvalue < _ALARM)


# ---- sets, local labels


def set_interval(
    calibration: Calibration, structure: str, number: int, local: Sequence[float] = (), seed: int = 0
) -> tuple[float, float] | None:
    """How far the mean estimate of `number` cases may be off: lower and upper quantile of resampled residuals.

    Args:
        local: errors (truth - corrected estimate) of labelled local cases; their resampled mean widens the interval.
    """
    residuals: dict[str, list[float]] = {}
    for row in calibration.rows:
        if row["structure"] == structure:
            residuals.setdefault(row["subject"], []).append(row["dice"] - row["estimate"])
    means = np.array([np.mean(own) for own in residuals.values()])
    if len(means) < OWN_QUANTILE or number < 1:
        return None
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(means, (_DRAWS, number)).mean(1)]
    if len(local):
        drawn.append(rng.choice(np.asarray(local), (_DRAWS, len(local))).mean(1))
    ends = np.array([np.quantile(d, (ALPHA / 2, 1 - ALPHA / 2)) for d in drawn])
    return float(ends[:, 0].min()), float(ends[:, 1].max())


def local_correction(
    dice: Sequence[float], estimates: Sequence[float], fitted: float | None
) -> tuple[float, float | None]:
    """What labelled cases of the new site change: an offset of all estimates, and the new half width.

    Args:
        dice, estimates: of the k local cases that have a label.
        fitted: half width of the fit.

    Returns:
        ``sum(dice - estimate) / (k + 1)``; and for k < 9 the larger of the fitted half width and the largest local
        residual (each by the offset of the others), from 9 on their own conformal quantile.

    Raises:
        ValueError: fewer than three local cases.
    """
    errors = np.asarray(dice, dtype=float) - np.asarray(estimates, dtype=float)
    k = len(errors)
    if k < MIN_LOCAL:
        raise ValueError(f"{k} local labels are too few: label at least {MIN_LOCAL} cases of the new site")
    offset = float(errors.sum() / (k + 1))
    left_out = [abs(float(errors[i] - (errors.sum() - errors[i]) / k)) for i in range(k)]
    if k >= OWN_QUANTILE:
        return offset, conformal_quantile(left_out)
    return offset, None if fitted is None else max(fitted, *left_out)


# ---- how good are the estimates themselves?


def quality(
    truth: Sequence[float], estimates: Sequence[float], half: Sequence[float | None], threshold: float
) -> dict[str, float]:
    """Pearson's r, mean absolute error, share inside the interval, AUC for Dice below the threshold; NaN: undefined."""
    y, e = np.asarray(truth, dtype=float), np.asarray(estimates, dtype=float)
    inside = [abs(a - b) <= h for a, b, h in zip(y, e, half) if h is not None]
    varied = len(y) > 2 and y.std() > 0 and e.std() > 0
    return {
        "n": len(y),
        "r": float(np.corrcoef(y, e)[0, 1]) if varied else math.nan,
        "mae": float(np.abs(y - e).mean()) if len(y) else math.nan,
        "inside": float(np.mean(inside)) if inside else math.nan,
        "auc": auc(y < threshold, -e),
    }


def auc(positive: Sequence[bool] | npt.NDArray[np.bool_], score: Array) -> float:
    """Share of (positive, negative) pairs in which the positive has the higher score, ties half; NaN without both."""
    flags = np.asarray(positive, dtype=bool)
    ranks = stats.rankdata(score)
    n, m = int(flags.sum()), int((~flags).sum())
    return math.nan if not n or not m else float((ranks[flags].sum() - n * (n + 1) / 2) / (n * m))
