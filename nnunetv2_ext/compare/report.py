"""A comparison as markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnunetv2_ext import __version__
from nnunetv2_ext.compare.collect import COMMON_RULE, Scores
from nnunetv2_ext.compare.curves import training_hours
from nnunetv2_ext.compare.runs import TRAINING_FACTS, differing_facts
from nnunetv2_ext.compare.statistics import RESAMPLES, Difference, Interval, signed, verdict
from nnunetv2_ext.evaluate.metrics import INVENTED, METRICS, MISSED
from nnunetv2_ext.evaluate.table import definitions, grid, number, summarise


@dataclass
class Report:
    """Everything that goes into the files.

    Attributes:
        title: dataset, configuration, plans.
        scores: what was measured.
        differences: of ``statistics.all_differences``.
        notes: warnings for the reader.
        pictures: file name to caption, of the plots that were written.
        extremes: arm to the cases that lost and gained most.
        command: that repeats this.
        date: ISO.
    """

    title: str
    scores: Scores
    differences: Sequence[Difference]
    notes: list[str]
    command: str
    date: str
    pictures: dict[str, str] = field(default_factory=dict)
    extremes: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)


def as_markdown(report: Report) -> str:
    """The whole report."""
    return "\n\n".join([as_text(report), *_details(report)]) + "\n"


def as_text(report: Report) -> str:
    """What the terminal shows: the answer, scores and paired differences."""
    scores = report.scores
    names = [arm.name for arm in scores.arms]
    primary = METRICS[scores.source.rules.metrics[0]].name
    column = scores.columns[-1]
    answers = [verdict(d, names[d.arm], names[0]) for d in primary_differences(report)]
    repeats = ", ".join(f"{arm.name}: {len(arm.repeats)}" for arm in scores.arms)
    folds = ", ".join(dict.fromkeys(scores.folds))
    head = f"{len(scores.cases)} cases, fold {folds}; repeated trainings: {repeats}; {report.date}"
    if set(scores.folds) == {"test"}:
        head = f"{len(scores.cases)} test cases; repeats: {repeats}; {report.date}"
    parts = [
        f"# {report.title}",
        head,
        f"## Answer ({primary}, {column}; the rest is detail)",
        "\n".join(f"- {answer}" for answer in answers + cautions(scores)),
    ]
    if report.notes:
        parts += ["\n".join(f"- Note: {note}." for note in report.notes)]
    parts += ["## Scores (mean ± SD over cases, each averaged over repeats)", _scores_table(report)]
    parts += ["## Paired differences", _difference_table(report)]
    return "\n\n".join(parts)


def cautions(scores: Scores) -> list[str]:
    """What a reader of the answer alone must know: structures that were never found, unequal settings, sparse truth."""
    lines = []
    metric = scores.source.rules.metrics[0]
    if METRICS[metric].higher_is_better:
        for c, structure in enumerate(scores.structures):
            found = [np.nanmax(scores.case_scores(metric, a)[:, c], initial=0) > 0 for a in range(len(scores.arms))]
            never = [arm.name for arm, yes in zip(scores.arms, found) if not yes]
            if never:
                lines.append(
                    f"**{structure.name} was found in no case by {', '.join(never)}**: trainings that have not learned "
                    "a structure yet say little about methods; train longer."
                )
    unequal = [key for key in differing_facts(scores.arms) if key in _OUGHT_TO_BE_EQUAL]
    if unequal:
        lines.append(f"The trainings differ in {', '.join(unequal)} as well, which may explain a difference (below).")
    if scores.source.labels.ignore is not None:
        lines.append(
            "Voxels that the truth marks as ignore were not scored; --predictions with a dense --truth scores all."
        )
    return lines


# beside the method: what a fair comparison keeps the same
_OUGHT_TO_BE_EQUAL = (*TRAINING_FACTS, "mirroring")


def primary_differences(report: Report) -> list[Difference]:
    """First metric, mean over structures: the figure that was fixed before looking."""
    metric, column = report.scores.source.rules.metrics[0], report.scores.columns[-1]
    return [d for d in report.differences if d.metric == metric and d.column == column]


def _scores_table(report: Report) -> str:
    scores, metrics = report.scores, report.scores.source.rules.metrics
    rows = [["structure", "method", *(METRICS[m].title for m in metrics), "missed", "invented"]]
    for c, column in enumerate(scores.columns):
        for a, arm in enumerate(scores.arms):
            cells = []
            for m in metrics:
                s = summarise(scores.case_scores(m, a)[:, c], METRICS[m].higher_is_better)
                cells.append(f"{number(s.mean)} ± {number(s.sd)}")
            states = scores.states[a][:, :, c] if c < len(scores.structures) else scores.states[a]
            counts = [f"{(states == state).sum() / len(arm.repeats):g}" for state in (MISSED, INVENTED)]
            rows.append([column, arm.name, *cells, *counts])
    return grid(rows, left=2)


def _difference_table(report: Report) -> str:
    rows = [["metric", "method", "structure", "difference", "95 % over cases", "cases", "better : worse", "reading"]]
    for d in report.differences:
        span = f"{signed(d.interval.low)} .. {signed(d.interval.high)}"
        counts = f"{d.wins} : {d.losses}" + (f" ({d.ties} equal)" if d.ties else "")
        cells = [METRICS[d.metric].title, report.scores.arms[d.arm].name, d.column, signed(d.mean), span, str(d.n)]
        rows.append([*cells, counts, d.direction])
    return grid(rows, left=3)


def _details(report: Report) -> list[str]:
    scores = report.scores
    parts = ["## Repeated trainings and folds", _repeats_table(report), _repeats_remark(report)]
    facts = differing_facts(scores.arms)
    parts.append("## How the trainings differ")
    rows = [["setting", *(arm.name for arm in scores.arms)], *([key, *values] for key, values in facts.items())]
    hours = [training_hours(arm) for arm in scores.arms]
    if any(map(math.isfinite, hours)):
        rows.append(["hours per fold", *("-" if not math.isfinite(h) else f"{h:.2g}" for h in hours)])
    parts.append(grid(rows) if len(rows) > 1 else "They have the same settings, as far as the result folders tell.")
    if any(run.settings for arm in scores.arms for run in arm.runs()):
        parts.append("Settings that only one kind of trainer has are in each fold's nnunetv2_ext_settings.yaml.")
    if report.extremes:
        parts.append("## Cases that differ most")
        lines = []
        for name, (losses, gains) in report.extremes.items():
            lines.append(f"- {name} lost most in {_names(losses)}; gained most in {_names(gains)}.")
        parts.append("\n".join(lines))
    if report.pictures:
        parts += ["## Pictures", "\n\n".join(f"![{text}]({name})\n\n{text}" for name, text in report.pictures.items())]
    parts += ["## How to read this", "\n".join(f"- {line}" for line in reading(report))]
    folders = [f"- {arm.name}, {r.label}: {', '.join(str(run.predictions) for run in r.folds.values())}"
               for arm in scores.arms for r in arm.repeats]  # fmt: skip
    parts += ["## Made of", "\n".join(folders), f"nnunetv2-ext {__version__}, {report.date}:\n\n    {report.command}"]
    return parts


def _repeats_table(report: Report) -> str:
    rows = [["method", "differences by repeat", "95 % over repeats", "differences by fold"]]
    for d in primary_differences(report):
        by_repeat = ", ".join(f"{label}: {signed(value)}" for label, value in d.by_repeat.items())
        low, high = d.repeat_interval.low, d.repeat_interval.high
        span = f"{signed(low)} .. {signed(high)}" if math.isfinite(low) else "-"
        by_fold = ", ".join(f"{fold}: {signed(value)}" for fold, value in d.by_fold.items())
        rows.append([report.scores.arms[d.arm].name, by_repeat, span, by_fold])
    return grid(rows)


def _repeats_remark(report: Report) -> str:
    differences = primary_differences(report)
    if all(len(d.by_repeat) < 2 for d in differences):
        return "One training each: how much a repeated training would change the result was not measured."
    how = "Repeats of the same name are paired."
    if not all(d.paired_repeats for d in differences):
        how = "Repeats have no common names: each one minus the first method's average, interval by Welch's t."
    return f"{how} The interval over repeats is Student's t on these figures; with two repeats it is very wide."


def _names(cases: Sequence[str]) -> str:
    return ", ".join(cases) or "no case"


def reading(report: Report) -> list[str]:
    """What the figures mean and what they do not."""
    scores, first = report.scores, report.scores.arms[0].name
    metrics = scores.source.rules.metrics
    evaluation = scores.evaluations[0][0][0]
    shown = [line for line in definitions(evaluation) if not line.startswith("Spread")]
    count = len(report.differences)
    return [
        f"Differences are method minus {first}, case by case. The paired unit is the case: its score is first averaged "
        "over repeated trainings, so more seeds do not count as more patients.",
        f"The interval over cases is a bootstrap of {scores.columns[-1]} and of each structure over cases (BCa, "
        f"{RESAMPLES} draws, scipy.stats.bootstrap, fixed seed): what other patients of the same kind would give with "
        "these trained networks. It does not know that a repeated training gives other networks; that is the interval "
        "over repeats.",
        "Cases of one patient, or validated by the same fold's network, are not quite independent; the interval is "
        "then somewhat too narrow.",
        f"There are {count} intervals here, each 95 %, not corrected for their number: about one in twenty misses by "
        f"chance. The answer above rests on {METRICS[metrics[0]].name} of {scores.columns[-1]} alone; take the others "
        "as hints.",
        "A difference beyond chance may still be too small to matter; judge its size in the scores' units.",
        "Validation cases that were used to choose settings favour the method they were chosen for; a test set "
        "does not.",
        "Missed: empty in the prediction only; invented: empty in the truth only; numbers per repeat.",
        COMMON_RULE + ".",
        *shown,
    ]


# ---- files for machines


def as_dict(report: Report) -> dict[str, Any]:
    """JSON content; undefined values are null."""
    scores = report.scores
    metrics = scores.source.rules.metrics
    return {
        "title": report.title,
        "date": report.date,
        "command": report.command,
        "nnunetv2_ext": __version__,
        "notes": report.notes,
        "structures": {s.key: s.name for s in scores.structures},
        "tolerance_mm": dict(scores.source.rules.tolerance),
        "reading": reading(report),
        "cases": len(scores.cases),
        "arms": [
            {
                "name": arm.name,
                "trainer": arm.trainer,
                "repeats": {r.label: {f: str(run.predictions) for f, run in r.folds.items()} for r in arm.repeats},
                "scores": {
                    METRICS[m].name: {column: _summary(scores, m, index, c) for c, column in enumerate(scores.columns)}
                    for m in metrics
                },
            }
            for index, arm in enumerate(scores.arms)
        ],
        "differing_settings": differing_facts(scores.arms),
        "differences": [_difference(report, d) for d in report.differences],
        "answers": [verdict(d, scores.arms[d.arm].name, scores.arms[0].name) for d in primary_differences(report)],
        "extremes": {name: {"lost": lost, "gained": gained} for name, (lost, gained) in report.extremes.items()},
    }


def _summary(scores: Scores, metric: str, arm: int, column: int) -> dict[str, Any]:
    values = scores.case_scores(metric, arm)[:, column]
    s = summarise(values, METRICS[metric].higher_is_better)
    return {"n": s.n, "mean": _plain(s.mean), "sd": _plain(s.sd), "median": _plain(s.median), "worst": _plain(s.worst)}


def _difference(report: Report, d: Difference) -> dict[str, Any]:
    return {
        "method": report.scores.arms[d.arm].name,
        "reference": report.scores.arms[0].name,
        "metric": METRICS[d.metric].name,
        "structure": d.column,
        "mean": _plain(d.mean),
        "interval_over_cases": _bounds(d.interval),
        "cases": d.n,
        "better": d.wins,
        "worse": d.losses,
        "equal": d.ties,
        "reading": d.direction,
        "by_repeat": {label: _plain(value) for label, value in d.by_repeat.items()},
        "repeats_paired": d.paired_repeats,
        "pairs_of_trainings": d.agreeing[0],
        "pairs_that_agree": d.agreeing[1],
        "interval_over_repeats": _bounds(d.repeat_interval),
        "by_fold": d.by_fold,
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _bounds(interval: Interval) -> list[float | None]:
    return [_plain(interval.low), _plain(interval.high)]


def cases_csv(scores: Scores) -> str:
    """One row per method, repeat, case and structure: everything that was measured, before any averaging."""
    metrics = scores.source.rules.metrics
    rows: list[Mapping[str, Any]] = []
    for arm, repeats in zip(scores.arms, scores.evaluations, strict=True):
        for repeat, folds in zip(arm.repeats, repeats, strict=True):
            for fold, evaluation in zip(repeat.folds, folds, strict=True):
                for case, line in zip(evaluation.cases, evaluation.scores, strict=True):
                    for structure, score in zip(scores.structures, line, strict=True):
                        values = {METRICS[m].name: _text(score.values[m]) for m in metrics}
                        head = {"method": arm.name, "repeat": repeat.label, "fold": fold, "case": case}
                        volumes = {"truth_ml": repr(score.truth_ml), "prediction_ml": repr(score.prediction_ml)}
                        rows.append({**head, "structure": structure.name, "state": score.state, **values, **volumes})
    return _csv(rows)


def differences_csv(report: Report) -> str:
    """One row per method, metric, structure and case: the pairs behind every interval."""
    scores = report.scores
    rows = []
    for d in report.differences:
        column = scores.columns.index(d.column)
        ours, theirs = (scores.case_scores(d.metric, a)[:, column] for a in (d.arm, 0))
        for case, fold, x, y in zip(scores.cases, scores.folds, ours, theirs, strict=True):
            head = {"method": scores.arms[d.arm].name, "metric": METRICS[d.metric].name, "structure": d.column}
            values = {"value": _text(x), "reference": _text(y), "difference": _text(x - y)}
            rows.append({**head, "case": case, "fold": fold, **values})
    return _csv(rows)


def _text(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
