"""What examples/ladder.py does before and after its runs: time a step of each, and compare what came out."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TIMED_STEPS = 6
WARM_UP = 3


def measure(task: dict[str, Any], prepare_network: Callable[[Any], None] | None = None) -> None:
    """Write the seconds of a training step, loading included, to ``task["seconds"]``; in a process of its own.

    The trainer is built as the training will build it, but nothing is kept: its results go to a temporary folder.
    """
    os.environ.update(task["environment"])
    sys.stdout = sys.stderr = open(task["log"], "a", buffering=1)  # noqa: SIM115  # for the rest of this process
    import torch

    from nnunetv2_ext.bench.candidates import Candidate
    from nnunetv2_ext.bench.subject import Subject, Target, dry_environment
    from nnunetv2_ext.data.find import PREPROCESSED, find_dataset

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    dataset = find_dataset(task["dataset"], PREPROCESSED).name
    places = (dataset, task["configuration"], task["plans"], task["fold"], task["device"])
    with dry_environment():
        subject = Subject(
            Candidate(task["trainer"], task["environment"]["nnUNet_ext_settings"]), Target(*places), ("real",)
        )
        if prepare_network is not None:
            prepare_network(subject.trainer)
        for number in range(WARM_UP + TIMED_STEPS):
            if number == WARM_UP:
                start = time.perf_counter()
            subject.trainer.train_step(next(subject.trainer.dataloader_train))  # waits for a GPU: it returns the loss
        seconds = (time.perf_counter() - start) / TIMED_STEPS
    Path(task["seconds"]).write_text(repr(seconds))


class Timing:
    """Seconds per step of each run, kept in a file so that a continued ladder plans with the same numbers."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def add(self, name: str, seconds: float) -> None:
        """Keep a measurement."""
        self.seconds[name] = seconds
        self.file.write_text(json.dumps(self.seconds, indent=1) + "\n")

    def equal_time_factors(self, reference: str) -> dict[str, float]:
        """How many times as many steps each run makes in the time of ``reference``."""
        return {name: self.seconds[reference] / seconds for name, seconds in self.seconds.items()}

    def hours(self, steps: Mapping[str, int], plan: Sequence[str]) -> float:
        """Hours of all runs of a plan (names, once per run)."""
        return sum(self.seconds[name] * steps[name] for name in plan) / 3600


def references(ladder: Mapping[str, Any]) -> list[str]:
    """The runs that the ladder wants the others compared with: ``reference``, a name or several."""
    named = ladder.get("reference") or []
    return [named] if isinstance(named, str) else list(named)


def compare_all(args: Any, size: int, finished: Mapping[str, Sequence[Path]], wanted: Sequence[str]) -> int:
    """``nnUNetv2_ext compare`` of the finished runs of one size, once for each reference; returns its exit status.

    Args:
        args: of ladder.py.
        size: training cases, 0 for all.
        finished: run to the results folder of each finished seed.
        wanted: references; those that are not finished are left out, without any the first run is the one.
    """
    status = 0
    for number, reference in enumerate([name for name in wanted if name in finished] or list(finished)[:1]):
        folder = f"comparison_n{size or 'all'}" + (f"_to_{reference}" if number else "")
        status |= compare(args, folder, dict(sorted(finished.items(), key=lambda item: item[0] != reference)))
    return status


def compare(args: Any, folder: str, folders: Mapping[str, Sequence[Path]]) -> int:
    """``nnUNetv2_ext compare``; returns its exit status.

    Args:
        args: of ladder.py.
        folder: in the output folder.
        folders: run to the results folder of each finished seed; the first run is the reference.
    """
    from nnunetv2_ext.cli import main as ext_main

    command = ["compare", "-d", str(args.dataset), "-c", args.configuration, "-p", args.plans]
    for name, seeds in folders.items():
        if args.test_set:
            command += ["--predictions", name, *(str(seed / "test") for seed in seeds)]
        else:
            command += ["--run", name, *map(str, seeds)]
    if args.test_set:
        command += ["--truth", str(args.test_set / "labelsTs"), "--images", str(args.test_set / "imagesTs")]
    else:
        # a row may train on fewer cases on purpose, and a seed that is still missing is a draw that is missing
        command += ["-f", str(args.fold), "--allow-different-training-cases"]
    command += ["-o", str(args.output / folder)]
    print(f"\nnnUNetv2_ext {shlex.join(command)}\n", flush=True)
    return ext_main(command)
