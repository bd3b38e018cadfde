"""What the estimates of a set of cases say: corrected by local labels, with intervals and reasons, worst first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnunetv2_ext.estimate.calibration import MIN_LOCAL, alarm, local_correction, set_interval
from nnunetv2_ext.estimate.fit import Fitted
from nnunetv2_ext.estimate.reverse import Scores

NOT_FOUND = "not found"


@dataclass(frozen=True)
class Estimate:
    """One structure of one case.

    Attributes:
        estimate: expected Dice; NaN where the structure was not found.
        low, high: of the interval; NaN where there is none.
        flag: ``look`` where the estimate or the lower end is below the threshold, or nothing was found.
        why: for people.
        boundary: HD95 as a rank: low, medium, high, or empty.
        measured: Dice, where a local label exists.
    """

    case: str
    structure: str
    estimate: float
    low: float
    high: float
    flag: str = ""
    why: str = ""
    boundary: str = ""
    measured: float | None = None


@dataclass(frozen=True)
class Local:
    """What the labelled cases of the site changed for a structure.

    Attributes:
        number: labelled cases in which the structure was found.
        offset: added to every estimate.
        mean: their mean Dice, the control: without the estimates one would expect it of every case.
        error: mean absolute error of the estimates on the labelled cases, each corrected by the others; NaN below two.
        control: mean absolute error of the others' mean.
    """

    number: int
    offset: float
    mean: float
    error: float
    control: float


@dataclass(frozen=True)
class Result:
    """What `apply` found.

    Attributes:
        estimates: worst first.
        sets: by structure: mean estimate, lower and upper end of the mean's interval, number of cases.
        unlike: structures whose features lie outside of the calibration more often than chance allows.
        unwatched: structures with too few calibration cases for this alarm.
        local: by structure that at least three local labels have; the others stay a ranking.
        folds: of the ensemble.
        threshold: below which a case is flagged.
        reverse: scores of a reverse segmenter by structure, if asked for.
        licence: of the weights of that segmenter.
    """

    estimates: list[Estimate]
    sets: dict[str, tuple[float, float, float, int]]
    unlike: list[str]
    unwatched: list[str]
    local: dict[str, Local]
    folds: list[int]
    threshold: float
    reverse: dict[str, Scores] = field(default_factory=dict)
    licence: str = ""


def judged(rows: Sequence[dict[str, Any]], fitted: Fitted, folds: list[int], threshold: float) -> Result:
    """Estimates with intervals and reasons, worst first, from what `apply` found of each structure of each case.

    Args:
        rows: ``case``, ``structure``, ``found``, ``estimate``, ``outside``, ``boundary``, and ``measured`` or None.
        folds: of the ensemble.
        threshold: below which a case is flagged.
    """
    calibration = fitted.calibration
    estimates: list[Estimate] = []
    sets: dict[str, tuple[float, float, float, int]] = {}
    local: dict[str, Local] = {}
    unlike = []
    for structure in fitted.structures:
        own = [row for row in rows if row["structure"] == structure]
        if structure not in calibration.quantile:
            why = "the fit has no case with it"
            estimates += [
                Estimate(row["case"], structure, math.nan, math.nan, math.nan, "look", why, "", row["measured"])
                for row in own
            ]
            continue
        offset, half = 0.0, calibration.quantile[structure]
        labelled = [row for row in own if row["measured"] is not None and row["found"]]
        truth, guessed = ([row[key] for row in labelled] for key in ("measured", "estimate"))
        if len(labelled) >= MIN_LOCAL:
            offset, half = local_correction(truth, guessed, half)
            local[structure] = _local(truth, guessed, offset)
        found = []
        for row in own:
            if not row["found"]:
                estimates.append(
                    Estimate(
                        row["case"], structure, math.nan, math.nan, math.nan, "look", NOT_FOUND, "", row["measured"]
                    )
                )
                continue
            value = float(np.clip(row["estimate"] + offset, 0, 1))
            found.append(value)
            interval = calibration.interval(structure, value, half) or (math.nan, math.nan)
            reasons = []
            if value < threshold:
                reasons.append(f"estimate below {threshold:g}")
            elif interval[0] < threshold:
                reasons.append(f"lower end below {threshold:g}")
            if row["outside"]:
                reasons.append("unlike every calibration case")
            flag, text = "look" if reasons else "", "; ".join(reasons)
            estimates.append(
                Estimate(row["case"], structure, value, *interval, flag, text, row["boundary"], row["measured"])
            )
        if found:
            mean = float(np.mean(found))
            errors = [y - e - offset for y, e in zip(truth, guessed)] if structure in local else []
            error = set_interval(calibration, structure, len(found), errors) or (math.nan, math.nan)
            sets[structure] = (mean, *(float(np.clip(mean + e, 0, 1)) for e in error), len(found))  # type: ignore[assignment]
        clean = sum(r["structure"] == structure and not r["corrupted"] for r in calibration.rows)
        if alarm([r["outside"] for r in own if r["found"]], clean):
            unlike.append(structure)
    worst = sorted(estimates, key=lambda e: -1.0 if math.isnan(e.estimate) else e.estimate)
    unwatched = [s for s in sets if s not in calibration.clouds]
    return Result(worst, sets, unlike, unwatched, local, folds, threshold)


def _local(truth: Sequence[float], estimates: Sequence[float], offset: float) -> Local:
    y, e = np.asarray(truth), np.asarray(estimates)
    k = len(y)
    others = ((y - e).sum() - (y - e)) / k  # the offset by the k - 1 others
    control = (y.sum() - y) / (k - 1)
    return Local(
        k,
        offset,
        float(y.mean()),
        float(np.abs(y - np.clip(e + others, 0, 1)).mean()),
        float(np.abs(y - control).mean()),
    )
