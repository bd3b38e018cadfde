"""The share of a step that waits for the loader."""

import time
from types import SimpleNamespace

import pytest
import torch

from nnunetv2_ext.bench import isolated
from nnunetv2_ext.bench.candidates import Candidate
from nnunetv2_ext.bench.loading import measure_loading
from nnunetv2_ext.bench.subject import Target


class Loader:
    """Hands out some batches that lie ready, and makes each further one in 30 ms."""

    num_cached, num_processes = 2, 1

    def __init__(self) -> None:
        self.asked = 0

    def __next__(self) -> int:
        self.asked += 1
        if self.asked > 2 * self.num_cached + self.num_processes:
            time.sleep(0.03)
        return self.asked


def test_batches_that_lay_ready_do_not_count() -> None:
    loader, seen = Loader(), []
    step = lambda batch: (seen.append(batch), time.sleep(0.01))  # noqa: E731
    trainer = SimpleNamespace(dataloader_train=loader, device=torch.device("cpu"), train_step=step)
    found = measure_loading(trainer, 5)
    assert seen == list(range(1, 12))
    assert found["wait"] >= 0.03 and found["step"] >= 0.01
    assert found["share"] == pytest.approx(found["wait"] / (found["wait"] + found["step"]))
    assert found["share"] > 0.55  # 0.75 on an idle machine; with the first batches it would be 0.34


def test_a_stream_of_unlabelled_patches_comes_from_the_workers_too(tiny, tmp_path, monkeypatch) -> None:
    for name, value in tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(name, value)
    settings = "wtbcp.unlabelled=rest train_cases=2 wtbcp.unlabelled_start=0"  # its step raises without the stream
    candidate, target = Candidate("nnUNetTrainerWTBCP", settings), Target(tiny.name, "2d", "tiny", threads=1)
    found = isolated.loading(candidate, target, 3, 1)
    assert set(found) == {"wait", "step", "share"} and found["step"] > 0 and 0 <= found["share"] < 1
