"""An evaluation as numbers: summary rows, a readable table, JSON like nnU-Net's summary.json, and CSV."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_ext import __version__
from nnunetv2_ext.evaluate.folder import MEAN, Evaluation, with_mean
from nnunetv2_ext.evaluate.metrics import ABSENT, EMPTY_POLICIES, FOUND, INVENTED, METRICS, MISSED
from nnunetv2_ext.evaluate.pairs import listed


def summarise(table: pd.DataFrame) -> dict[tuple[str, ...], dict[str, float]]:
    """Distribution over the cases that have a value, of a long table as ``Evaluation.table``.

    By (arm if there are any, metric, structure): ``n``, how many have a value; ``mean``; ``sd``, the sample standard
    deviation, NaN below two cases; ``median, q1, q3``; ``worst``, the lowest value or, where lower is better, highest.
    """
    keys = [key for key in ("arm", "metric", "structure") if key in table]
    values = table.groupby(keys, sort=False)["value"]
    summary = values.agg(n="count", mean="mean", sd="std", median="median")
    summary["q1"], summary["q3"] = values.quantile(0.25), values.quantile(0.75)
    better = [METRICS[metric].higher_is_better for metric in summary.index.get_level_values("metric")]
    summary["worst"] = values.min().where(better, values.max())
    return summary.to_dict("index")


def count_states(table: pd.DataFrame) -> pd.Series:
    """By (arm if there are any, structure, state): in how many cases; with several structures for ``MEAN`` as well."""
    once = table[table["metric"] == table["metric"].iloc[0]]
    if once["structure"].nunique() > 1:
        once = pd.concat([once, once.assign(structure=MEAN)])
    return once.groupby([key for key in ("arm", "structure", "state") if key in once]).size()


def definitions(evaluation: Evaluation) -> list[str]:
    """What the numbers mean, one sentence each, and everything that was let pass."""
    rules, ignore, metrics = evaluation.source.rules, evaluation.source.labels.ignore, evaluation.metrics
    known = evaluation.files["spacing_known"].all()
    lines = [f"{m.name}: {m.definition}." for m in metrics.values()]
    if "nsd" in metrics:
        told = {name: f"{value:g} {'mm' if known else 'voxels'}" for name, value in rules.tolerance.items()}
        same = len(set(told.values())) == 1
        each = next(iter(told.values())) if same else ", ".join(f"{name} {value}" for name, value in told.items())
        lines.append(f"Tolerance of NSD: {each}.")
    if any(m != "dice" for m in metrics):
        lines.append(
            "Surfaces: surface voxels are those of the structure that touch a voxel outside it by a face (beyond the "
            "image is outside); distances run between voxel centres, Euclidean, in mm."
        )
    lines.append(f"Empty structures: {EMPTY_POLICIES[rules.empty]}")
    if ignore is not None:
        lines.append(
            f"Ignore label {ignore}: voxels under the truth's ignore label are left out of both; a border to them is "
            "no surface. Distances near them are upper bounds, as the nearest surface may lie under the ignore label."
        )
    if evaluation.files["spacing"].map(len).eq(2).any() and known:
        lines.append("Volumes: of 2-D files, truth_ml and prediction_ml are areas in square centimetres.")
    return [*lines, *relaxations(evaluation), "Spread: SD over cases; quartiles in brackets."]


def relaxations(evaluation: Evaluation) -> list[str]:
    """What was not compared or not known, one sentence each; belongs into every output."""
    lines, files = [], evaluation.files
    if evaluation.source.ignore_origin:
        differ = files.loc[files["remark"].str.contains("differing"), "case"].unique()
        found = f"they differ in {listed(list(differ))}" if len(differ) else "they agree in all cases"
        lines.append(f"Grids: origin and direction were not compared (--ignore-origin); {found}.")
    if not files["spacing_known"].all():
        lines.append("Spacing: the files do not tell the size of a voxel, so distances and tolerances are in voxels.")
    elif files["remark"].str.contains("only").any():
        lines.append("Spacing: one of a case's two files does not tell the size of a voxel; the other's was taken.")
    if evaluation.left_out:
        lines.append(f"Cases: without a prediction and left out (--chill): {listed(evaluation.left_out)}.")
    return lines


def as_markdown(evaluation: Evaluation, title: str, more: Sequence[str] = ()) -> str:
    """Title, one table over all structures and metrics, worst cases, ``more`` paragraphs, definitions."""
    metrics, table = evaluation.metrics, with_mean(evaluation.table)
    rows = [["structure", *(m.title for m in metrics.values()), "cases", FOUND, MISSED, INVENTED]]
    summary, counts = summarise(table), count_states(evaluation.table)
    for name in evaluation.columns:
        absent, *others = (int(counts.get((name, state), 0)) for state in (ABSENT, FOUND, MISSED, INVENTED))
        cases = str(sum(others)) + (f" (absent in {absent})" if absent else "")
        if name == MEAN:
            cases = str(len(evaluation.cases))
        rows.append([name, *(_cell(summary[m, name]) for m in metrics), cases, *map(str, others)])
    parts = [f"# {title}", grid(rows)]
    key, metric = next(iter(metrics.items()))  # the worst cases by the last column of the table
    means = table[(table["metric"] == key) & (table["structure"] == name)].dropna(subset="value")
    worst = means.sort_values("value", ascending=metric.higher_is_better, kind="stable").head(3)
    if len(worst):
        names = (f"{case} ({number(value)})" for case, value in zip(worst["case"], worst["value"], strict=True))
        parts.append(f"Worst cases by {metric.title}: {', '.join(names)}")
    return "\n\n".join([*parts, *more, "\n".join(f"- {line}" for line in definitions(evaluation))]) + "\n"


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


def _cell(s: dict[str, float]) -> str:
    if not s["n"]:
        return "-"
    return f"{number(s['mean'])} ± {number(s['sd'])} [{number(s['q1'])}, {number(s['median'])}, {number(s['q3'])}]"


def as_dict(evaluation: Evaluation, predictions: str, truth: str) -> dict[str, Any]:
    """For ``as_json``; ``metric_per_case``, ``mean`` and ``foreground_mean`` are as in nnU-Net's summary.json."""
    structures, metrics = evaluation.source.labels.structures, evaluation.metrics
    summary = summarise(with_mean(evaluation.table))
    means = {m.name: {s.key: summary[key, s.name]["mean"] for s in structures} for key, m in metrics.items()}
    columns = [*means, "state", "truth_ml", "prediction_ml"]
    measured = wide(evaluation).set_index(["case", "structure"])[columns].to_dict("index")
    return {
        "predictions": predictions,
        "truth": truth,
        "structures": {s.key: s.name for s in structures},
        "tolerance_mm": dict(evaluation.source.rules.tolerance),
        "empty_policy": evaluation.source.rules.empty,
        "definitions": definitions(evaluation),
        "nnunetv2_ext": __version__,
        "summary": {m.name: {name: summary[key, name] for name in evaluation.columns} for key, m in metrics.items()},
        "foreground_mean": {name: pd.Series(some).mean() for name, some in means.items()},
        "mean": {s.key: {name: some[s.key] for name, some in means.items()} for s in structures},
        "metric_per_case": [
            {
                "case": file.case,
                "prediction_file": str(file.prediction),
                "reference_file": str(file.truth),
                "remark": file.remark,
                "metrics": {s.key: measured[file.case, s.name] for s in structures},
            }
            for file in evaluation.files.itertuples()
        ],
    }


def as_json(content: Any) -> str:
    """The text of a JSON file; undefined numbers are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"


def wide(evaluation: Evaluation) -> pd.DataFrame:
    """One row per case and structure, and per arm and repeat if there are any; metrics are columns by their names."""
    table = evaluation.table
    first, *_ = parts = [table[table["metric"] == key].reset_index(drop=True) for key in evaluation.metrics]
    values = {m.name: part["value"] for m, part in zip(evaluation.metrics.values(), parts, strict=True)}
    volumes = ["truth_ml", "prediction_ml"]
    result = first.drop(columns=["metric", "value", *volumes]).assign(**values).join(first[volumes])
    keys = [key for key in ("arm", "repeat", "fold", "case") if key in table]
    return result.merge(evaluation.files[[*keys, "remark"]], on=keys, how="left")


def as_csv(evaluation: Evaluation) -> str:
    """One row per case and structure (and method and repeat): all that was measured, before any averaging."""
    return wide(evaluation).rename(columns={"arm": "method"}).to_csv(index=False, lineterminator="\n")
