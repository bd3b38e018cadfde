"""Learning curves: from our epochs.csv, or from nnU-Net's training log."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.compare.arms import Arm
from nnunetv2_ext.compare.runs import FoldRun
from nnunetv2_ext.evaluate import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PSEUDO_DICE, VALIDATION_LOSS, SECONDS = "mean_fg_dice", "val_losses", "epoch_seconds"
# a line of nnU-Net's training_log_*.txt without its time stamp -> name in epochs.csv
_LOG_LINES = {"val_loss": VALIDATION_LOSS, "Pseudo dice": PSEUDO_DICE, "Epoch time:": SECONDS}
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: ")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Curve:
    """Figures of each epoch of a training.

    Attributes:
        epochs: (n,) from 0.
        columns: name as in epochs.csv to (n,), NaN where a figure is missing.
    """

    epochs: npt.NDArray[np.int64]
    columns: dict[str, npt.NDArray[np.float64]]

    @property
    def hours(self) -> npt.NDArray[np.float64]:
        """(n,) since the start, epochs' durations added up; NaN if they are unknown."""
        return np.cumsum(self.columns.get(SECONDS, np.full(len(self.epochs), math.nan))) / 3600


def read_curve(run: FoldRun) -> Curve | None:
    """The curve of a fold, None if it has neither file."""
    file = run.folder / "epochs.csv"
    rows = _from_csv(file) if file.is_file() else _from_logs(sorted(run.folder.glob("training_log_*.txt")))
    if not rows:
        return None
    epochs = sorted(rows)
    names = (PSEUDO_DICE, VALIDATION_LOSS, SECONDS)
    columns = {name: np.array([rows[e].get(name, math.nan) for e in epochs], dtype=float) for name in names}
    return Curve(np.array(epochs), columns)


def _from_csv(file: Path) -> dict[int, dict[str, float]]:
    with open(file, encoding="utf-8", newline="") as lines:
        return {
            int(row["epoch"]): {name: float(value) for name, value in row.items() if name != "epoch" and value}
            for row in csv.DictReader(lines)
        }


def _from_logs(files: Sequence[Path]) -> dict[int, dict[str, float]]:
    """Epochs of nnU-Net's logs; a continued training has several, whose later ones repeat epochs."""
    rows: dict[int, dict[str, float]] = {}
    epoch = None
    for file in files:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            text = _STAMP.sub("", line).strip()
            if re.fullmatch(r"Epoch \d+", text):
                epoch = int(text.split()[1])
                rows[epoch] = {}
            for start, name in _LOG_LINES.items() if epoch is not None else ():
                if text.startswith(start):
                    # "Pseudo dice [np.float32(0.81), np.float32(0.78)]": one number per class
                    values = [float(v) for v in _NUMBER.findall(text[len(start) :])]
                    finite = [v for v in values if math.isfinite(v)]
                    rows[int(epoch or 0)][name] = float(np.mean(finite)) if finite else math.nan
    return {e: row for e, row in rows.items() if row}


def training_hours(arm: Arm) -> float:
    """Mean duration of one training of one fold in hours, NaN if a log is missing."""
    curves = [read_curve(run) for run in arm.runs()]
    return float(np.mean([math.nan if c is None else c.hours[-1] for c in curves]))


def draw(arms: Sequence[Arm], path: Path, colours: Sequence[str]) -> bool:
    """Write a PNG: pseudo Dice and validation loss over steps (or epochs), pseudo Dice over hours.

    Thin lines are single trainings, the thick one is their mean.

    Returns:
        False, and no file, if no arm has a log.
    """
    curves = [
        [(curve, run.steps_per_epoch) for run in arm.runs() if (curve := read_curve(run)) is not None] for arm in arms
    ]
    if not any(curves):
        return False
    # nothing else tells a short trial run from a long training
    scale, unit = (1, "hours") if any(c.hours[-1] >= 1 for found in curves for c, _ in found) else (60, "minutes")
    in_steps = all(steps is not None for found in curves for _, steps in found)
    with plot.style():
        figure = plot.new_figure(15, 4.6)
        left, middle, right = figure.subplots(1, 3)
        for arm, found, colour in zip(arms, curves, colours, strict=False):
            at = [(c.epochs + 1) * (steps or 1) if in_steps else c.epochs + 1 for c, steps in found]
            _lines(left, at, [c.columns[PSEUDO_DICE] for c, _ in found], colour, arm.name)
            _lines(middle, at, [c.columns[VALIDATION_LOSS] for c, _ in found], colour, arm.name)
            _lines(
                right, [c.hours * scale for c, _ in found], [c.columns[PSEUDO_DICE] for c, _ in found], colour, arm.name
            )
        x = "optimiser step" if in_steps else "epoch"
        for axes, what, below in (
            (left, "pseudo Dice on validation patches, mean of classes", x),
            (middle, "nnU-Net's loss on validation patches", x),
            (right, "pseudo Dice against time", f"{unit} (by the clock, on the machine as it was)"),
        ):
            axes.set_title(what, fontsize=9)
            axes.set_xlabel(below)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        names = left.get_legend_handles_labels()
        figure.legend(*names, loc="outside lower center", ncols=min(4, max(1, len(names[1]))), frameon=False)
        plot.save(figure, path)
    return True


def _lines(
    axes: Axes, xs: Sequence[npt.NDArray], ys: Sequence[npt.NDArray[np.float64]], colour: str, name: str
) -> None:
    lines = [(x, y) for x, y in zip(xs, ys, strict=True) if np.isfinite(x).all()]
    if not lines:
        return
    several = len(lines) > 1
    for x, y in lines:
        marker = "." if len(x) < 15 and not several else None
        thin = {"lw": 0.6, "alpha": 0.45} if several else {"lw": 1.6, "label": name}
        axes.plot(x, y, color=colour, marker=marker, **thin)
    if several:
        end = min(x[-1] for x, _ in lines)
        grid = np.linspace(max(x[0] for x, _ in lines), end, 200)
        mean = np.mean([np.interp(grid, x, y) for x, y in lines], axis=0)
        single = len(lines[0][0]) == 1
        axes.plot(grid[-1:] if single else grid, mean[-1:] if single else mean, color=colour, lw=2, label=name,
                  marker="o" if single else None)  # fmt: skip
