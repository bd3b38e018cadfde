"""The benchmark as text, for a terminal and for a markdown page."""

import statistics

from nnunetv2_ext.bench.result import MISSING, PREDICT, Report, Spread, spread
from nnunetv2_ext.evaluate.table import grid

MIB = 2**20
MEMORY_NAMES = {
    "allocator_peak": "peak memory (CUDA allocator)",
    "saved_tensors": "tensors saved for backward, peak",
    "resident_peak": "resident size of its own process, peak",
}


def as_text(report: Report) -> str:
    """Head, one table per batch kind, prediction, memory, the parts of a step, and what failed."""
    blocks = [_head(report), _answer(report)]
    blocks += [f"Training step, {kind} batch\n{_times(report, kind)}" for kind in report.options["batches"]]
    blocks.append(f"Prediction, network on one patch\n{_times(report, PREDICT)}")
    blocks.append(f"Prediction, patch without the added channel\n{_times(report, MISSING)}")
    blocks.append(f"Memory of a training step\n{_memory(report)}")
    blocks.append(f"Where a step's time goes, {report.options['batches'][0]} batch (wall)\n{_parts(report)}")
    if workers := report.options.get("workers"):
        blocks.append(f"Waiting for the loader, {workers} worker process(es) (wall)\n{_loading(report)}")
    blocks += [_notes(report), _failures(report)]
    return "\n\n".join(block for block in blocks if block and not block.endswith("\n"))


def _head(report: Report) -> str:
    m, o = report.machine, report.options
    with_facts = [r for r in report.results if r.facts]
    network = "no trainer could be measured"
    if with_facts:
        facts = with_facts[0].facts
        compiled = [r.label for r in with_facts if r.facts["compiled"]]
        state = "all" if len(compiled) == len(with_facts) else ", ".join(compiled) or "none"
        precision = f"autocast {facts['autocast_dtype']}" if facts["autocast_dtype"] else facts["weights_dtype"]
        network = (
            f"patch {' x '.join(map(str, facts['patch_size']))}, batch size {facts['batch_size']}, "
            f"{facts['parameters'] / 1e6:.2f} M parameters, precision {precision}, compiled: {state}"
        )
    return (
        f"{o['dataset']}  {o['configuration']}  plans {o['plans_name']}  fold {o['fold']}\n{network}\n"
        f"{m['device']}: {m['device_name']}, {m['threads']} thread(s) on {m['cpus']} CPUs; torch {m['torch']}, "
        f"nnunetv2 {m['nnunetv2']}, nnunetv2-ext {m['nnunetv2_ext']}; {m['date']}\n"
        f"{o['rounds']} rounds x {o['steps_per_round']} steps after {o['warm_up']} warm-up steps, trainers in turn\n"
        "Figures are medians (lowest .. highest round); a ratio is taken to plain nnUNetTrainer in the same round."
    )


def _answer(report: Report) -> str:
    """What a trainer costs beside plain nnU-Net, in words, and whether it keeps what its method promises."""
    device, kind = report.machine["device"], report.options["batches"][0]
    clock = "cpu" if device == "cpu" else "wall"  # processor time, which other work on the machine disturbs least
    lines = ["In short (hours: of 1000 epochs of 250 such steps, without validation and waiting for data)"]
    for r in report.measured:
        step, predict, missing = (report.ratio(r, what, clock) for what in (kind, PREDICT, MISSING))
        if r is report.baseline or step is None:
            continue
        kept, then = _kept(step.median, r.promise.step(device)), ""
        if predict:
            then = f"; prediction takes {predict.median:.2f} times as long{_kept(predict.median, r.promise.predict)}"
        if missing:
            then += f", {missing.median:.2f} without the added channel{_kept(missing.median, r.promise.missing)}"
        memory = report.memory_ratio(r, "saved_tensors" if device == "cpu" else "allocator_peak")
        if memory and r.promise.memory is not None:
            then += f"; a step takes {memory:.2f} times the memory{_kept(memory, r.promise.memory)}"
        hours = (statistics.median(x.rounds(kind).wall) * 250_000 / 3600 for x in (r, report.baseline))
        lengths = " instead of ".join(f"{h:.3g} h" for h in hours)
        lines.append(
            f"- {r.label}: a step takes {step.median:.2f} times as long as plain nnU-Net's{kept}{then}; {lengths}."
        )
    return "\n".join(lines) if len(lines) > 1 else ""


