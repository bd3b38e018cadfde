"""An evaluation as numbers: summary rows, a readable table, JSON like nnU-Net's summary.json, and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext import __version__
from nnunetv2_ext.evaluate.folder import Evaluation, mean_of_defined
from nnunetv2_ext.evaluate.metrics import (
    ABSENT,
    EMPTY_POLICIES,
    FOUND,
    IGNORE_DEFINITION,
    INVENTED,
    METRICS,
    MISSED,
    SURFACE_DEFINITION,
)

MEAN = "mean of structures"


@dataclass(frozen=True)
class Summary:
    """Distribution of a metric over the cases that have a value.

    Attributes:
        n: how many have one.
        mean, sd: sample standard deviation, NaN below two cases.
        median, q1, q3: quartiles.
        worst: the lowest value, or the highest where lower is better.
    """

    n: int
    mean: float
    sd: float
    median: float
    q1: float
    q3: float
    worst: float


def summarise(values: npt.NDArray[np.float64], higher_is_better: bool) -> Summary:
    """Summary of (cases,), in which NaN stands for no value."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return Summary(0, *[math.nan] * 6)
    q1, median, q3 = np.percentile(defined, (25, 50, 75))
    sd = float(defined.std(ddof=1)) if len(defined) > 1 else math.nan
    worst = defined.min() if higher_is_better else defined.max()
    return Summary(len(defined), float(defined.mean()), sd, float(median), float(q1), float(q3), float(worst))


def summaries(evaluation: Evaluation, metric: str) -> list[tuple[str, Summary]]:
    """One row per structure and, with several, one for the mean over structures of each case."""
    values, better = evaluation.values(metric), METRICS[metric].higher_is_better
    rows = [(s.name, summarise(values[:, i], better)) for i, s in enumerate(evaluation.structures)]
    if len(rows) > 1:
        rows.append((MEAN, summarise(evaluation.case_means(metric), better)))
    return rows


def definitions(evaluation: Evaluation) -> list[str]:
    """What the numbers mean, one sentence each."""
    rules = evaluation.source.rules
    lines = [f"{METRICS[m].name}: {METRICS[m].definition}." for m in rules.metrics]
    if "nsd" in rules.metrics:
        lines.append(f"Tolerance of NSD: {_tolerances(evaluation)}.")
    if any(m != "dice" for m in rules.metrics):
        lines.append(f"Surfaces: {SURFACE_DEFINITION}.")
    lines.append(f"Empty structures: {EMPTY_POLICIES[rules.empty]}")
    if evaluation.source.labels.ignore is not None:
        lines.append(f"Ignore label {evaluation.source.labels.ignore}: {IGNORE_DEFINITION}.")
    lines.append("Spread: SD over cases; quartiles in brackets.")
    return lines


def _tolerances(evaluation: Evaluation) -> str:
    tolerance = evaluation.source.rules.tolerance
    if len(set(tolerance.values())) == 1:
        return f"{next(iter(tolerance.values())):g} mm"
    return ", ".join(f"{name} {value:g} mm" for name, value in tolerance.items())


def as_markdown(evaluation: Evaluation, title: str) -> str:
    """Title, one table over all structures and metrics, worst cases, definitions; reads well on a terminal too."""
    head = ["structure", *(METRICS[m].title for m in evaluation.metrics), "cases", "found", "missed", "invented"]
    rows = [head]
    columns = {m: summaries(evaluation, m) for m in evaluation.metrics}
    for i, (name, _) in enumerate(columns[evaluation.metrics[0]]):
        index = i if i < len(evaluation.structures) else None
        numbers = [_cell(columns[m][i][1]) for m in evaluation.metrics]
        absent = evaluation.count(ABSENT, index)
        total = evaluation.count(FOUND, index) + evaluation.count(MISSED, index) + evaluation.count(INVENTED, index)
        counts = [str(evaluation.count(state, index)) for state in (FOUND, MISSED, INVENTED)]
        cases = f"{total} (absent in {absent})" if absent and index is not None else str(total)
        rows.append([name, *numbers, cases if index is not None else str(len(evaluation.cases)), *counts])
    parts = [f"# {title}", grid(rows), _worst(evaluation), "\n".join(f"- {line}" for line in definitions(evaluation))]
    return "\n\n".join(part for part in parts if part) + "\n"


