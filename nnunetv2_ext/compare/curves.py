"""Learning curves: from our epochs.csv, or from nnU-Net's training log."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nnunetv2_ext.compare.arms import Arm
from nnunetv2_ext.compare.runs import FoldRun
from nnunetv2_ext.evaluate import plot

PSEUDO_DICE, VALIDATION_LOSS, SECONDS, HOURS = "mean_fg_dice", "val_losses", "epoch_seconds", "hours"
# a line of nnU-Net's training_log_*.txt without its time stamp -> name in epochs.csv
_LOG_LINES = {"val_loss": VALIDATION_LOSS, "Pseudo dice": PSEUDO_DICE, "Epoch time:": SECONDS}
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: ")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)\b", re.IGNORECASE)


def read_curve(run: FoldRun) -> pd.DataFrame | None:
    """The curve of a fold by epoch from 0, None if it has neither file.

    Names as in epochs.csv, NaN where a figure is missing; ``hours`` since the start, epochs' durations added up.
    """
    try:
        rows = pd.read_csv(run.folder / "epochs.csv").drop_duplicates("epoch", keep="last").set_index("epoch")
    except (OSError, ValueError, KeyError):  # none, or damaged: a picture is not worth losing the scores
        rows = pd.DataFrame.from_dict(_from_logs(sorted(run.folder.glob("training_log_*.txt"))), orient="index")
    if rows.empty:
        return None
    curve = rows.reindex(columns=[PSEUDO_DICE, VALIDATION_LOSS, SECONDS]).sort_index()
    return curve.assign(hours=curve[SECONDS].cumsum(skipna=False) / 3600)


def _from_logs(files: Sequence[Path]) -> dict[int, dict[str, float]]:
    """Epochs of nnU-Net's logs; a continued training has several, whose later ones repeat epochs."""
    rows: dict[int, dict[str, float]] = {}
    for file in files:
        row: dict[str, float] = {}
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            text = _STAMP.sub("", line).strip()
            if re.fullmatch(r"Epoch \d+", text):
                row = rows[int(text.split()[1])] = {}
            for start, name in _LOG_LINES.items():
                if text.startswith(start):
                    # "Pseudo dice [np.float32(0.81), np.float32(0.78)]": one number per class
                    row[name] = pd.Series([float(v) for v in _NUMBER.findall(text[len(start) :])], dtype=float).mean()
    return {e: row for e, row in rows.items() if row}


def training_hours(arm: Arm) -> float:
    """Mean duration of one training of one fold in hours, NaN if a log is missing."""
    curves = [read_curve(run) for run in arm.runs()]
    return float(np.mean([math.nan if c is None else c[HOURS].iloc[-1] for c in curves]))


def draw(arms: Sequence[Arm], path: Path, colours: Mapping[str, str], heading: str = "") -> bool:
    """Write a PNG: pseudo Dice and validation loss over steps (or epochs), pseudo Dice over hours.

    Thin lines are single trainings, the thick one is their mean. False, and no file, if no arm has a log.
    """
    read = [(arm.name, run.steps_per_epoch, read_curve(run)) for arm in arms for run in arm.runs()]
    curves = [(name, steps, curve) for name, steps, curve in read if curve is not None]
    if not curves:
        return False
    # nothing else tells a short trial run from a long training
    scale, unit = (1, "hours") if any(c[HOURS].iloc[-1] >= 1 for *_, c in curves) else (60, "minutes")
    in_steps = all(steps is not None for _, steps, _ in curves)
    for _, steps, curve in curves:
        curve["step"], curve["time"] = (curve.index + 1) * (steps if in_steps else 1), curve[HOURS] * scale
    step, clock = "optimiser step" if in_steps else "epoch", f"{unit} (by the clock, on the machine as it was)"
    panels = (
        ("step", step, PSEUDO_DICE, "pseudo Dice on validation patches, mean of classes"),
        ("step", step, VALIDATION_LOSS, "nnU-Net's loss on validation patches"),
        ("time", clock, PSEUDO_DICE, "pseudo Dice against time"),
    )
    with plot.figure_file(path, 15, 4.9) as figure:
        figure.suptitle(heading, fontsize=10, wrap=True)
        for axes, (x, below, y, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for arm, colour in colours.items():
                lines = [(c[x].to_numpy(), c[y].to_numpy()) for name, _, c in curves if name == arm]
                _lines(axes, lines, colour, arm)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(below)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        names = figure.axes[0].get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=min(4, max(1, len(names[1]))), frameon=False)
    return True


def _lines(axes: Axes, lines: list[tuple[np.ndarray, np.ndarray]], colour: str, name: str) -> None:
    lines = [(x, y) for x, y in lines if np.isfinite(x).all()]
    for x, y in lines:
        thin = {"lw": 0.6, "alpha": 0.45} if len(lines) > 1 else {"lw": 1.6, "label": name}
        axes.plot(x, y, color=colour, marker="." if len(x) < 15 and len(lines) == 1 else None, **thin)
    if len(lines) > 1:
        single = len(lines[0][0]) == 1
        grid = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)[199 * single :]
        mean = np.mean([np.interp(grid, x, y) for x, y in lines], axis=0)
        axes.plot(grid, mean, color=colour, lw=2, label=name, marker="o" if single else None)
