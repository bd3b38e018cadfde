"""The benchmark as text, for a terminal and for a markdown page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from nnunetv2_ext.bench.parts import OTHER
from nnunetv2_ext.bench.result import Report, Result, Spread, spread

MIB = 2**20
MEMORY_NAMES = {
    "allocator_peak": "peak memory (CUDA allocator)",
    "saved_tensors": "tensors saved for backward, peak",
    "resident_peak": "resident size of its own process, peak",
}


def as_text(report: Report) -> str:
    """Head, one table per batch kind, prediction, memory, the parts of a step, and what failed."""
    blocks = [_head(report), _answer(report)]
    blocks += [_step_table(report, kind) for kind in report.options["batches"]]
    blocks += [_predict_table(report), _memory_table(report), _parts_table(report), _notes(report)]
    blocks.append(_failures(report))
    return "\n\n".join(block for block in blocks if block)


def _head(report: Report) -> str:
    m, o = report.machine, report.options
    facts: dict[str, Any] = next((r.facts for r in report.results if r.facts), {})
    compiled = {r.label: r.facts["compiled"] for r in report.results if r.facts}
    some = ", ".join(label for label, yes in compiled.items() if yes) or "none"
    state = "all" if compiled and all(compiled.values()) else some
    precision = (
        f"autocast {facts.get('autocast_dtype')}" if facts.get("autocast_dtype") else facts.get("weights_dtype", "?")
    )
    network = (
        f"patch {_by(facts['patch_size'])}, batch size {facts['batch_size']}, {facts['parameters'] / 1e6:.2f} M "
        f"parameters, precision {precision}, compiled: {state}"
        if facts
        else "no trainer could be measured"
    )
    return "\n".join(
        [
            f"{o['dataset']}  {o['configuration']}  plans {o['plans_name']}  fold {o['fold']}",
            network,
            f"{m['device']}: {m['device_name']}, {m['threads']} thread(s) on {m['cpus']} CPUs; torch {m['torch']}, "
            f"nnunetv2 {m['nnunetv2']}, nnunetv2-ext {m['nnunetv2_ext']}; {m['date']}",
            f"{o['rounds']} rounds x {o['steps_per_round']} steps after {o['warm_up']} warm-up steps, trainers in turn",
            "Figures are medians (lowest .. highest round); a ratio is taken to plain nnUNetTrainer in the same round.",
        ]
    )


def _answer(report: Report) -> str:
    """What a trainer costs beside plain nnU-Net, in words, and whether it keeps what its method promises."""
    device, kind = report.machine["device"], report.options["batches"][0]
    clock = "cpu" if device == "cpu" else "wall"  # processor time, which other work on the machine disturbs least
    plain = report.baseline.steps.get(kind)
    lines = []
    for r in _measured(report):
        step = report.step_ratio(r, kind, clock)
        if r is report.baseline or step is None or plain is None:
            continue
        promise = r.promise.step(device)
        kept = (
            ""
            if promise is None
            else f" (promised {promise:g}: {'kept' if round(step.median, 2) <= promise else 'MISSED here'})"
        )
        hours = (statistics.median(t.wall) * 250_000 / 3600 for t in (r.steps[kind], plain))
        lengths = " instead of ".join(f"{h:.3g} h" for h in hours)
        predict = report.predict_ratio(r, clock)
        then = "" if predict is None else f"; prediction takes {predict.median:.2f} times as long"
        lines.append(
            f"- {r.label}: a step takes {step.median:.2f} times as long as plain nnU-Net's{kept}{then}; {lengths}."
        )
    if not lines:
        return ""
    return "\n".join(
        ["In short (hours: of 1000 epochs of 250 such steps, without validation and waiting for data)", *lines]
    )


def _notes(report: Report) -> str:
    m = report.machine
    notes = [
        f"Note: {r.label} steps on batches of {r.facts['batch_size']}; compare its samples/s, not its step."
        for r in _measured(report)
        if report.baseline.facts and r.facts["batch_size"] != report.baseline.facts["batch_size"]
    ]
    if m["device"] != "cpu":
        return "\n".join(notes)
    load = (m["load_average"] or [0])[0]
    if load > m["cpus"]:
        notes.append(
            f"Note: the machine was busy (load {load:.1f} on {m['cpus']} CPUs); trust the ratios of "
            "CPU time, not those of the clock."
        )
    three_dimensional = any(len(r.facts.get("patch_size", ())) == 3 for r in report.results)
    if m["threads"] == 1 and three_dimensional:  # measured with torch 2.15: aten::slow_conv3d instead of oneDNN
        notes.append(
            "Note: with one CPU thread torch runs 3d convolutions of a single sample by a slower algorithm, so "
            "prediction and passes over one sample (half of a batch of 2) cost several times more than with "
            "--threads 2."
        )
    return "\n".join(notes)


def _step_table(report: Report, kind: str) -> str:
    rows = [["trainer", "step", "", "x plain", "", "x plain, CPU", "", "promised", "samples/s"]]
    for r in _measured(report):
        if kind not in r.steps:
            continue
        wall = r.steps[kind].wall
        step = Spread(*_milliseconds(wall))
        rows.append(
            [
                r.label,
                f"{step.median:.1f} ms",
                f"({step.low:.1f} .. {step.high:.1f})",
                *_ratio(report.step_ratio(r, kind)),
                *_ratio(report.step_ratio(r, kind, "cpu")),
                _promised(r.promise.step(report.machine["device"])),
                f"{r.facts['batch_size'] / (step.median / 1000):.3g}",
            ]
        )
    return f"Training step, {kind} batch\n{table(rows)}" if len(rows) > 1 else ""


def _predict_table(report: Report) -> str:
    rows = [["trainer", "patch", "", "x plain", "", "x plain, CPU", "", "promised"]]
    for r in _measured(report):
        if r.predict.wall:
            median, low, high = _milliseconds(r.predict.wall)
            ratios = (*_ratio(report.predict_ratio(r)), *_ratio(report.predict_ratio(r, "cpu")))
            rows.append(
                [r.label, f"{median:.1f} ms", f"({low:.1f} .. {high:.1f})", *ratios, _promised(r.promise.predict)]
            )
    return f"Prediction, network on one patch\n{table(rows)}" if len(rows) > 1 else ""


def _memory_table(report: Report) -> str:
    measures = [m for m in MEMORY_NAMES if any(m in r.memory for r in _measured(report))]
    rows = [["trainer", *(text for m in measures for text in (MEMORY_NAMES[m], "x plain")), "promised"]]
    for r in _measured(report):
        cells = [r.label]
        for measure in measures:
            ratio = report.memory_ratio(r, measure)
            cells += [
                f"{r.memory[measure] / MIB:.1f} MiB" if measure in r.memory else "",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        rows.append([*cells, _promised(r.promise.memory)])
    return f"Memory of a training step\n{table(rows)}" if measures and len(rows) > 1 else ""


def part_names(report: Report) -> list[str]:
    """Parts of a step in the order in which they first occur, ``other`` last."""
    names = dict.fromkeys(name for r in report.results for name in r.parts)
    return [*(n for n in names if n != OTHER), *([OTHER] if OTHER in names else [])]


def _parts_table(report: Report) -> str:
    names = part_names(report)
    rows = [["trainer", *(f"{name}" for name in names)]]
    for r in _measured(report):
        total = sum(r.parts.values())
        if total:
            cells = [r.parts.get(name) for name in names]
            rows.append([r.label, *("" if c is None else f"{c * 1000:.1f} ms {c / total:4.0%}" for c in cells)])
    title = f"Where a step's time goes, {report.options['batches'][0]} batch (wall)"
    return f"{title}\n{table(rows)}" if len(rows) > 1 else ""


def _failures(report: Report) -> str:
    lines = [f"FAILED {r.label}: {r.failure}" for r in report.results if r.failure is not None]
    if report.baseline.failure is None:
        return "\n".join(lines)
    return "\n".join([*lines[1:], f"{lines[0]} (without its figures there are no ratios)"])


def _measured(report: Report) -> list[Result]:
    return [r for r in report.results if r.failure is None]


def _milliseconds(seconds: Sequence[float]) -> tuple[float, float, float]:
    found = spread([s * 1000 for s in seconds])
    assert found is not None
    return found


def _ratio(ratio: Spread | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio.median:.2f}", f"({ratio.low:.2f} .. {ratio.high:.2f})"


def _promised(ratio: float | None) -> str:
    return "" if ratio is None else f"<= {ratio:g}"


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left and the others to the right; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([lines[0], "  " + "-" * (max(map(len, lines)) - 2), *lines[1:]])
