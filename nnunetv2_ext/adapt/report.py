"""What an adaptation brought: tables of Dice before and after, with an interval, and a picture of the given cases."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
from nnunetv2_ext.core.files import atomic_write, atomic_write_text
from nnunetv2_ext.core.orientation import view_across

Scores = Mapping[str, Mapping[str, float]]  # case to structure to Dice
_PICTURED = 6
_THICK = 2.0  # times the smallest spacing


@dataclass(frozen=True)
class Comparison:
    """The same cases before and after.

    Attributes:
        title: which cases they are.
        before, after: Dice; `after` is empty where nothing could be left out.
    """

    title: str
    before: Scores
    after: Scores

    def mean(self, scores: Scores, structure: str | None = None) -> float:
        """Mean over cases, of one structure or of each case's mean; NaN without any."""
        values = [_mean([s[structure]] if structure else s.values()) for s in scores.values()]
        return _mean(values)

    def difference(self) -> tuple[float, float, float]:
        """Mean difference of the cases' means, and its 95 % interval (Student's t); NaN where there are too few."""
        pairs = [(_mean(self.before[c].values()), _mean(s.values())) for c, s in self.after.items() if c in self.before]
        changes = [after - before for before, after in pairs if not math.isnan(after - before)]
        if len(changes) < 2:
            return (changes[0] if changes else math.nan), math.nan, math.nan
        if np.ptp(changes) == 0:
            return changes[0], changes[0], changes[0]
        low, high = stats.ttest_1samp(changes, 0).confidence_interval(0.95)
        return float(np.mean(changes)), float(low), float(high)

    def sentence(self) -> str:
        """``+0.031 (95 % interval +0.010 to +0.052, 5 cases)``."""
        mean, low, high = self.difference()
        number = f"{len(self.after)} case{'s' if len(self.after) != 1 else ''}"
        interval = "no interval of one case" if math.isnan(low) else f"95 % interval {low:+.3f} to {high:+.3f}"
        return f"{mean:+.3f} ({interval}, {number})"

    def table(self) -> str:
        """Markdown: a row a structure, and the mean."""
        names = list(dict.fromkeys(name for scores in self.before.values() for name in scores))
        lines = ["| structure | before | after | change |", "|---|---|---|---|"]
        for label, name in [*((name, name) for name in names), ("**mean**", None)]:
            before, after = self.mean(self.before, name), self.mean(self.after, name)
            lines.append(f"| {label} | {_show(before)} | {_show(after)} | {_show(after - before, '+')} |")
        return "\n".join(lines)


def _mean(values: Any) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _show(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.3f}"


def warning(new: Comparison) -> str | None:
    """What to say where the gain could be chance, or where there is none to speak of."""
    mean, low, _ = new.difference()
    if math.isnan(mean):
        return None
    if math.isnan(low):
        return "WARNING: one case tells nothing about the gain; label more"
    if low <= 0:
        return f"WARNING: the gain of {mean:+.3f} on the new site is within its interval: it may be chance. Label more"
    return None


def write_csv(path: Path, fold_comparisons: Mapping[str, Sequence[Comparison]]) -> None:
    """A row a fold, case and structure."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["fold", "cases", "case", "structure", "before", "after"])
    for fold, comparisons in fold_comparisons.items():
        for one in comparisons:
            for case, scores in one.before.items():
                for name, before in scores.items():
                    after = one.after.get(case, {}).get(name, math.nan)
                    rows.writerow([fold, one.title, case, name, *("" if math.isnan(v) else f"{v:.5f}"
                                                                  for v in (before, after))])  # fmt: skip
    atomic_write_text(path, text.getvalue())


@dataclass(frozen=True)
class Pictured:
    """A case: image and label maps ``(X, Y, Z)`` in array order; `after` is None where the case was not left out."""

    case: str
    image: np.ndarray
    truth: np.ndarray
    before: np.ndarray
    after: np.ndarray | None
    spacing: tuple[float, ...]  # mm
    directions: np.ndarray | None = None  # of the axes (core/orientation.py); None: not known

    @property
    def axis(self) -> int:
        """That is cut: the one of thick slices, else the patient's feet to head."""
        thickest = int(np.argmax(self.spacing))
        if self.directions is None or self.spacing[thickest] > _THICK * min(self.spacing):
            return thickest if self.spacing[thickest] > _THICK * min(self.spacing) else 0
        return int(np.argmax(np.abs(self.directions[:, 2])))


def draw_cases(path: Path, cases: Sequence[Pictured], classes: Mapping[int, str], title: str) -> None:
    """A row a case: truth, the model before, and after without having seen the case; upright, at the fullest slice."""
    shown = cases[:_PICTURED]
    present: set[int] = set()
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(8.2, 2.7 * len(shown) + 0.9), layout="constrained")
        figure.suptitle(title, wrap=True)
        for cells, one in zip(figure.subplots(len(shown), 3, squeeze=False), shown):
            index, view = fullest_slice(one.truth, one.axis), view_across(one.axis, one.directions)
            spacing = view.spacing(one.spacing)
            cells[0].set_ylabel(f"{one.case}\n{view.caption(index)}", fontsize=8)
            maps = {"truth": one.truth, "before": one.before, "after, not trained on it": one.after}
            for cell, (name, labels) in zip(cells, maps.items()):
                if labels is None:
                    cell.set_axis_off()
                    continue
                cut = view.cut(labels, index)
                draw_slice(
                    cell, view.cut(one.image, index), cut, classes, spacing=spacing, letters=view.letters, title=name
                )
                present |= {int(value) for value in np.unique(cut)}
        add_legend(figure, classes, present)
        atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
