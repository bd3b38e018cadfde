"""Distributed training on two processes: averaged gradients, equal networks and teachers, one stop for all."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def worker() -> Any:
    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory) -> Path:
    """The folder of one run of the worker: all scenarios in one process group."""
    folder = tmp_path_factory.mktemp("ddp")
    base = tiny.preprocessed / tiny.name
    command = [sys.executable, str(WORKER), str(base / "tiny.json"), str(base / "dataset.json"), str(folder)]
    environment = {**os.environ, **tiny.environment(folder)}
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(results) -> list[dict[str, Any]]:
    return [torch.load(results / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_accumulated_gradients_are_averaged_over_the_ranks(ranks, worker):
    oracle = worker.pass_network()
    for rank in (0, 1):
        for number, data in enumerate(worker.pass_data(rank)):
            ((number + 1) * (oracle(data) ** 2).mean() / 2).backward()
    for found in ranks:
        for ours, expected in zip(found["passes"]["gradients"], oracle.parameters()):
            torch.testing.assert_close(ours, expected.grad, rtol=1e-6, atol=1e-12)


def test_only_the_last_pass_is_exchanged(ranks):
    for found in ranks:
        assert found["passes"]["exchanges"][1] == 1  # this network is one bucket; three passes


@pytest.mark.parametrize("scenario", ["steps", "defaults"])
def test_students_and_teachers_are_equal_on_both_ranks(ranks, scenario):
    first, second = (found[scenario] for found in ranks)
    assert_same_tensors(first["student"], second["student"])
    assert_same_tensors(first["teacher"], second["teacher"])
    assert any(not torch.equal(first["teacher"][key], first["student"][key]) for key in first["student"])
    assert first["step"] == second["step"] == 5
    assert first["batch_size"] == second["batch_size"] == 2  # 4 over both


def test_ranks_agree_on_the_steps_with_a_masked_pass_and_mask_differently(ranks):
    first, second = (found["steps"] for found in ranks)
    masked = ["consistency", "grad_norm", "loss", "masked_supervised", "supervised"]
    plain = ["grad_norm", "loss", "supervised"]
    assert first["figures"] == second["figures"] == [masked, plain, masked, plain, masked]
    assert not torch.equal(first["generator"], second["generator"])


def test_epochs_csv_holds_every_term_s_mean_over_both_ranks(results, ranks):
    (path,) = (results / "whole").glob("*/*/fold_0/epochs.csv")
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2
    for epoch, row in enumerate(rows):
        steps = [found["whole"]["figures"][5 * epoch : 5 * epoch + 5] for found in ranks]
        for term in ("supervised", "masked_supervised", "consistency"):
            first, second = (np.mean([figures[term] for figures in rank if term in figures]) for rank in steps)
            assert first != pytest.approx(second, rel=1e-3), "each rank has its own batches"
            assert float(row[f"loss/{term}"]) == pytest.approx((first + second) / 2, rel=1e-5)


def test_a_signal_to_one_rank_ends_all_at_the_same_step(ranks):
    for found in ranks:
        assert found["stopped"]["code"] == 128 + signal.SIGTERM
        assert found["stopped"]["stopped_at"] == 7
    assert "Stopped by SIGTERM in epoch 1 after 2 training steps" in ranks[0]["stopped"]["log"]


def test_a_stopped_training_continues_on_all_ranks_bit_for_bit(ranks):
    for found in ranks:
        whole, continued = found["whole"], found["stopped"]["final"]
        assert whole["step"] == continued["step"] == 10
        assert_same_tensors(whole["student"], continued["student"])
        assert_same_tensors(whole["teacher"], continued["teacher"])
        assert torch.equal(whole["generator"], continued["generator"])


def test_a_checkpoint_holds_every_rank_s_random_state(results):
    (path,) = (results / "whole").glob("*/*/fold_0/checkpoint_final.pth")
    states = read(path)[EXTENSION_KEY]["random_states"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])
    assert set(read(path)["network_weights"]) and not any(
        k.startswith("module.") for k in read(path)["network_weights"]
    )
