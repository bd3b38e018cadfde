"""What a benchmark found, and the ratios that are drawn from it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from nnunetv2_ext.core.outside import Promise

PREDICT, MISSING = "predict", "missing"


class Spread(NamedTuple):
    """Median of the rounds, with their lowest and highest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """None without values."""
    return Spread(statistics.median(values), min(values), max(values)) if values else None


@dataclass
class Rounds:
    """Seconds per call in each round, in the order of the rounds."""

    wall: list[float] = field(default_factory=list)  # the device's work included
    # of this process over all its threads; the steadier of the two on a machine shared with other work
    cpu: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], object], number: int, device: torch.device) -> None:
        """One more round: the mean over ``number`` calls run in one go.

        Only the mean is kept, because the calls of a round may differ on purpose (a masked pass in every second step).
        Nothing waits between them, so the CPU runs ahead of a GPU as it does in training.
        """
        wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(number):
            call()
        wait()
        self.wall.append((time.perf_counter() - wall) / number)
        self.cpu.append((time.process_time() - cpu) / number)


@dataclass
class Result:
    """One trainer's figures."""

    label: str
    trainer: str
    settings: str = ""
    promise: Promise = field(default_factory=Promise)
    facts: dict[str, Any] = field(default_factory=dict)  # batch size, dtype, compile state; see Subject.facts
    steps: dict[str, Rounds] = field(default_factory=dict)  # by batch kind, a training step
    predict: Rounds = field(default_factory=Rounds)  # a patch
    missing: Rounds = field(default_factory=Rounds)  # a patch without the channels that were added to a finished model
    parts: dict[str, float] = field(default_factory=dict)  # of a step, in seconds
    # bytes: allocator_peak (CUDA) or saved_tensors and, of a process of its own, resident_before and resident_peak
    memory: dict[str, int] = field(default_factory=dict)
    loading: dict[str, float] = field(default_factory=dict)  # with workers; see loading.measure_loading
    failure: str | None = None  # why there are no figures

    def rounds(self, what: str) -> Rounds:
        """Of a training step on a batch kind, or of ``PREDICT`` or ``MISSING``; empty if there are none."""
        return {PREDICT: self.predict, MISSING: self.missing}.get(what) or self.steps.get(what, Rounds())


@dataclass
class Report:
    """All results, plain nnUNetTrainer first, and where they were measured."""

    machine: dict[str, Any]
    options: dict[str, Any]
    results: list[Result]

    @property
    def baseline(self) -> Result:
        return self.results[0]

    @property
    def measured(self) -> list[Result]:
        """Results that have figures."""
        return [r for r in self.results if r.failure is None]

    def ratio(self, result: Result, what: str, clock: str = "wall") -> Spread | None:
        """Time by a clock over plain nnUNetTrainer's, round by round: what slows a whole round down cancels.

        ``what`` is as of `Result.rounds`; a patch without a channel is held against plain's prediction. None unless
        both have all rounds.
        """
        ours = getattr(result.rounds(what), clock)
        plain = getattr(self.baseline.rounds(PREDICT if what == MISSING else what), clock)
        return spread([a / b for a, b in zip(ours, plain) if b > 0]) if len(ours) == len(plain) else None

    def memory_ratio(self, result: Result, measure: str) -> float | None:
        """One of the memory figures over plain nnUNetTrainer's."""
        ours, plain = result.memory.get(measure), self.baseline.memory.get(measure)
        return ours / plain if ours and plain else None

    def part_names(self) -> list[str]:
        """Parts of a step in the order in which they first occur, ``other`` last."""
        return sorted(dict.fromkeys(name for r in self.results for name in r.parts), key="other".__eq__)

    def as_dict(self) -> dict[str, Any]:
        """Everything, the ratios included, in plain values."""

        def ratios(result: Result, what: str) -> dict[str, Any]:
            found = {clock: self.ratio(result, what, clock) for clock in ("wall", "cpu")}
            return {clock: ratio and ratio._asdict() for clock, ratio in found.items()}

        content = asdict(self)
        for result, plain in zip(self.results, content["results"], strict=True):
            plain["ratios"] = {
                "step": {kind: ratios(result, kind) for kind in result.steps if self.ratio(result, kind)},
                "predict": ratios(result, PREDICT),
                "missing": ratios(result, MISSING),
                "memory": {m: self.memory_ratio(result, m) for m in result.memory},
            }
        return content
