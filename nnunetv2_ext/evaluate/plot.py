"""Box plots of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.core.files import atomic_write
from nnunetv2_ext.evaluate.folder import MEAN, Evaluation, with_mean
from nnunetv2_ext.evaluate.metrics import INVENTED, MISSED, Metric
from nnunetv2_ext.evaluate.table import relaxations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(evaluation: Evaluation, path: Path, title: str) -> None:
    """Write a PNG: one panel per metric, a box and all cases for each structure and for their mean."""
    metrics, names = evaluation.metrics, evaluation.columns
    table = with_mean(evaluation.table)
    one_sided = table["state"].isin([MISSED, INVENTED])
    table["one_sided"] = one_sided | (one_sided.groupby(table["case"]).transform("any") & (table["structure"] == MEAN))
    with style():
        figure = new_figure(max(3.2, 2.2 + 0.75 * len(names)) * len(metrics), 4.4)
        figure.suptitle("\n".join([title, f"{len(evaluation.cases)} cases", *relaxations(evaluation)]), fontsize=10)
        for axes, (key, metric) in zip(np.ravel(figure.subplots(1, len(metrics))), metrics.items(), strict=True):
            parts = [table[(table["metric"] == key) & (table["structure"] == name)] for name in names]
            columns, crosses = ([p[what].to_numpy() for p in parts] for what in ("value", "one_sided"))
            boxes(axes, columns, names, crosses=crosses)
            label(axes, metric)
        if table["one_sided"].any():
            figure.supxlabel("x: the structure, or one of them, is in truth or prediction only", fontsize=8)
        save(figure, path)


def style() -> Any:
    """matplotlib's own look: nnU-Net's seaborn.set changes the defaults of the whole process."""
    import matplotlib.style

    return matplotlib.style.context(["default", {"text.parse_math": False, "font.size": 9}])


def new_figure(width: float, height: float) -> Figure:
    """A figure without pyplot: no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    atomic_write(path, lambda file: figure.savefig(file, format="png"))


def boxes(
    axes: Axes,
    columns: list[npt.NDArray[np.float64]],
    names: list[str],
    colours: list[str] | None = None,
    positions: list[float] | None = None,
    width: float = 0.6,
    crosses: list[npt.NDArray[np.bool_]] | None = None,
) -> None:
    """A box (quartiles, whiskers to 1.5 IQR) per column and every value as a point; NaN is left out.

    Args:
        axes: where.
        columns: values of each box.
        names: written below the boxes unless ``positions`` are given.
        colours: one per column; one for all by default.
        positions: along x; 0, 1, 2 ... by default.
        width: of a box.
        crosses: which values are drawn as a cross instead.
    """
    spots = positions or [float(i) for i in range(len(columns))]
    shift = np.random.default_rng(0)  # the same picture each time
    for index, (column, spot) in enumerate(zip(columns, spots, strict=True)):
        defined = np.isfinite(column)
        values = column[defined]
        if not len(values):
            axes.annotate("no value", (spot, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="center")
            continue
        colour = colours[index] if colours else "C0"
        box = axes.boxplot([values], positions=[spot], widths=width, showfliers=False, patch_artist=True)
        for patch in box["boxes"]:
            patch.set(facecolor=colour, alpha=0.3, edgecolor=colour)
        for line in (*box["whiskers"], *box["caps"], *box["medians"]):
            line.set(color=colour)
        x = spot + shift.uniform(-0.28, 0.28, len(values)) * width
        size = 3.0 if len(values) < 100 else 1.5
        crossed = crosses[index][defined] if crosses else np.zeros(len(values), dtype=bool)
        axes.plot(x[~crossed], values[~crossed], "o", markersize=size, color=colour, alpha=0.6, mew=0)
        axes.plot(x[crossed], values[crossed], "x", markersize=size + 2, color=colour)
    if positions is None:
        slanted = len(names) > 1 and max(map(len, names)) > 6
        axes.set_xticks(spots, names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_xlim(min(spots) - 0.7, max(spots) + 0.7)


def label(axes: Axes, metric: Metric) -> None:
    """Title, unit, direction and a scale that starts where it has to."""
    axes.set_title(f"{metric.title}, {'higher' if metric.higher_is_better else 'lower'} is better", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not metric.higher_is_better:
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))
