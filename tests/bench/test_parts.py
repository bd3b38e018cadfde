"""Where a step's time goes."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_ext.bench import parts
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from tests.jras.conftest import SMALL_JRAS

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


class Bank:
    """Below the network."""

    def lookup(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSES["lookup"])
        return x


class Retrieving(Sleeping):
    """Looks up within its forward."""

    def __init__(self) -> None:
        super().__init__("forward")
        self.bank = Bank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.bank.lookup(x))


class RetrievingTrainer(Trainer):
    """Names parts below itself, and some that it has not."""

    bench_parts: ClassVar = {"lookup": ("network.bank.lookup",), "further": ("network.index.search", "no.such.thing")}

    def __init__(self) -> None:
        super().__init__()
        self.network = Retrieving()
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)

    def retrieve(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of one, which DDP needs."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["plain", "compiled", "compiled in place", "DDP"])
def test_a_method_below_the_trainer_is_a_part_of_its_own(wrapped: str, one_process: None) -> None:
    trainer = RetrievingTrainer()
    inner = trainer.network
    if wrapped == "compiled":
        trainer.network = torch.compile(inner, backend="eager")
    elif wrapped == "compiled in place":
        inner.compile(backend="eager")
    elif wrapped == "DDP":
        trainer.network = DistributedDataParallel(inner)
    trainer.train_step(torch.ones(3))
    found = parts.measure_parts(trainer, torch.ones(3), steps=2)
    assert "further" not in found and list(found).index("lookup") < list(found).index("other")
    assert found["lookup"] >= PAUSES["lookup"] * 0.99
    assert PAUSES["forward"] * 0.99 <= found["forward"] < PAUSES["forward"] + PAUSES["lookup"]
    assert "lookup" not in vars(inner.bank)


def test_a_combination_has_the_parts_of_both_methods() -> None:
    class Other:
        bench_parts: ClassVar = {"other method": ("clip_gradients",)}

    class Both(Trainer, Other):
        pass

    assert set(parts._method_parts(Both())) == {*parts.CORE_PARTS, "lookup", "other method"}


@pytest.mark.parametrize("retriever", ["joint", "none"])
def test_jras_has_guides_and_a_read_of_its_own_where_it_reads(retriever: str, make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerJRAS, f"{SMALL_JRAS} jras.retriever={retriever}")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    reads = {"guides", "read"} if retriever == "joint" else set()
    assert set(parts.measure_parts(trainer, batch, 1)) & {"guides", "read"} == reads


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
