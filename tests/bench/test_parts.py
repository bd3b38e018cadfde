"""Where a step's time goes."""

import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from nnunetv2_ext.bench import parts

PAUSES = {"forward": 0.02, "teacher": 0.03, "loss": 0.04, "optimiser": 0.05, "lookup": 0.06, "other": 0.01}


class Sleeping(nn.Module):
    """Sleeps for a part's time on the way."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSES[self.part])
        return x * self.weight


class Trainer:
    """Has what a step needs, and calls the teacher inside the lookup."""

    bench_parts: ClassVar = {"lookup": ("retrieve",)}

    def __init__(self) -> None:
        self.device, self.grad_scaler = torch.device("cpu"), None
        self.network, self.loss = Sleeping("forward"), lambda y: (time.sleep(PAUSES["loss"]), y.sum())[1]
        self.teacher = SimpleNamespace(module=Sleeping("teacher"))
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)

    def retrieve(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSES["lookup"])
        return self.teacher.module(x).detach()

    def clip_gradients(self) -> None:
        time.sleep(PAUSES["optimiser"])

    def train_step(self, batch: torch.Tensor) -> None:
        time.sleep(PAUSES["other"])
        self.loss(self.network(self.retrieve(batch))).backward()
        self.clip_gradients()
        self.optimizer.step()


@pytest.mark.parametrize("compiled", [False, True])
def test_every_part_gets_its_own_time_and_nothing_of_the_part_inside_it(compiled: bool, monkeypatch) -> None:
    trainer = Trainer()
    if compiled:  # both ways in which nnU-Net and we compile
        trainer.network = torch.compile(trainer.network, backend="eager")
        trainer.teacher.module.compile(backend="eager")
        trainer.train_step(torch.ones(3))
    began = time.perf_counter()
    found = parts.measure_parts(trainer, torch.ones(3), steps=2)
    elapsed = time.perf_counter() - began
    assert list(found) == ["forward", "loss", "backward", "lookup", "teacher", "optimiser", "other"]
    for part, pause in PAUSES.items():
        assert found[part] >= pause * 0.99, part  # sleeping may take longer, never shorter
    assert 2 * sum(found.values()) <= elapsed  # nothing counted twice


def test_nothing_stays_on_the_trainer() -> None:
    trainer = Trainer()
    before = (dict(vars(trainer)), torch.autograd.backward, nn.utils.clip_grad_norm_, dict(vars(trainer.optimizer)))
    parts.measure_parts(trainer, torch.ones(3), steps=1)
    after = (dict(vars(trainer)), torch.autograd.backward, nn.utils.clip_grad_norm_, dict(vars(trainer.optimizer)))
    assert before == after
    assert not trainer.network._forward_pre_hooks and not trainer.network._forward_hooks


def test_cuts_are_undone_when_a_step_fails() -> None:
    trainer = Trainer()
    backward = torch.autograd.backward
    with pytest.raises(TypeError):
        parts.measure_parts(trainer, None, steps=1)  # type: ignore[arg-type]
    assert torch.autograd.backward is backward
