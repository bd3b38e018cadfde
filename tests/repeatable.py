"""With a seed and loading in this process, two trainings on the CPU are the same, whatever ran before them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2_ext.core import randomness

LENGTH = "num_epochs=2 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 panel_every=0"
CLOCK = ("_seconds", "_ms")


def assert_the_seed_decides(make: Callable[[str, Path], Any], folder: Path) -> list[dict[str, str]]:
    """The same seed gives the same epochs.csv and another seed another one; returns the table.

    Args:
        make: a trainer from settings text and results folder.
        folder: for the results.
    """
    first = _table(make, 5, folder / "a", before=1)
    assert len(first) == 2 and len(first[0]) > 5
    assert _table(make, 5, folder / "b", before=2) == first
    assert _table(make, 6, folder / "c", before=1) != first
    return first


def _table(make: Callable[[str, Path], Any], seed: int, results: Path, before: int) -> list[dict[str, str]]:
    """epochs.csv of a training after other random numbers were drawn; without the columns that hold durations."""
    randomness.seed_everything(before)
    trainer = make(f"{LENGTH} seed={seed}", results)
    trainer.run_training()
    with open(Path(trainer.output_folder) / "epochs.csv", encoding="utf-8") as lines:
        return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in csv.DictReader(lines)]
