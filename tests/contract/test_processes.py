"""Spawned loader workers, and two ranks of a distributed training."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.table import Row, environment, over

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def spawned() -> Iterator[Pool]:
    """One worker as Windows and macOS start them: what it gets, it gets by pickle."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@over()
def test_class_datasets_loaders_and_transforms_work_in_a_spawned_worker(row: Row, build: Callable, spawned) -> None:
    trainer = build("seed=1")
    assert pickle.loads(pickle.dumps(row.cls)) is row.cls
    assert spawned.apply_async(getattr, (row.cls, "__name__")).get(120) == row.name
    trainer.initialize()
    taken = trainer.get_tr_and_val_datasets
    datasets: list = []
    trainer.get_tr_and_val_datasets = lambda: datasets.extend(taken()) or datasets
    for augmenter, data in zip(trainer.get_dataloaders(), datasets):
        loader = augmenter.data_loader
        assert spawned.apply_async(getattr, (data, "identifiers")).get(120) == data.identifiers
        batch = spawned.apply_async(next, (loader,)).get(120)  # through its transforms
        patch = tuple(trainer.configuration_manager.patch_size)
        assert batch["data"].shape == (trainer.batch_size, trainer.num_input_channels, *patch)
        assert set(batch["keys"]) <= set(data.identifiers)


@pytest.mark.slow
@over()
def test_two_ranks_train_one_network_or_refuse(row: Row, request, tmp_path) -> None:
    dataset = request.getfixturevalue(row.facts.data)
    base = dataset.preprocessed / dataset.name
    where = [row.configuration, str(base / "tiny.json"), str(base / "dataset.json"), str(tmp_path)]
    settings = row.settings("batch_size=4 num_epochs=1 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1")
    done = subprocess.run(
        [sys.executable, str(WORKER), row.module, row.name, *where],
        env={**os.environ, **environment(), **dataset.environment(tmp_path, settings)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    first, second = (_read(tmp_path / f"rank_{rank}.pt") for rank in (0, 1))
    if "ddp" in row.facts.refuses:
        for found in (first, second):
            assert re.search(row.facts.refuses["ddp"], found["refusal"]) and "\n" not in found["refusal"]
        return
    assert first["start"].keys() == second["start"].keys()
    for moment in ("start", "end"):
        assert [k for k, v in first[moment].items() if not torch.equal(v, second[moment][k])] == []
    assert any(not torch.equal(value, first["end"][name]) for name, value in first["start"].items())
    assert first["losses"] != second["losses"], "each rank has its own batches"


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)