def grid(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A markdown table with aligned columns, the first ``left`` of them to the left; the first row is the head."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def number(value: float) -> str:
    """Three decimals below 10, fewer above; ``-`` for none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _cell(s: Summary) -> str:
    if not s.n:
        return "-"
    return f"{number(s.mean)} ± {number(s.sd)} [{number(s.q1)}, {number(s.median)}, {number(s.q3)}]"


def _worst(evaluation: Evaluation, shown: int = 3) -> str:
    """The cases with the lowest mean over structures of the first metric."""
    metric = evaluation.metrics[0]
    means = evaluation.case_means(metric)
    order = [i for i in np.argsort(means if METRICS[metric].higher_is_better else -means) if np.isfinite(means[i])]
    names = ", ".join(f"{evaluation.cases[i]} ({number(means[i])})" for i in order[:shown])
    return f"Worst cases by {METRICS[metric].title}: {names}" if names else ""


def as_dict(evaluation: Evaluation, predictions: str, truth: str) -> dict[str, Any]:
    """JSON content; ``metric_per_case``, ``mean`` and ``foreground_mean`` are laid out as in nnU-Net's summary.json.

    Undefined values are null.
    """
    structures, metrics = evaluation.structures, evaluation.metrics
    mean = {
        s.key: {METRICS[m].name: _plain(mean_of_defined(evaluation.values(m)[:, i], 0).item()) for m in metrics}
        for i, s in enumerate(structures)
    }
    per_case = [
        {
            "case": pair.case,
            "prediction_file": str(pair.prediction),
            "reference_file": str(pair.truth),
            "metrics": {
                structure.key: {METRICS[m].name: _plain(score.values[m]) for m in metrics}
                | {"state": score.state, "truth_ml": score.truth_ml, "prediction_ml": score.prediction_ml}
                for structure, score in zip(structures, row, strict=True)
            },
        }
        for pair, row in zip(evaluation.pairs, evaluation.scores, strict=True)
    ]
    foreground = {}
    for m in metrics:
        defined = [v for s in structures if (v := mean[s.key][METRICS[m].name]) is not None]
        foreground[METRICS[m].name] = float(np.mean(defined)) if defined else None
    return {
        "predictions": predictions,
        "truth": truth,
        "structures": {s.key: s.name for s in structures},
        "tolerance_mm": dict(evaluation.source.rules.tolerance),
        "empty_policy": evaluation.source.rules.empty,
        "definitions": definitions(evaluation),
        "nnunetv2_ext": __version__,
        "summary": {
            METRICS[m].name: {name: _plain_dict(asdict(s)) for name, s in summaries(evaluation, m)} for m in metrics
        },
        "foreground_mean": foreground,
        "mean": mean,
        "metric_per_case": per_case,
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _plain_dict(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) if isinstance(v, float) else v for k, v in values.items()}


def as_csv(evaluation: Evaluation) -> str:
    """One row per case and structure."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = [METRICS[m].name for m in evaluation.metrics]
    table.writerow(["case", "structure", "state", *names, "truth_ml", "prediction_ml"])
    for case, row in zip(evaluation.cases, evaluation.scores, strict=True):
        for structure, score in zip(evaluation.structures, row, strict=True):
            values = [_plain(score.values[m]) for m in evaluation.metrics]
            shown = ["" if v is None else repr(v) for v in values]
            table.writerow([case, structure.name, score.state, *shown, repr(score.truth_ml), repr(score.prediction_ml)])
    return text.getvalue()
