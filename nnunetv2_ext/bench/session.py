"""The benchmark itself: every trainer built once, then rounds in which each has its turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from nnunetv2_ext.bench import memory
from nnunetv2_ext.bench.batches import KINDS
from nnunetv2_ext.bench.candidates import Candidate, check_settings, find_trainer, promise_of
from nnunetv2_ext.bench.clock import time_block
from nnunetv2_ext.bench.isolated import StepError, one_line, resident_size
from nnunetv2_ext.bench.machine import describe_machine
from nnunetv2_ext.bench.parts import measure_parts
from nnunetv2_ext.bench.plan import Target, check
from nnunetv2_ext.bench.result import Report, Result, Rounds
from nnunetv2_ext.bench.subject import Subject, dry_environment
from nnunetv2_ext.core.progress import progress_bar


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        rounds: turns of each trainer per batch kind; ratios are taken round by round.
        steps_per_round: training steps, and patches predicted, per turn. A trainer whose steps differ
            (a pass in every fourth) needs a multiple of its period.
        warm_up: steps before the first round, not counted.
        batches: of ``batches.KINDS``.
        resident: also measure the resident size in a process of its own (CPU only).
    """

    rounds: int = 5
    steps_per_round: int = 4
    warm_up: int = 2
    batches: tuple[str, ...] = KINDS
    resident: bool = True

    def __post_init__(self) -> None:
        for name, lowest in (("rounds", 1), ("steps_per_round", 1), ("warm_up", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be {lowest} or more, but it is {getattr(self, name)}"
                )


class Session:
    """Measures ``candidates`` (the first is what the others are compared with).

    A trainer that fails (out of memory, refuses the dataset, or otherwise) gets a ``failure`` in its result and takes
    no further part; without the first one the others have figures, but no ratios.

    Raises:
        ValueError: unknown trainer or refused settings, missing plans or device; nothing is measured then.
    """

    def __init__(self, target: Target, candidates: Sequence[Candidate], options: Options | None = None) -> None:
        self.target, self.candidates = target, list(candidates)
        self.options = options or Options()
        check(target)
        self.results = []
        for c in self.candidates:
            trainer = find_trainer(c.trainer)
            check_settings(c, trainer)
            self.results.append(Result(c.label, c.trainer, c.settings, promise_of(c, trainer)))
        self.subjects: dict[int, Subject] = {}
        self._bar = progress_bar(None, enabled=False)

    def run(self) -> Report:
        """Measure everything; shows a progress bar on a terminal."""
        o = self.options
        # before anything runs, so that the load is that of others
        machine = describe_machine(torch.device(self.target.device), self.target.threads)
        threads = torch.get_num_threads()
        if self.target.threads is not None:
            torch.set_num_threads(self.target.threads)
        measure_resident = o.resident and self.target.device == "cpu"
        turns = measure_resident + 3 + o.rounds * (len(o.batches) + 1)
        try:
            with progress_bar(turns * len(self.candidates), "bench") as self._bar, dry_environment():
                if measure_resident:
                    self._each("resident size", self._measure_resident, running=False)
                self._each("building, memory", self._build, running=False)
                self._each("warm-up", self._warm_up)
                for kind in o.batches:
                    for number in range(o.rounds):
                        do = partial(self._time_steps, kind=kind)
                        self._each(f"{kind} {number + 1}", do, number % 2 == 1)
                for number in range(o.rounds):
                    self._each(f"predict {number + 1}", self._time_predict, number % 2 == 1)
                self._each("parts", self._time_parts)
        finally:
            self.subjects.clear()
            memory.release(torch.device(self.target.device))
            torch.set_num_threads(threads)
        return Report(machine, {**asdict(self.target), **asdict(o)}, self.results)

    def _each(self, what: str, do: Callable[[int], None], backwards: bool = False, running: bool = True) -> None:
        """``do`` for every trainer that is still in; every other round backwards, so that a steady drift cancels."""
        order = range(len(self.candidates))
        for index in reversed(order) if backwards else order:
            result = self.results[index]
            if result.failure is None and (index in self.subjects or not running):
                failure = self._attempt(do, index)
                if failure is not None:
                    # only now: while the exception lived, its traceback kept the trainer's memory
                    self._drop(index, *failure)
            self._bar.set_postfix(now=f"{result.label}: {what}", refresh=False)
            self._bar.update()

    def _attempt(self, do: Callable[[int], None], index: int) -> tuple[str, bool] | None:
        """None, or why it failed and whether memory ran out."""
        try:
            do(index)
        except StepError as error:
            return str(error), error.out_of_memory
        except Exception as error:  # what a trainer refuses of this dataset as well: it stops only that trainer
            return one_line(error), memory.is_out_of_memory(error)
        return None

    def _drop(self, index: int, reason: str, out_of_memory: bool) -> None:
        beside = len(self.subjects) - (index in self.subjects)
        note = f" ({beside} other trainers were on the device)" if beside and self.target.device != "cpu" else ""
        self.results[index].failure = f"out of memory{note}: {reason}" if out_of_memory else reason
        self.subjects.pop(index, None)
        memory.release(torch.device(self.target.device))

    def _measure_resident(self, index: int) -> None:
        sizes = resident_size(self.candidates[index], self.target, self._memory_steps(), self.options.batches[0])
        self.results[index].memory |= {f"resident_{name}": size for name, size in sizes.items()}

    def _memory_steps(self) -> int:
        return max(2, self.options.steps_per_round)  # the second step is the first with the optimiser's state

    def _build(self, index: int) -> None:
        memory.release(torch.device(self.target.device))
        subject = Subject(self.candidates[index], self.target, self.options.batches)
        self.subjects[index] = subject
        result, kind = self.results[index], self.options.batches[0]
        result.facts = subject.facts()
        device = subject.trainer.device
        with subject.turn():
            subject.step(kind)  # compiles, and lets cudnn try its algorithms, some of which need much memory
            if device.type == "cuda":
                result.memory["allocator_peak"] = memory.cuda_peak(
                    lambda: subject.step(kind), self._memory_steps(), device, subject.others_bytes()
                )
            else:
                result.memory["saved_tensors"] = memory.saved_tensor_peak(
                    lambda: subject.step(kind), self.options.steps_per_round
                )

    def _warm_up(self, index: int) -> None:
        subject = self.subjects[index]
        with subject.turn():
            for kind in self.options.batches:
                for _ in range(self.options.warm_up):
                    subject.step(kind)
            with subject.predicting():
                for _ in range(self.options.warm_up):
                    subject.predict()

    def _time_steps(self, index: int, kind: str) -> None:
        subject = self.subjects[index]
        with subject.turn():
            times = time_block(lambda: subject.step(kind), self.options.steps_per_round, subject.trainer.device)
        self.results[index].steps.setdefault(kind, Rounds()).add(times)

    def _time_predict(self, index: int) -> None:
        subject = self.subjects[index]
        with subject.turn(), subject.predicting():
            times = time_block(subject.predict, self.options.steps_per_round, subject.trainer.device)
        self.results[index].predict.add(times)

    def _time_parts(self, index: int) -> None:
        subject = self.subjects[index]
        gc.collect()
        with subject.turn():
            batch = subject.batches[self.options.batches[0]]
            self.results[index].parts = measure_parts(subject.trainer, batch, self.options.steps_per_round)
