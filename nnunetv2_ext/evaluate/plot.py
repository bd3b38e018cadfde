"""Box plots of an evaluation, and the style of all plots of evaluate and compare."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_ext.core.files import atomic_write
from nnunetv2_ext.evaluate.folder import MEAN, Evaluation, with_mean
from nnunetv2_ext.evaluate.metrics import INVENTED, MISSED
from nnunetv2_ext.evaluate.table import relaxations


def draw(evaluation: Evaluation, path: Path, title: str) -> None:
    """Write a PNG: one panel per metric, a box and all cases for each structure (and group) and for their mean."""
    table = with_mean(evaluation.table)
    crossed = table["state"].isin([MISSED, INVENTED])
    crossed |= crossed.groupby(table["case"]).transform("any") & (table["structure"] == MEAN)
    table, colours = table.assign(crossed=crossed), None
    if "group" in table:
        colours = {group: f"C{number}" for number, group in enumerate(sorted(table["group"].unique()))}
        table = table.rename(columns={"group": "arm"})
    draw_boxes(evaluation, table, path, f"{title}\n{len(evaluation.cases)} cases", colours)


def draw_boxes(
    evaluation: Evaluation, table: pd.DataFrame, path: Path, title: str, colours: Mapping[str, str] | None = None
) -> None:
    """Write a PNG: one panel per metric, a box (quartiles, whiskers to 1.5 IQR) and all cases per structure and arm.

    Values of the long ``table`` are crosses where its column ``crossed`` is True, points elsewhere. What the evaluation
    let pass is told. ``colours`` are by arm; None: the table has no arms.
    """
    metrics, names, arms = evaluation.metrics, evaluation.columns, colours or {"": "C0"}
    width = (0.8 if colours else 0.6) / len(arms)
    # names that would run into each other: a slot is 0.42 inches a box, a character about 0.075
    slanted = len(names) > 1 and max(map(len, names)) * 0.075 > 0.42 * len(arms)
    shift = np.random.default_rng(0)  # the same picture each time
    wide = 1.5 + 0.42 * len(names) * len(arms)
    across, down = (1, len(metrics)) if colours or wide > 5 else (len(metrics), 1)
    size = max(6.0, wide) if colours else max(3.2, wide + 0.7) * across, 3.2 * down + 0.9
    with figure_file(path, *size) as figure:
        figure.suptitle("\n".join([title, *relaxations(evaluation)]), fontsize=10, wrap=True)
        for axes, (key, metric) in zip(np.ravel(figure.subplots(down, across)), metrics.items(), strict=True):
            for number, name in enumerate(names):
                for index, (arm, colour) in enumerate(arms.items()):
                    chosen = table[(table["metric"] == key) & (table["structure"] == name)]
                    chosen = chosen[chosen["arm"] == arm] if colours else chosen
                    at = number + (index - (len(arms) - 1) / 2) * width
                    _box(axes, chosen.dropna(subset="value"), at, 0.85 * width, colour, shift)
            axes.set_xticks(range(len(names)), names, rotation=30 * slanted, ha="right" if slanted else "center")
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.set_title(f"{metric.title}, {'higher' if metric.higher_is_better else 'lower'} is better", fontsize=9)
            axes.grid(axis="y", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(**{"top": min(axes.get_ylim()[1], 1.02)} if metric.higher_is_better else {"bottom": 0})
        if table["crossed"].any():
            figure.supxlabel("x: the structure, or one of them, is in truth or prediction only", fontsize=8)
        if colours:
            handles = [Patch(facecolor=colour, alpha=0.6, label=arm) for arm, colour in colours.items()]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False)


def _box(axes: Axes, chosen: pd.DataFrame, at: float, width: float, colour: str, shift: np.random.Generator) -> None:
    if chosen.empty:
        axes.annotate("no value", (at, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="center")
        return
    box = axes.boxplot([chosen["value"]], positions=[at], widths=width, showfliers=False, patch_artist=True)
    for patch in box["boxes"]:
        patch.set(facecolor=colour, alpha=0.3, edgecolor=colour)
    for line in (*box["whiskers"], *box["caps"], *box["medians"]):
        line.set(color=colour)
    x, crossed = at + shift.uniform(-0.28, 0.28, len(chosen)) * width, chosen["crossed"]
    size = 3.0 if len(chosen) < 100 else 1.5
    axes.plot(x[~crossed], chosen["value"][~crossed], "o", markersize=size, color=colour, alpha=0.6, mew=0)
    axes.plot(x[crossed], chosen["value"][crossed], "x", markersize=size + 2, color=colour)


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of these inches that is written to a PNG at the end of the block.

    Without pyplot: no window, no global state. In matplotlib's own look: nnU-Net's seaborn.set changes the defaults of
    the whole process.
    """
    with matplotlib.style.context(["default", {"text.parse_math": False, "font.size": 9}]):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        yield figure
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    atomic_write(path, lambda file: figure.savefig(file, format="png"))
