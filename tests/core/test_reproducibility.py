"""With a seed and loading in this process, two trainings on the CPU are the same, whatever ran before them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_ext.core import randomness
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

LENGTH = "num_epochs=2 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 panel_every=0"
CLOCK = ("_seconds", "_ms")


def table(make_trainer: Any, cls: type, seed: int, results: Path, before: int) -> list[dict[str, str]]:
    """epochs.csv of a training after other random numbers were drawn; without the columns that hold durations."""
    randomness.seed_everything(before)
    trainer = make_trainer(cls, f"{LENGTH} seed={seed}", configuration="2d", results=results)
    trainer.run_training()
    with open(Path(trainer.output_folder) / "epochs.csv", encoding="utf-8") as lines:
        return [{k: v for k, v in row.items() if not k.endswith(CLOCK)} for row in csv.DictReader(lines)]


@pytest.mark.parametrize("cls", [nnUNetTrainerMedContext, nnUNetTrainerJRAS])
def test_the_same_seed_gives_the_same_table_and_another_seed_another(cls, make_trainer, no_pictures, tmp_path) -> None:
    first = table(make_trainer, cls, 5, tmp_path / "a", before=1)
    assert len(first) == 2 and len(first[0]) > 5
    assert table(make_trainer, cls, 5, tmp_path / "b", before=2) == first
    assert table(make_trainer, cls, 6, tmp_path / "c", before=1) != first
