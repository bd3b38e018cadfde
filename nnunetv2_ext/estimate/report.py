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
from nnunetv2_ext.estimate.apply import Result
from nnunetv2_ext.estimate.calibration import ALPHA, Calibration, quality
from nnunetv2_ext.estimate.fit import NOT_A_MEASUREMENT, Fitted

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
    """Markdown: how well the out-of-fold estimates agree with the truth, beside the constant control."""
    lines = [f"# Estimated Dice: the fit ({NOT_A_MEASUREMENT})", ""]
    lines += [
        f"Out-of-fold estimates of the validation cases of folds {', '.join(fitted.hashes)}; {1 - ALPHA:.0%} intervals",
        f"AUC: how well a Dice below {threshold:g} is found. Control: every case gets the structure's mean.",
        "",
        "| structure | copies | n | r | MAE | inside | AUC | MAE of the control | AUC of the control | half width |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    c = fitted.calibration
    for structure, half in c.quantile.items():
        for corrupted in (False, True):
            rows = [r for r in c.rows if r["structure"] == structure and r["corrupted"] == corrupted]
            if not rows:
                continue
            truth = [r["dice"] for r in rows]
            ours = quality(truth, [r["estimate"] for r in rows], [half] * len(rows), threshold)
            clean = [r["dice"] for r in c.rows if r["structure"] == structure and not r["corrupted"]]
            control = quality(truth, [float(np.mean(clean))] * len(rows), [None] * len(rows), threshold)
            cells = [structure, "corrupted" if corrupted else "clean", str(ours["n"])]
            cells += [_number(ours[k], 2 if k != "mae" else 3) for k in ("r", "mae", "inside", "auc")]
            cells += [_number(control["mae"]), _number(control["auc"], 2), "-" if half is None else f"{half:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", RANKING]
    return "\n".join(lines) + "\n"


def draw_fit(calibration: Calibration, path: Path, title: str) -> None:
    """Out-of-fold estimate against truth, a panel a structure, with the band of the interval."""
    structures = list(calibration.quantile)
    with matplotlib.style.context("default"):
        columns = min(4, len(structures))
        rows = math.ceil(len(structures) / columns)
        figure = Figure(figsize=(3.6 * columns, 3.6 * rows + 0.7), layout="constrained")
        figure.suptitle(f"{title}\n{NOT_A_MEASUREMENT}: out of fold", fontsize=11)
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


def apply_report(result: Result) -> str:
    """Markdown: set means, alarm, and every structure of every case, worst first."""
    lines = [f"# Estimated Dice ({NOT_A_MEASUREMENT})", ""]
    if result.local:
        lines.append(f"Corrected by {result.local} labelled cases of this site.")
    else:
        lines.append(f"**{RANKING}**")
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
    else:
        lines.append(NO_ALARM)
    lines += ["", "| case | structure | estimate | from | to | | why |", "|---|---|---|---|---|---|---|"]
    for e in result.estimates:
        cells = [e.case, e.structure, _number(e.estimate), _number(e.low), _number(e.high), e.flag, e.why]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_results(result: Result, output: Path) -> None:
    """estimate.md, estimate.csv and estimate.json."""
    atomic_write_text(output / "estimate.md", apply_report(result))
    text = io.StringIO()
    note = "corrected by local labels" if result.local else "for images of another site: a ranking, not an estimate"
    text.write(f"# {NOT_A_MEASUREMENT}; {note}\n")
    writer = csv.writer(text, lineterminator="\n")
    names = ["case", "structure", "estimate", "low", "high", "flag", "why"]
    writer.writerow(names)
    for e in result.estimates:
        numbers = ["" if math.isnan(v) else f"{v:.4f}" for v in (e.estimate, e.low, e.high)]
        writer.writerow([e.case, e.structure, *numbers, e.flag, e.why])
    atomic_write_text(output / "estimate.csv", text.getvalue())
    content: dict[str, Any] = {"what": NOT_A_MEASUREMENT, "note": note, **asdict(result)}
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
        figure.suptitle(f"worst cases: {NOT_A_MEASUREMENT}", fontsize=11)
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
