"""The marker of benchmarks, and a trainer that runs out of memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "benchmark: measures time; runs with -m benchmark or NNUNETV2_EXT_BENCHMARK=1")


BROKEN_TRAINERS = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerOutOfMemory(nnUNetTrainer):
    def train_step(self, batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")


class nnUNetTrainerFailsLater(nnUNetTrainer):
    steps = 0

    def train_step(self, batch):
        self.steps += 1
        if self.steps > 4:
            raise RuntimeError("the fifth\\nstep")
        return super().train_step(batch)
"""


@pytest.fixture
def foreign_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's own way of adding trainers: a folder in nnUNet_extTrainer; ours stays in it."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "foreign_trainers_of_a_test.py").write_text(BROKEN_TRAINERS)
    monkeypatch.setenv("nnUNet_extTrainer", os.environ.get("nnUNet_extTrainer", "") + os.pathsep + str(folder))
