"""What a fit and an application leave for people to read: Markdown, CSV, JSON, pictures."""

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.core.labelmaps import names_of_values
from nnunetv2_ext.core.orientation import directions_of, view_across
from nnunetv2_ext.data.case import find_reader, read_image, read_label_map, spacing_of
from nnunetv2_ext.estimate.calibration import ALPHA, MIN_LOCAL, Calibration, quality
from nnunetv2_ext.estimate.fit import NOT_A_MEASUREMENT, Fitted
from nnunetv2_ext.estimate.result import Result

RANKING = (
    "If these images are of another site, scanner or sequence than the training cases, the numbers are a ranking, not "
    "an estimate: label five of these cases and give them with --local-labels."
)
NO_ALARM = (
    "No sign of a shift in the confidence features. A confident model can be wrong on a new scanner: this is not a "
    "clearance."
)
_WORST = 5


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def fit_report(fitted: Fitted, threshold: float) -> str:
    """Markdown: how well the out-of-fold estimates agree with the truth, beside the controls."""
    c = fitted.calibration
    source = "saved probabilities" if fitted.saved else "predictions"
    lines = [f"# Estimated Dice: the fit ({NOT_A_MEASUREMENT})", ""]
    lines += [
        f"Out-of-fold estimates from {source} of the validation cases of folds {', '.join(fitted.hashes)}; "
        f"{1 - ALPHA:.0%} intervals; features {', '.join(c.line.names)}.",
        f"MAE: mean absolute error. AUC: how well a Dice below {threshold:g} is found. Controls: soft Dice as it is, "
        "without a fit; and the structure's mean for every case.",
        "",
        "| structure | copies | n | r | MAE | inside | AUC | soft Dice: MAE | AUC | mean: MAE | AUC | half width |",
        f"|{'---|' * 12}",
    ]
    for structure, half in c.quantile.items():
        clean = [r["dice"] for r in c.rows if r["structure"] == structure and not r["corrupted"]]
        for corrupted in (False, True):
            rows = [r for r in c.rows if r["structure"] == structure and r["corrupted"] == corrupted]
            if not rows:
                continue
            truth = [r["dice"] for r in rows]
            ours = quality(truth, [r["estimate"] for r in rows], [half] * len(rows), threshold)
            soft = quality(truth, [r["soft"] for r in rows], [None] * len(rows), threshold)
            mean = quality(truth, [float(np.mean(clean or truth))] * len(rows), [None] * len(rows), threshold)
            cells = [structure, "corrupted" if corrupted else "clean", str(ours["n"]), _number(ours["r"], 2)]
            cells += [_number(ours["mae"]), _number(ours["inside"], 2), _number(ours["auc"], 2)]
            for control in (soft, mean):
                cells += [_number(control["mae"]), _number(control["auc"], 2)]
            lines.append(f"| {' | '.join([*cells, '-' if half is None else f'{half:.3f}'])} |")
    if c.ranks:
        rho = ", ".join(f"{s} {value:.2f}" for s, value in c.ranks.rho.items())
        lines += ["", f"Boundary distance (HD95) is given as a rank only. Rank correlation out of fold: {rho}."]
    lines += ["", RANKING]
    return "\n".join(lines) + "\n"


def draw_fit(calibration: Calibration, path: Path, title: str) -> None:
    """Out-of-fold estimate against truth, a panel a structure, with the band of the interval."""
    structures = list(calibration.quantile)
    with matplotlib.style.context("default"):
        columns = min(4, len(structures))
        rows = math.ceil(len(structures) / columns)
        figure = Figure(figsize=(3.6 * columns, 3.6 * rows + 0.7), layout="constrained")
        figure.suptitle(f"{title}\n{NOT_A_MEASUREMENT}: out of fold", fontsize=11, wrap=True)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, structure in zip(grid, structures):
            line = np.linspace(0, 1, 50)
            half = calibration.quantile[structure]
            if half is not None:
                axes.fill_between(line, line - half, line + half, color="0.9", label=f"{1 - ALPHA:.0%} interval")
            axes.plot(line, line, color="0.6", linewidth=1)
            for corrupted, colour, name in ((False, "#0072B2", "clean"), (True, "#D55E00", "corrupted copy")):
                own = [r for r in calibration.rows if r["structure"] == structure and r["corrupted"] == corrupted]
                if own:
                    axes.scatter(
                        [r["estimate"] for r in own], [r["dice"] for r in own], 14, colour, label=name, alpha=0.7
                    )
            axes.set(
                xlim=(0, 1), ylim=(0, 1), xlabel="estimated Dice", ylabel="true Dice", title=structure, aspect="equal"
            )
        for axes in grid[len(structures) :]:
            axes.set_visible(False)
        grid[0].legend(fontsize=8, loc="upper left")
        figure.savefig(path, dpi=110)


def note(result: Result) -> str:
    """What the numbers are, in one line."""
    ranking = "for images of another site: a ranking, not an estimate"
    if not result.local:
        return ranking
    rest = [s for s in result.sets if s not in result.local]
    text = f"corrected by local labels: {', '.join(result.local)}"
    return f"{text}; {', '.join(rest)} {ranking}" if rest else text


