"""The benchmark itself: every trainer built once, then rounds in which each has its turn."""

import contextlib
import datetime
import gc
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nnunetv2_ext import __version__
from nnunetv2_ext.bench import memory
from nnunetv2_ext.bench.candidates import Candidate, check_settings, find_trainer, promise_of
from nnunetv2_ext.bench.isolated import loading, one_line, resident_size
from nnunetv2_ext.bench.parts import measure_parts
from nnunetv2_ext.bench.result import MISSING, PREDICT, Report, Result, Rounds
from nnunetv2_ext.bench.subject import BATCHES, Subject, Target, dry_environment
from nnunetv2_ext.core.compat import nnunet_version
from nnunetv2_ext.core.devices import check_device
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.preprocessed import open_preprocessed


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    rounds: int = 5  # turns of each trainer per batch kind; ratios are taken round by round
    # training steps, and patches predicted, per turn; where steps differ (a pass in every fourth), whole periods of it
    steps_per_round: int = 4
    warm_up: int = 2  # steps before the first round, not counted
    batches: tuple[str, ...] = BATCHES
    resident: bool = True  # also measure the resident size in a process of its own (CPU only)
    workers: int = 0  # of the loader, of which the wait is measured in a process of its own; 0: it is not

    def __post_init__(self) -> None:
        for name, lowest in (("rounds", 1), ("steps_per_round", 1), ("warm_up", 0), ("workers", 0)):
            if (given := getattr(self, name)) < lowest:
                raise ValueError(f"--{name.replace('_', '-')} must be {lowest} or more, but it is {given}")


class Session:
    """Measures ``candidates`` (the first is what the others are compared with).

    A trainer that fails (out of memory, refuses the dataset, or otherwise) gets a ``failure`` in its result and takes
    no further part; without the first one the others have figures, but no ratios. ValueError: unknown trainer or
    refused settings, missing plans or device; nothing is measured then.
    """

    def __init__(self, target: Target, candidates: Sequence[Candidate], options: Options | None = None) -> None:
        self.target, self.candidates, self.options = target, list(candidates), options or Options()
        open_preprocessed(target.dataset, target.configuration, target.plans_name)
        check_device(target.device)
        self.device = torch.device(target.device)
        self.results = []
        for c in self.candidates:
            trainer = find_trainer(c.trainer)
            check_settings(c, trainer)
            self.results.append(Result(c.label, c.trainer, c.settings, promise_of(c, trainer)))
        self.subjects: dict[int, Subject] = {}
        self._memory_steps = max(2, self.options.steps_per_round)  # the second is the first with the optimiser's state
        self._bar = progress_bar(None, enabled=False)

    def run(self) -> Report:
        """Measure everything; shows a progress bar on a terminal."""
        o = self.options
        machine = machine_facts(self.device, self.target.threads)  # first, so that the load is that of others
        threads = torch.get_num_threads()
        if self.target.threads is not None:
            torch.set_num_threads(self.target.threads)
        measure_resident = o.resident and self.device.type == "cpu"
        turns = measure_resident + (o.workers > 0) + 3 + o.rounds * (len(o.batches) + 1)
        try:
            with progress_bar(turns * len(self.candidates), "bench") as self._bar, dry_environment():
                if measure_resident:
                    self._each("resident size", self._measure_resident, running=False)
                if o.workers:
                    self._each("loading", self._measure_loading, running=False)
                self._each("building, memory", self._build, running=False)
                self._each("warm-up", self._warm_up)
                for what in (*o.batches, PREDICT):
                    for number in range(o.rounds):
                        self._each(f"{what} {number + 1}", partial(self._time, what=what), number % 2 == 1)
                self._each("parts", self._time_parts)
        finally:
            self.subjects.clear()
            memory.release()
            torch.set_num_threads(threads)
        return Report(machine, {**asdict(self.target), **asdict(o)}, self.results)

    def _each(self, what: str, do: Callable[[int], None], backwards: bool = False, running: bool = True) -> None:
        """``do`` for every trainer that is still in; every other round backwards, so that a steady drift cancels."""
        order = range(len(self.candidates))
        for index in reversed(order) if backwards else order:
            result, failure = self.results[index], None
            if result.failure is None and (index in self.subjects or not running):
                try:
                    do(index)
                except Exception as error:  # what a trainer refuses of this dataset as well: it stops only that trainer
                    failure = one_line(error), memory.is_out_of_memory(error)
            if failure is not None:  # only now: while the exception lived, its traceback kept the trainer's memory
                beside = len(self.subjects) - (index in self.subjects)
                note = f" ({beside} other trainers were on the device)" if beside and self.device.type != "cpu" else ""
                result.failure = f"out of memory{note}: {failure[0]}" if failure[1] else failure[0]
                self.subjects.pop(index, None)
                memory.release()
            self._bar.set_postfix(now=f"{result.label}: {what}", refresh=False)
            self._bar.update()

    def _measure_resident(self, index: int) -> None:
        sizes = resident_size(self.candidates[index], self.target, self._memory_steps, self.options.batches[0])
        self.results[index].memory |= {f"resident_{name}": size for name, size in sizes.items()}

    def _measure_loading(self, index: int) -> None:
        o = self.options
        steps = o.rounds * o.steps_per_round
        self.results[index].loading = loading(self.candidates[index], self.target, steps, o.workers)

    def _build(self, index: int) -> None:
        memory.release()
        subject = Subject(self.candidates[index], self.target, self.options.batches)
        self.subjects[index] = subject
        result = self.results[index]
        result.facts = subject.facts()
        with subject.turn(self.options.batches[0]) as step:
            step()  # compiles, and lets cudnn try its algorithms, some of which need much memory
            if self.device.type == "cuda":
                peak = memory.cuda_peak(step, self._memory_steps, self.device, subject.others_bytes)
                result.memory["allocator_peak"] = peak
            else:
                result.memory["saved_tensors"] = memory.saved_tensor_peak(step, self.options.steps_per_round)

    def _warm_up(self, index: int) -> None:
        for what in (*self.options.batches, PREDICT):
            with self.subjects[index].turn(what) as call:
                for _ in range(self.options.warm_up):
                    call()

    def _time(self, index: int, what: str) -> None:
        result = self.results[index]
        rounds = result.predict if what == PREDICT else result.steps.setdefault(what, Rounds())
        with self.subjects[index].turn(what) as call:
            rounds.measure(call, self.options.steps_per_round, self.device)
        if what == PREDICT and self.subjects[index].missing is not None:  # in the same round as plain's prediction
            with self.subjects[index].turn(MISSING) as call:
                result.missing.measure(call, self.options.steps_per_round, self.device)

    def _time_parts(self, index: int) -> None:
        subject, kind = self.subjects[index], self.options.batches[0]
        gc.collect()
        with subject.turn(kind):
            batch = subject.batches[kind]
            self.results[index].parts = measure_parts(subject.trainer, batch, self.options.steps_per_round)


def machine_facts(device: torch.device, threads: int | None) -> dict[str, Any]:
    """Device, versions and switches that the figures depend on, as plain values."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(0) if device.type == "cuda" else _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nnunetv2": nnunet_version(),
        "nnunetv2_ext": __version__,
        "cpus": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "nnUNet_compile": os.environ.get("nnUNet_compile"),
    }
    if device.type == "cuda":
        facts |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        }
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
