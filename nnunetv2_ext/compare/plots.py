"""Box plots of all arms and the plot of paired differences."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from nnunetv2_ext.compare.scores import Scores
from nnunetv2_ext.compare.statistics import BETTER, WORSE, Difference
from nnunetv2_ext.evaluate import plot
from nnunetv2_ext.evaluate.intervals import signed
from nnunetv2_ext.evaluate.table import relaxations

# Okabe and Ito's, as in core.figures, in an order whose first two differ most; grey for the reference
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#666666"
_DIRECTIONS = {BETTER: "#009E73", WORSE: "#D55E00"}


def colours(scores: Scores) -> dict[str, str]:
    """One per arm; they repeat after seven."""
    return {arm.name: _COLOURS[(i - 1) % len(_COLOURS)] if i else _GREY for i, arm in enumerate(scores.arms)}


def draw_boxes(scores: Scores, path: Path, heading: str = "") -> None:
    """Write a PNG: per metric, a box per structure and arm; points are cases averaged over repeats."""
    title = f"{heading}\n{len(scores.cases)} cases, each averaged over an arm's repeats"
    plot.draw_boxes(scores, scores.averaged.assign(crossed=False), path, title, colours(scores))


def draw_differences(scores: Scores, differences: Sequence[Difference], path: Path, heading: str = "") -> None:
    """Write a PNG: per metric, each case's difference to the first arm as a point, the mean and its interval beside."""
    rows = len(differences) // len(scores.metrics)
    shift = np.random.default_rng(0)
    with plot.figure_file(path, 5.6 * len(scores.metrics), 2.0 + 0.62 * rows) as figure:
        title = (
            f"{heading}\nDifference to {scores.first}, case by case\n"
            f"point: a case; diamond and bar: mean and 95 % interval over {differences[0].unit}"
        )
        lines = "\n".join([title, *relaxations(scores)])
        figure.suptitle(lines, fontsize=9, wrap=True)
        panels = np.ravel(figure.subplots(1, len(scores.metrics)))
        for number, (axes, (key, metric)) in enumerate(zip(panels, scores.metrics.items(), strict=True)):
            axes.axvline(0, color="black", lw=0.8)
            chosen = [d for d in differences if d.key == key]
            for row, d in enumerate(chosen):
                if d.n:
                    _difference_row(axes, row, d, shift)
            names = [textwrap.fill(f"{d.arm}: {d.structure}", 30) for d in chosen]
            axes.set_yticks(range(rows), names if number == 0 else [""] * rows)
            axes.set_ylim(rows - 0.5, -0.6)
            axes.grid(axis="x", alpha=0.3)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            better = "right" if metric.higher_is_better else "left"
            axes.set_xlabel(f"{metric.title}, difference ({better} of 0 is better)")
        meanings = {_DIRECTIONS[BETTER]: "better", _DIRECTIONS[WORSE]: "worse", _GREY: "the interval holds zero"}
        handles = [Patch(color=colour, label=text) for colour, text in meanings.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def _difference_row(axes, row: int, d: Difference, shift: np.random.Generator) -> None:
    colour = _DIRECTIONS.get(d.direction, _GREY)
    axes.plot(d.per_case.dropna(), row + shift.uniform(-0.16, 0.16, d.n), "o", ms=3, mew=0, color=colour, alpha=0.4)
    axes.plot(d.interval, [row, row], color=colour, lw=3, solid_capstyle="butt")
    axes.plot(d.mean, row, "D", ms=6, color=colour, mec="white")
    box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.5}
    axes.annotate(f"{signed(d.mean)}  {d.interval}  {d.wins}:{d.losses}", (1, row - 0.3), fontsize=7, bbox=box,
                  xycoords=("axes fraction", "data"), ha="right", va="center")  # fmt: skip