def apply_report(result: Result) -> str:
    """Markdown: set means, alarm, and every structure of every case, worst first."""
    lines = [f"# Estimated Dice ({NOT_A_MEASUREMENT})", ""]
    rest = [s for s in result.sets if s not in result.local]
    if result.local:
        lines += [
            "| structure | local labels | added | estimates: MAE | mean of the labels: MAE |",
            "|---|---|---|---|---|",
        ]
        for structure, local in result.local.items():
            cells = [structure, str(local.number), f"{local.offset:+.3f}", _number(local.error), _number(local.control)]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "Corrected by labelled cases of this site. MAE: on each of them, corrected by the others.", ""]
    if rest:
        few = f"{', '.join(rest)}: fewer than {MIN_LOCAL} local labels have it. " if result.local else ""
        lines.append(f"**{few}{RANKING}**")
    if len(result.folds) > 1:
        lines.append(
            f"Mean of the estimates of {len(result.folds)} single folds; their ensemble is a little better than that."
        )
    lines += ["", "| structure | mean | from | to | cases |", "|---|---|---|---|---|"]
    for structure, (mean, low, high, number) in result.sets.items():
        lines.append(f"| {structure} | {_number(mean)} | {_number(low)} | {_number(high)} | {number} |")
    lines.append("")
    if result.unlike:
        lines.append(f"**Unlike the calibration cases: {', '.join(result.unlike)}.** Do not rely on these numbers.")
    if watched := [s for s in result.sets if s not in result.unlike and s not in result.unwatched]:
        lines.append(f"{', '.join(watched)}: {NO_ALARM}")
    if result.unwatched:
        lines.append(f"{', '.join(result.unwatched)}: too few calibration cases to look for a shift.")
    if result.reverse:
        lines += ["", *_reverse(result)]
    lines += [
        "",
        "Boundary: HD95 as a rank among the calibration cases, low to high. A distance in mm is not estimated.",
        "",
        "| case | structure | estimate | from | to | boundary | measured | | why |",
        f"|{'---|' * 9}",
    ]
    for e in result.estimates:
        numbers = [_number(v) for v in (e.estimate, e.low, e.high)]
        measured = "" if e.measured is None else _number(e.measured)
        cells = [e.case, e.structure, *numbers, e.boundary, measured, e.flag, e.why]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _reverse(result: Result) -> list[str]:
    """SPE's scores beside their control, and what follows from the two."""
    lines = [
        "Reverse segmenter (SPE): it learnt from these segmentations, and this is its Dice on labelled cases of the "
        "fit. The score is not a Dice of these segmentations. Control: the same from perfect labels. Where the model's "
        "own masks score like perfect labels, the score cannot tell them apart.",
        *([result.licence] if result.licence else []),
        "",
        "| structure | these images | home: model's masks | home: perfect labels | home: true Dice of the masks | "
        "here: perfect labels |",
        f"|{'---|' * 6}",
    ]
    for structure, s in result.reverse.items():
        cells = [structure, *(_number(v) for v in (s.new, s.home, s.perfect, s.home_dice, s.local))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_results(result: Result, output: Path) -> None:
    """estimate.md, estimate.csv and estimate.json."""
    atomic_write_text(output / "estimate.md", apply_report(result))
    text = io.StringIO()
    text.write(f"# {NOT_A_MEASUREMENT}; {note(result)}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "structure", "estimate", "low", "high", "flag", "why", "boundary", "measured"])
    for e in result.estimates:
        numbers = ["" if v is None or math.isnan(v) else f"{v:.4f}" for v in (e.estimate, e.low, e.high, e.measured)]
        writer.writerow([e.case, e.structure, *numbers[:3], e.flag, e.why, e.boundary, numbers[3]])
    atomic_write_text(output / "estimate.csv", text.getvalue())
    content: dict[str, Any] = {"what": NOT_A_MEASUREMENT, "note": note(result), **asdict(result)}
    atomic_write_text(output / "estimate.json", json.dumps(_without_nan(content), indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return [_without_nan(v) for v in value] if isinstance(value, (list, tuple)) else value


def draw_worst(result: Result, images: Path, output: Path, dataset_json: dict[str, Any], path: Path) -> None:
    """The five worst cases: a slice of each with its segmentation and its lowest estimate."""
    ending = str(dataset_json["file_ending"])
    lowest = {e.case: e for e in reversed(result.estimates)}
    cases = sorted(lowest, key=lambda case: result.estimates.index(lowest[case]))[:_WORST]
    classes = names_of_values(dataset_json)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(3.4 * len(cases), 4.4), layout="constrained")
        figure.suptitle(f"worst cases: {NOT_A_MEASUREMENT}\n{note(result)}", fontsize=9, wrap=True)
        present: set[int] = set()
        for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
            file = images / f"{case}_0000{ending}"
            reader = find_reader(ending, dataset_json.get("overwrite_image_reader_writer"), file)
            image, properties = read_image(case, [file], reader)
            label, _ = read_label_map(case, output / f"{case}{ending}", reader, "segmentation")
            view = view_across(0, directions_of(properties))
            index = fullest_slice(label, 0)
            e = lowest[case]
            value = "not found" if math.isnan(e.estimate) else f"{e.estimate:.2f}"
            draw_slice(
                axes,
                view.cut(image[0], index),
                view.cut(label, index),
                classes,
                spacing=view.spacing(spacing_of(properties)),
                letters=view.letters,
                title=f"{case}\n{e.structure}: {value}",
            )
            present |= {int(v) for v in np.unique(label)}
        add_legend(figure, classes, present)
        figure.savefig(path, dpi=110)
