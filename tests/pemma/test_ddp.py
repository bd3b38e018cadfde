"""Two gloo processes, one of them without the new channel: neither waits for ever, and both learn the same."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.pemma.test_network import images, make

STEPS = 2


def batch() -> torch.Tensor:
    """Four samples; the second half, of rank 1, lacks the new channel."""
    x = images("2d", batch=4)
    x[2:, 1] = 0
    return x


def train(network: Any, x: torch.Tensor, inner: Any) -> dict[str, torch.Tensor]:
    """A loss that is a mean over samples: the mean of the ranks' gradients is the whole batch's."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    for _ in range(STEPS):  # DDP finds a parameter without gradient at the second one
        optimizer.zero_grad()
        sum((level[:, 1] - 1).square().mean() for level in network(x)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in inner.adapters.named_parameters()}


def rank_of(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{Path(folder) / 'rendezvous'}"
    distributed.init_process_group("gloo", init, timedelta(seconds=60), world_size=2, rank=rank)
    network, _ = make("2d", deep_supervision=True)
    wrapped = DistributedDataParallel(network.train())
    torch.save(train(wrapped, batch().chunk(2)[rank], network), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_a_rank_without_the_channel_holds_nobody_up_and_the_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(rank_of, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    network, _ = make("2d", deep_supervision=True)
    start = {name: p.detach().clone() for name, p in network.adapters.named_parameters()}
    alone = train(network.train(), batch(), network)
    for name, value in alone.items():
        assert torch.equal(found[0][name], found[1][name])
        assert torch.allclose(found[0][name], value, rtol=1e-4, atol=1e-6), name
    assert any(not torch.equal(value, start[name]) for name, value in alone.items())
