"""A comparison for machines: JSON, CSV, and everything written to a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_ext import __version__
from nnunetv2_ext.compare import curves, pictures, plots
from nnunetv2_ext.compare.arms import differing_facts
from nnunetv2_ext.compare.report import Report, as_markdown, reading
from nnunetv2_ext.compare.statistics import Difference
from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.evaluate.table import as_csv, as_json, summarise


def write(report: Report, output: Path, images: Path | None = None, worst: int = 3) -> None:
    """All files of a comparison; pictures first, as the report gains their names and the extreme cases."""
    scores = report.scores
    plots.draw_differences(scores, report.differences, output / "differences.png")
    report.pictures["differences.png"] = "Differences case by case, with their means and 95 % intervals"
    plots.draw_boxes(scores, output / "boxes.png")
    report.pictures["boxes.png"] = "Scores of all cases"
    if curves.draw(scores.arms, output / "curves.png", plots.colours(scores)):
        report.pictures["curves.png"] = "Learning curves; thin lines: single trainings, thick: their mean"
    for d in report.primary if worst else ():
        file = f"cases_{re.sub(r'[^A-Za-z0-9_.-]+', '_', d.arm)}.png"
        report.extremes[d.arm] = pictures.draw_cases(scores, d, output / file, images, worst)
        if any(report.extremes[d.arm]):
            report.pictures[file] = f"Cases in which {d.arm} lost and gained most against {d.first}"
    atomic_write_text(output / "comparison.json", as_json(as_dict(report)))
    atomic_write_text(output / "cases.csv", as_csv(scores))
    atomic_write_text(output / "differences.csv", differences_csv(report))
    atomic_write_text(output / "report.md", as_markdown(report))


def as_dict(report: Report) -> dict[str, Any]:
    """Content for ``as_json``."""
    scores = report.scores
    summary = summarise(scores.averaged)
    shown = ("n", "mean", "sd", "median", "worst")
    return {
        "title": report.title,
        "date": report.date,
        "command": report.command,
        "nnunetv2_ext": __version__,
        "notes": report.notes,
        "structures": {s.key: s.name for s in scores.source.labels.structures},
        "tolerance_mm": dict(scores.source.rules.tolerance),
        "reading": reading(report),
        "cases": len(scores.cases),
        "arms": [
            {
                "name": arm.name,
                "trainer": arm.trainer,
                "repeats": {r.label: {f: str(run.predictions) for f, run in r.folds.items()} for r in arm.repeats},
                "scores": {
                    m.name: {c: {k: summary[arm.name, key, c][k] for k in shown} for c in scores.columns}
                    for key, m in scores.metrics.items()
                },
            }
            for arm in scores.arms
        ],
        "differing_settings": differing_facts(scores.arms),
        "differences": [_difference(d) for d in report.differences],
        "answers": [" ".join(sentences) for sentences in report.answers().values()],
        "extremes": {name: {"lost": lost, "gained": gained} for name, (lost, gained) in report.extremes.items()},
    }


def _difference(d: Difference) -> dict[str, Any]:
    return {
        "method": d.arm, "reference": d.first, "metric": d.metric.name, "structure": d.structure, "mean": d.mean,
        "interval_over_cases": [d.interval.low, d.interval.high], "resampled": d.unit, "number_resampled": d.units,
        "cases": d.n, "better": d.wins, "worse": d.losses, "equal": d.ties, "reading": d.direction,
        "by_repeat": d.by_repeat, "repeats_paired": d.paired_repeats, "pairs_of_trainings": d.agreeing[0],
        "pairs_that_agree": d.agreeing[1], "interval_over_repeats": [d.repeat_interval.low, d.repeat_interval.high],
        "by_fold": d.by_fold,
    }  # fmt: skip


def differences_csv(report: Report) -> str:
    """One row per method, metric, structure and case: the pairs behind every interval."""
    parts = []
    for d in report.differences:
        both = report.scores.case_scores(d.key, d.structure)
        pairs = {"value": both[d.arm], "reference": both[d.first], "difference": d.per_case}
        about = report.scores.per_case.assign(method=d.arm, metric=d.metric.name, structure=d.structure, **pairs)
        parts.append(about.rename_axis("case").reset_index())
    table = pd.concat(parts, ignore_index=True)
    head = ["method", "metric", "structure", "case", "fold", *pairs]
    return table[[*head, *(c for c in table if c not in head)]].to_csv(index=False, lineterminator="\n")
