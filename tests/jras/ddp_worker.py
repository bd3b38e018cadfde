"""One rank of test_ddp.py: the gradients of a step of a J-RAS network on its half of the batch, for every kind of step.

Usage: ddp_worker.py RANK WORLD_SIZE PORT OUTPUT CASE...
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.jras.network import Exclusion, JRASNetwork, excluding
from nnunetv2_ext.jras.settings import JRASSettings


class Backbone(nn.Module):
    """The smallest network with an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()


class Encoder(nn.Module):
    output_channels = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        skip = self.first(x).relu()
        return [skip, self.second(skip).relu()]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, 3, 1)

    def forward(self, skips: list[torch.Tensor]) -> torch.Tensor:
        return self.out(torch.cat((skips[0], self.up(skips[1])), 1))


def build() -> JRASNetwork:
    torch.manual_seed(0)
    settings = JRASSettings(retriever_widths=[4, 8, 8], guide_widths=[4, 8, 8], key_dim=8)
    network = JRASNetwork(Backbone(), settings, image_channels=1, heads=3, patch_size=(16, 16))
    lut = torch.zeros(256, 3, dtype=torch.uint8)
    lut[[0, 1, 2], [0, 1, 2]] = 1
    labels = torch.randint(0, 3, (10, 8, 8), dtype=torch.uint8)
    network.bank.fill(torch.randn(10, 1, 8, 8), labels, torch.arange(10) // 2, lut)
    network.bank.set_keys(network.embed_bank())
    return network


def step(network: nn.Module, x: torch.Tensor, case: str, dropped: bool) -> None:
    """Gradients of: a contrastive-like pass on the retriever alone (``contrastive``), then the segmentation pass."""
    inner = unwrap(network)
    inner.retriever_is_fixed = case == "warmup"
    if case == "contrastive":
        with network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext():
            inner.retriever(inner.low_resolution(x)).pow(3).sum(1).mean().backward()
    exclusion = Exclusion(torch.full((len(x),), -1), 1.0 if dropped else 0.0, torch.Generator().manual_seed(0))
    with excluding(exclusion):
        network(x).square().mean().backward()


def gradients(rank: int, size: int, case: str) -> dict[str, torch.Tensor]:
    """Of all parameters; with one process, the mean over both halves of the batch, one after the other."""
    network = build()
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    if size == 1:
        for half in (0, 1):
            step(network, x[2 * half : 2 * half + 2], case, dropped=case == "dropout" and half == 1)
        return {name: p.grad / 2 for name, p in network.named_parameters()}
    network.bank.groups[:1] = 1000 + rank
    wrapped = torch.compile(network, backend="eager") if case == "compiled" else network
    parallel = DistributedDataParallel(wrapped)
    for turn in range(2):  # the second forward would complain of parameters that the first left without a gradient
        network.zero_grad()
        step(parallel, x[2 * rank : 2 * rank + 2], case, dropped=case == "dropout" and rank == 1)
        assert int(network.bank.groups[0]) == 1000 + rank, f"the bank was broadcast in turn {turn}"
    return {name: p.grad for name, p in network.named_parameters()}


def main() -> None:
    rank, size, port, output, *cases = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    found = {case: gradients(rank, size, case) for case in cases}
    if size > 1:
        distributed.destroy_process_group()
    if rank == 0:
        torch.save(found, output)


if __name__ == "__main__":
    main()
