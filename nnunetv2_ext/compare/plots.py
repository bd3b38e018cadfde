"""Box plots of all arms and the plot of paired differences."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunetv2_ext.compare.scores import Scores
from nnunetv2_ext.compare.statistics import BETTER, EQUAL, UNCLEAR, WORSE, Difference, signed
from nnunetv2_ext.evaluate import plot
from nnunetv2_ext.evaluate.table import relaxations

# Okabe and Ito's, as in core.overlay, in an order whose first two differ most; grey for the reference
_COLOURS = ("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_VERDICT_COLOURS = {BETTER: "#009E73", WORSE: "#D55E00", UNCLEAR: "#666666", EQUAL: "#666666"}


def colours(number: int) -> list[str]:
    """One colour per arm; they repeat after seven."""
    return [_COLOURS[0], *(_COLOURS[1 + i % (len(_COLOURS) - 1)] for i in range(number - 1))][:number]


def draw_boxes(scores: Scores, path: Path) -> None:
    """Write a PNG: per metric, a box per structure and arm; points are cases averaged over repeats."""
    names, columns, metrics = [arm.name for arm in scores.arms], scores.columns, scores.metrics
    palette = colours(len(names))
    width = 0.8 / len(names)
    with plot.style():
        figure = plot.new_figure(max(6.0, 1.5 + 0.42 * len(columns) * len(names)), 0.8 + 3.0 * len(metrics))
        what = f"{len(scores.cases)} cases, each averaged over an arm's repeats"
        figure.suptitle("\n".join([what, *relaxations(scores)]), fontsize=10)
        for axes, (key, metric) in zip(np.ravel(figure.subplots(len(metrics), 1)), metrics.items(), strict=True):
            values = [column for c in columns for column in scores.case_scores(key, c).to_numpy().T]
            spots = [c + (a - (len(names) - 1) / 2) * width for c in range(len(columns)) for a in range(len(names))]
            plot.boxes(axes, values, [], palette * len(columns), spots, width * 0.85)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_xlim(-0.6, len(columns) - 0.4)
            plot.label(axes, metric)
        handles = [_patch(colour, name) for colour, name in zip(palette, names, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False)
        plot.save(figure, path)


def _patch(colour: str, name: str):
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.6, label=name)


def draw_differences(scores: Scores, differences: Sequence[Difference], path: Path) -> None:
    """Write a PNG: per metric, each case's difference to the first arm as a point, the mean and its interval beside."""
    rows = len(differences) // len(scores.metrics)
    with plot.style():
        figure = plot.new_figure(5.6 * len(scores.metrics), 1.7 + 0.62 * rows)
        title = (
            f"Difference to {scores.first}, case by case\npoint: a case; diamond and bar: mean and 95 % interval over "
            f"{differences[0].unit}; green: better, red: worse, grey: the interval holds zero"
        )
        figure.suptitle("\n".join([title, *relaxations(scores)]), fontsize=9)
        panels = np.ravel(figure.subplots(1, len(scores.metrics)))
        for number, (axes, (key, metric)) in enumerate(zip(panels, scores.metrics.items(), strict=True)):
            chosen = [d for d in differences if d.key == key]
            _difference_rows(axes, chosen)
            names = [textwrap.fill(f"{d.arm}: {d.structure}", 30) for d in chosen]
            axes.set_yticks(range(len(chosen)), names if number == 0 else [""] * len(chosen))
            better = "right" if metric.higher_is_better else "left"
            axes.set_xlabel(f"{metric.title}, difference ({better} of 0 is better)")
        plot.save(figure, path)


def _difference_rows(axes, chosen: Sequence[Difference]) -> None:
    shift = np.random.default_rng(0)
    axes.axvline(0, color="black", lw=0.8)
    for row, d in enumerate(chosen):
        values = d.per_case.dropna().to_numpy()
        if not len(values):
            continue
        colour = _VERDICT_COLOURS[d.direction]
        spread = row + shift.uniform(-0.16, 0.16, len(values))
        axes.plot(values, spread, "o", ms=3, mew=0, color=colour, alpha=0.4)
        axes.plot([d.interval.low, d.interval.high], [row, row], color=colour, lw=3, solid_capstyle="butt")
        axes.plot(d.mean, row, "D", ms=6, color=colour, mec="white")
        text = f"{signed(d.mean)}  [{signed(d.interval.low)}, {signed(d.interval.high)}]  {d.wins}:{d.losses}"
        axes.annotate(
            text,
            (1, row - 0.3),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.5},
        )
    axes.set_ylim(len(chosen) - 0.5, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
