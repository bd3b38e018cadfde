"""Learning curves of one run as a picture: every figure against the epoch, figures of one unit in one panel."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, float]

_IN_LEGEND = 10  # figures
_FLAT = 20.0  # a curve that spans less than this fraction of a panel's height cannot be read
# Titles of nnU-Net's own figures; equal titles share a panel. Ours are named "group/term" and need no entry.
_TITLES = {
    "train_losses": "loss (nnU-Net)",
    "val_losses": "loss (nnU-Net)",
    "mean_fg_dice": "pseudo Dice, foreground mean",
    "ema_fg_dice": "pseudo Dice, foreground mean",
    "dice_per_class_or_region": "pseudo Dice per class or region",
    "lrs": "learning rate",
    "epoch_seconds": "epoch duration [s]",
}
# Shares: always in one panel from 0 to 1, so that classes and runs can be compared by eye.
_SHARES = (_TITLES["mean_fg_dice"], _TITLES["dice_per_class_or_region"])
_LOSSES = "loss"  # our group of loss terms
_HEALTHY_COLOUR = "#009E73"
_PER_CLASS = "dice_per_class_or_region/class_"  # nnU-Net counts the foreground classes or regions from 1


def figure_names(rows: Mapping[int, Row]) -> list[str]:
    """Names of all figures in the order in which the epochs first brought them."""
    return list(dict.fromkeys(name for epoch in sorted(rows) for name in rows[epoch]))


def draw_curves(
    rows: Mapping[int, Row],
    title: str,
    class_names: Sequence[str] = (),
    without_weight: Collection[str] = (),
    healthy: Mapping[str, tuple[float, float]] | None = None,
) -> bytes:
    """The progress plot as PNG: panels of one unit each, three in a row.

    `class_names` are the foreground classes or regions in the order in which nnU-Net numbers them. Figures
    `without_weight` are marked as logged only. The range of a `healthy` figure is a band.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    panels = _panels(rows)
    columns = max(1, min(3, len(panels)))
    # Heights in inches, by hand: matplotlib's layout engines double the time of this plot.
    heights = [
        3.3 + 0.17 * math.ceil(min(max(len(names) for _, names in panels[start : start + columns]), _IN_LEGEND) / 2)
        for start in range(0, len(panels), columns)
    ]
    width, height = 5.0 * columns, sum(heights) + 0.5
    # nnU-Net's own plot calls seaborn.set(font_scale=2.5), which changes matplotlib's defaults for the whole process.
    with matplotlib.style.context(["default", {"text.parse_math": False, "font.size": 9}]):
        figure = Figure(figsize=(width, height), dpi=90)
        figure.text(0.5, 1 - 0.25 / height, title, fontsize=11, ha="center", va="center", wrap=True)
        for index, (name, members) in enumerate(panels):
            line, column = divmod(index, columns)
            bottom = height - 0.5 - sum(heights[:line]) - 2.8
            axes = figure.add_axes(((5.0 * column + 0.7) / width, bottom / height, 4.1 / width, 2.45 / height))
            labels = {member: _label(member, class_names, member in without_weight) for member in members}
            bands = {healthy[member] for member in members if healthy and member in healthy}
            _draw_panel(axes, rows, name, labels, bands)
        png = io.BytesIO()
        figure.savefig(png, format="png", pil_kwargs={"compress_level": 3})
    return png.getvalue()


def _panels(rows: Mapping[int, Row]) -> list[tuple[str, list[str]]]:
    """Title and figures of each panel."""
    groups: dict[str, list[str]] = {}
    for name in figure_names(rows):
        group = name.split("/", 1)[0]
        # losses have one unit, and so have numbered figures (gate_1, gate_2); of a method's others none is known
        shared = group if group in (*_TITLES, _LOSSES) else re.sub(r"_\d+$", "", name)
        groups.setdefault(_TITLES.get(shared, shared), []).append(name)
    panels = []
    for title, names in groups.items():
        # A small term beside a large one is a flat line unless the scale is logarithmic: it gets a panel of its own.
        spans = {name: max(v) - min(v) if (v := _finite(rows, [name])) else 0.0 for name in names}
        readable = title in _SHARES or _needs_log_scale(_finite(rows, names))
        small = [name for name in names if not readable and 0 < spans[name] < max(spans.values()) / _FLAT]
        panels.append((title, [name for name in names if name not in small]))
        panels += [(name, [name]) for name in small]
    return panels


def _finite(rows: Mapping[int, Row], names: Iterable[str]) -> list[float]:
    return [row[name] for name in names for row in rows.values() if name in row and math.isfinite(row[name])]


def _needs_log_scale(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


def _label(name: str, class_names: Sequence[str], without_weight: bool) -> str:
    number = name.removeprefix(_PER_CLASS)
    if number != name and number.isdecimal() and 1 <= int(number) <= len(class_names):
        return class_names[int(number) - 1]
    return name.split("/", 1)[-1] + (" (weight 0)" if without_weight else "")


def _draw_panel(
    axes: Axes, rows: Mapping[int, Row], title: str, labels: Mapping[str, str], bands: Collection[tuple[float, float]]
) -> None:
    """Draw the figures (the keys of `labels`) of one panel, the healthy ranges behind and the legend below them."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    for low, high in bands:
        axes.axhspan(low, high, color=_HEALTHY_COLOUR, alpha=0.15, linewidth=0, label=f"healthy: {low:g} to {high:g}")
    _draw_series(axes, rows, labels)
    if title in _SHARES:
        axes.set_ylim(-0.02, 1.02)
    elif _needs_log_scale(_finite(rows, labels)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        title += "  (log scale)"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch")
    last = max(rows)
    margin = max(0.5, 0.02 * last)
    axes.set_xlim(-margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _draw_series(axes: Axes, rows: Mapping[int, Row], labels: Mapping[str, str]) -> None:
    from matplotlib import colormaps

    bands, band_labels = axes.get_legend_handles_labels()
    handles: list[Any] = []
    for index, (name, label) in enumerate(labels.items()):
        # A figure not taken in an epoch is bridged by the line; one that was NaN or infinite leaves a gap.
        x = [epoch for epoch in sorted(rows) if name in rows[epoch]]
        y = [v if math.isfinite(v := float(rows[epoch][name])) else math.nan for epoch in x]
        finite = [v for v in y if not math.isnan(v)]
        colour = f"C{index}" if len(labels) <= 10 else colormaps["viridis"](index / (len(labels) - 1))
        label += f"  {finite[-1]:.4g}" if finite else "  no finite value"
        marked = list(range(len(y))) if len(y) <= 30 else _alone(y)
        (handle,) = axes.plot(x, y, color=colour, linewidth=1.3, marker="o", markersize=3, markevery=marked)
        handles.append((handle, label))
    if len(handles) > _IN_LEGEND:  # dozens of classes: every n-th and the last, colours run with the index
        step = math.ceil(len(handles) / (_IN_LEGEND - 1))
        handles = [*handles[:-1:step], handles[-1]]
    handles += zip(bands, band_labels, strict=True)
    # Below the axes: no curve is hidden, and no search for a free corner, which takes seconds on long runs.
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": min(2, len(handles))}
    axes.legend(*zip(*handles, strict=True), **place, fontsize=8, frameon=False)


def _alone(y: Sequence[float]) -> list[int]:
    """Indices of finite values between two gaps, which a line alone would not show."""
    padded = [math.nan, *y, math.nan]
    return [i for i, v in enumerate(y) if not math.isnan(v) and math.isnan(padded[i]) and math.isnan(padded[i + 2])]
