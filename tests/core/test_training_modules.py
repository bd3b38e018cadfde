"""Training modules under DDP: one set of weights on all ranks, gradients averaged, unused modules left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys
from datetime import timedelta
import torch
from torch import distributed, multiprocessing, nn
from nnunetv2_ext.core.training_modules import average_gradients, same_on_all_ranks

def work(rank, folder):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(rank)
    used = same_on_all_ranks(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    unused, on_one = same_on_all_ranks(nn.Linear(2, 2)), same_on_all_ranks(nn.Linear(2, 2))
    start = [p.detach().clone() for m in (used, unused, on_one) for p in m.parameters()]
    used[0](torch.full((1, 1, 3, 3), rank + 1.0)).sum().backward()
    used[0](torch.full((1, 1, 3, 3), 10.0)).sum().backward()  # in two passes of a step
    if rank == 1:
        on_one(torch.ones(1, 2)).sum().backward()
    average_gradients([used, unused, on_one])
    found = {
        "start": start,
        "kinds": [type(m).__name__ for m in used],
        "used": used[0].weight.grad,
        "unused": unused.weight.grad,
        "on_one": on_one.weight.grad,
    }
    torch.save(found, f"{folder}/rank_{rank}.pt")
    distributed.destroy_process_group()

if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
"""


def test_gradients_are_averaged_over_the_ranks_and_weights_start_equal(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=240)
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first["start"], second["start"]))
    assert first["kinds"] == ["Conv2d", "SyncBatchNorm"]
    for found in (first, second):
        assert torch.equal(found["used"], torch.full((2, 1, 3, 3), 11.5))
        assert found["unused"] is None
        assert torch.equal(found["on_one"], torch.full((2, 2), 0.5))
