"""Box plots of all arms and the plot of paired differences."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunetv2_ext.compare.collect import Scores
from nnunetv2_ext.compare.statistics import BETTER, EQUAL, UNCLEAR, WORSE, Difference, signed
from nnunetv2_ext.evaluate import plot
from nnunetv2_ext.evaluate.metrics import METRICS

# Okabe and Ito's, as in core.overlay, in an order whose first two differ most; grey for the reference
_COLOURS = ("#666666", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_VERDICT_COLOURS = {BETTER: "#009E73", WORSE: "#D55E00", UNCLEAR: "#666666", EQUAL: "#666666"}


def colours(number: int) -> list[str]:
    """One colour per arm; they repeat after seven."""
    return [_COLOURS[0], *(_COLOURS[1 + i % (len(_COLOURS) - 1)] for i in range(number - 1))][:number]


def draw_boxes(scores: Scores, path: Path) -> None:
    """Write a PNG: per metric, a box per structure and arm; points are cases averaged over repeats."""
    arms, columns, metrics = scores.arms, scores.columns, scores.source.rules.metrics
    palette = colours(len(arms))
    width = 0.8 / len(arms)
    with plot.style():
        figure = plot.new_figure(max(6.0, 1.5 + 0.42 * len(columns) * len(arms)), 0.8 + 3.0 * len(metrics))
        figure.suptitle(f"{len(scores.cases)} cases, each averaged over an arm's repeats", fontsize=10)
        for axes, metric in zip(np.ravel(figure.subplots(len(metrics), 1)), metrics, strict=True):
            tables = [scores.case_scores(metric, index) for index in range(len(arms))]
            values = [tables[a][:, c] for c in range(len(columns)) for a in range(len(arms))]
            spots = [c + (a - (len(arms) - 1) / 2) * width for c in range(len(columns)) for a in range(len(arms))]
            plot.boxes(axes, values, [], palette * len(columns), spots, width * 0.85)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_xlim(-0.6, len(columns) - 0.4)
            plot.label(axes, METRICS[metric])
        handles = [_patch(colour, arm.name) for colour, arm in zip(palette, arms, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False)
        plot.save(figure, path)


def _patch(colour: str, name: str):
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=0.6, label=name)


def draw_differences(scores: Scores, differences: Sequence[Difference], path: Path) -> None:
    """Write a PNG: per metric, each case's difference to the first arm as a point, the mean and its interval beside."""
    metrics = scores.source.rules.metrics
    rows = len([d for d in differences if d.metric == metrics[0]])
    with plot.style():
        figure = plot.new_figure(5.6 * len(metrics), 1.7 + 0.62 * rows)
        figure.suptitle(
            f"Difference to {scores.arms[0].name}, case by case\npoint: a case; diamond and bar: mean and 95 % "
            "interval over cases; green: better, red: worse, grey: the interval holds zero",
            fontsize=9,
        )
        for number, (axes, metric) in enumerate(zip(np.ravel(figure.subplots(1, len(metrics))), metrics, strict=True)):
            chosen = [d for d in differences if d.metric == metric]
            _difference_rows(axes, chosen)
            names = [textwrap.fill(f"{scores.arms[d.arm].name}: {d.column}", 30) for d in chosen]
            axes.set_yticks(range(len(chosen)), names if number == 0 else [""] * len(chosen))
            better = "right" if METRICS[metric].higher_is_better else "left"
            axes.set_xlabel(f"{METRICS[metric].title}, difference ({better} of 0 is better)")
        plot.save(figure, path)


def _difference_rows(axes, chosen: Sequence[Difference]) -> None:
    shift = np.random.default_rng(0)
    axes.axvline(0, color="black", lw=0.8)
    for row, d in enumerate(chosen):
        values = d.per_case[np.isfinite(d.per_case)]
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