def _kept(ratio: float, promise: float | None) -> str:
    if promise is None:
        return ""
    return f" (promised {promise:g}: {'kept' if round(ratio, 2) <= promise else 'MISSED here'})"


def _times(report: Report, what: str) -> str:
    """Of training steps on a batch kind, or of prediction."""
    predicts = what in (PREDICT, MISSING)
    head = ["trainer", "patch" if predicts else "step", "", "x plain", "", "x plain, CPU", "", "promised"]
    rows = [head if predicts else [*head, "samples/s"]]
    for r in report.measured:
        time = spread([seconds * 1000 for seconds in r.rounds(what).wall])
        if time is None:
            continue
        ratios = (report.ratio(r, what, clock) for clock in ("wall", "cpu"))
        row = [r.label, *_cells(time, 1, " ms"), *(cell for ratio in ratios for cell in _cells(ratio, 2))]
        promises = {PREDICT: r.promise.predict, MISSING: r.promise.missing}
        row.append(_promised(promises[what] if predicts else r.promise.step(report.machine["device"])))
        rows.append(row if predicts else [*row, f"{r.facts['batch_size'] / (time.median / 1000):.3g}"])
    return grid(rows) if rows[1:] else ""


def _memory(report: Report) -> str:
    measures = [m for m in MEMORY_NAMES if any(m in r.memory for r in report.measured)]
    rows = [["trainer", *(text for m in measures for text in (MEMORY_NAMES[m], "x plain")), "promised"]]
    for r in report.measured if measures else ():
        row = [r.label]
        for measure in measures:
            ratio = report.memory_ratio(r, measure)
            row.append(f"{r.memory[measure] / MIB:.1f} MiB" if measure in r.memory else "")
            row.append("" if ratio is None else f"{ratio:.2f}")
        rows.append([*row, _promised(r.promise.memory)])
    return grid(rows) if rows[1:] else ""


def _parts(report: Report) -> str:
    names = report.part_names()
    rows = [["trainer", *names]]
    for r in report.measured:
        total = sum(r.parts.values())
        if total:
            cells = (r.parts.get(name) for name in names)
            rows.append([r.label, *("" if c is None else f"{c * 1000:.1f} ms {c / total:4.0%}" for c in cells)])
    return grid(rows) if rows[1:] else ""


def _loading(report: Report) -> str:
    rows = [["trainer", "step", "wait for its batch", "share of waiting"]]
    for r in report.measured:
        wait, step = (f"{r.loading[name] * 1000:.1f} ms" for name in ("wait", "step"))
        rows.append([r.label, step, wait, f"{r.loading['share']:.1%}"])
    return grid(rows) if rows[1:] else ""


def _notes(report: Report) -> str:
    m, plain = report.machine, report.baseline.facts
    notes = [
        f"Note: {r.label} steps on batches of {r.facts['batch_size']}; compare its samples/s, not its step."
        for r in report.measured
        if plain and r.facts["batch_size"] != plain["batch_size"]
    ]
    on_cpu, load = m["device"] == "cpu", (m["load_average"] or [0])[0]
    if on_cpu and load > m["cpus"]:
        notes.append(
            f"Note: the machine was busy (load {load:.1f} on {m['cpus']} CPUs); trust the ratios of "
            "CPU time, not those of the clock."
        )
    # measured with torch 2.15: aten::slow_conv3d instead of oneDNN
    if on_cpu and m["threads"] == 1 and any(len(r.facts.get("patch_size", ())) == 3 for r in report.results):
        notes.append(
            "Note: with one CPU thread torch runs 3d convolutions of a single sample by a slower algorithm, so "
            "prediction and passes over one sample (half of a batch of 2) cost several times more than with "
            "--threads 2."
        )
    return "\n".join(notes)


def _failures(report: Report) -> str:
    lines = [f"FAILED {r.label}: {r.failure}" for r in report.results if r.failure is not None]
    if report.baseline.failure is not None:
        lines.append(f"{lines.pop(0)} (without its figures there are no ratios)")
    return "\n".join(lines)


def _cells(value: Spread | None, digits: int, unit: str = "") -> list[str]:
    if value is None:
        return ["", ""]
    median, low, high = (f"{v:.{digits}f}" for v in value)
    return [f"{median}{unit}", f"({low} .. {high})"]


def _promised(ratio: float | None) -> str:
    return "" if ratio is None else f"<= {ratio:g}"
