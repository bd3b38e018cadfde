"""What a benchmark found, and the ratios that are drawn from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from nnunetv2_ext.bench.clock import Times
from nnunetv2_ext.core.outside import Promise


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

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, times: Times) -> None:
        """One more round."""
        self.wall.append(times.wall)
        self.cpu.append(times.cpu)


@dataclass
class Result:
    """One trainer's figures.

    Attributes:
        label, trainer, settings: which.
        promise: what its method promises.
        facts: batch size, dtype, compile state; see ``Subject.facts``.
        steps: batch kind -> seconds per training step.
        predict: seconds per patch.
        parts: part of a step -> seconds.
        memory: bytes: ``allocator_peak`` (CUDA) or ``saved_tensors`` and, of a process of its own,
            ``resident_before`` and ``resident_peak``.
        failure: why there are no figures.
    """

    label: str
    trainer: str
    settings: str = ""
    promise: Promise = field(default_factory=Promise)
    facts: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Rounds] = field(default_factory=dict)
    predict: Rounds = field(default_factory=Rounds)
    parts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    failure: str | None = None


@dataclass
class Report:
    """All results, plain nnUNetTrainer first, and where they were measured."""

    machine: dict[str, Any]
    options: dict[str, Any]
    results: list[Result]

    @property
    def baseline(self) -> Result:
        return self.results[0]

    def step_ratio(self, result: Result, kind: str, clock: str = "wall") -> Spread | None:
        """Step time over plain nnUNetTrainer's, paired by round. ``clock``: ``wall`` or ``cpu``."""
        if kind not in result.steps or kind not in self.baseline.steps:
            return None
        return paired(getattr(result.steps[kind], clock), getattr(self.baseline.steps[kind], clock))

    def predict_ratio(self, result: Result, clock: str = "wall") -> Spread | None:
        """Predict time over plain nnUNetTrainer's, paired by round."""
        return paired(getattr(result.predict, clock), getattr(self.baseline.predict, clock))

    def memory_ratio(self, result: Result, measure: str) -> float | None:
        """One of the memory figures over plain nnUNetTrainer's."""
        ours, plain = result.memory.get(measure), self.baseline.memory.get(measure)
        return ours / plain if ours and plain else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, the ratios included, in plain values."""
        content = asdict(self)
        for result, plain in zip(self.results, content["results"], strict=True):
            kinds = [k for k in result.steps if self.step_ratio(result, k)]
            plain["ratios"] = {
                "step": {k: {c: _plain(self.step_ratio(result, k, c)) for c in ("wall", "cpu")} for k in kinds},
                "predict": {c: _plain(self.predict_ratio(result, c)) for c in ("wall", "cpu")},
                "memory": {m: self.memory_ratio(result, m) for m in result.memory},
            }
        return content


def paired(ours: Sequence[float], plain: Sequence[float]) -> Spread | None:
    """Median and spread of the ratios round by round: what slows a whole round down cancels.

    None unless both have all rounds.
    """
    if len(ours) != len(plain):
        return None
    return spread([a / b for a, b in zip(ours, plain, strict=True) if b > 0])


def _plain(value: Spread | None) -> dict[str, float] | None:
    return None if value is None else value._asdict()
