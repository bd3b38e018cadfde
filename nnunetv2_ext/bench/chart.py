"""The benchmark as a bar chart."""

import textwrap
from pathlib import Path

import numpy as np

from nnunetv2_ext.bench.result import PREDICT, Report, Spread
from nnunetv2_ext.evaluate.plot import figure_file

LABEL_WIDTH = 26  # characters


def draw(report: Report, path: Path) -> None:
    """Write a PNG: ratios to plain nnUNetTrainer with the spread over rounds, and the parts of a step in milliseconds.

    ValueError: no trainer was measured, so there is nothing to draw.
    """
    results = report.measured
    if not results:
        raise ValueError("no trainer could be measured, so there is no chart")
    m, o, facts = report.machine, report.options, results[0].facts
    patch = " x ".join(map(str, facts["patch_size"]))
    what = f"{o['dataset']}, {o['configuration']}, plans {o['plans_name']}: patch {patch}, batch {facts['batch_size']}"
    where = f"{m['device_name']} ({m['device']}, {m['threads']} thread(s)), torch {m['torch']}"
    with figure_file(path, 13, 2.6 + 0.75 * len(results)) as figure:
        figure.suptitle(f"{what}\n{where}, nnunetv2 {m['nnunetv2']}", fontsize=10, wrap=True)
        names = [textwrap.fill(r.label, LABEL_WIDTH) for r in results]
        for axes, draw_bars, ticks in zip(figure.subplots(1, 2), (_ratios, _parts), (names, [""] * len(names))):
            draw_bars(axes, report)
            axes.set_yticks(range(len(results)), ticks, fontsize=8)
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:  # above the bars, where neither they nor the axis' own text are
                axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)


def _ratios(axes, report: Report) -> None:
    results, kind, device = report.measured, report.options["batches"][0], report.machine["device"]
    clock, clock_name = ("cpu", "CPU time") if device == "cpu" else ("wall", "time")
    measure, memory_name = ("allocator_peak", "peak memory") if device == "cuda" else ("saved_tensors", "saved tensors")
    memory = (report.memory_ratio(r, measure) for r in results)
    series: dict[str, list[Spread | None]] = {
        f"step, {clock_name}": [report.ratio(r, kind, clock) for r in results],
        f"predict, {clock_name}": [report.ratio(r, PREDICT, clock) for r in results],
        memory_name: [None if ratio is None else Spread(ratio, ratio, ratio) for ratio in memory],
    }
    bar = 0.26
    for number, (name, values) in enumerate(series.items()):
        there = [(i + (number - 1) * bar, v) for i, v in enumerate(values) if v is not None]
        if not there:
            continue
        medians = [v.median for _, v in there]
        whiskers = np.array([(v.median - v.low, v.high - v.median) for _, v in there]).T
        where = [position for position, _ in there]
        bars = axes.barh(where, medians, bar * 0.92, xerr=whiskers, error_kw={"lw": 1}, label=name)
        axes.bar_label(bars, [f"{v:.2f}" for v in medians], padding=3, fontsize=8)
    for i, result in enumerate(results):
        promise = result.promise.step(device)
        if promise is not None:
            axes.plot([promise] * 2, [i - 1.5 * bar, i - 0.5 * bar], color="black", lw=2)
            axes.annotate(f"promised {promise:g}", (promise, i - 1.5 * bar), fontsize=7, ha="center", va="bottom")
    axes.axvline(1, color="grey", lw=0.8, ls="--")
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"times plain nnUNetTrainer (median; whiskers: lowest and highest of {report.options['rounds']} rounds)"
    )


def _parts(axes, report: Report) -> None:
    results = report.measured
    left, longest = np.zeros(len(results)), 1000 * max(sum(r.parts.values()) for r in results)
    for name in report.part_names():
        widths = np.array([1000 * r.parts.get(name, 0.0) for r in results])
        colour = {"color": "lightgrey"} if name == "other" else {}
        bars = axes.barh(range(len(results)), widths, 0.6, left=left, label=name, **colour)
        wide = [f"{w:.0f}" if w > 0.06 * longest else "" for w in widths]
        axes.bar_label(bars, wide, label_type="center", fontsize=8)
        left += widths
    axes.set_xlabel(f"ms of one training step, {report.options['batches'][0]} batch")
