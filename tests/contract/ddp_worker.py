"""Two gloo processes on the CPU train one trainer for two steps; what they find goes to RESULTS/rank_*.pt.

python ddp_worker.py MODULE TRAINER CONFIGURATION PLANS DATASET_JSON RESULTS
"""

from __future__ import annotations

import importlib
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as upstream
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_ext.core.checkpoint import unwrap

WORLD, CPU = 2, torch.device("cpu")


def on_the_cpu(cls: type) -> type:
    """nnU-Net takes CUDA for granted under DDP; everything else is the trainer's own."""

    class OnTheCpu(cls):
        def __init__(self, plans, configuration, fold, dataset_json, device=CPU) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.device, self.grad_scaler = CPU, None

    OnTheCpu.__name__ = cls.__name__
    return OnTheCpu


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    modules = {"network": unwrap(trainer.network), **trainer.training_modules}
    # statistics of batch norms, which are synchronised on CUDA only, are not among them
    states = ((part, dict(module.named_parameters())) for part, module in modules.items())
    return {f"{part}.{name}": value.detach().clone() for part, state in states for name, value in state.items()}


def two_steps(cls: type, configuration: str, plans: dict[str, Any], dataset_json: dict[str, Any]) -> dict[str, Any]:
    trainer = on_the_cpu(cls)(plans | {"continue_training": False}, configuration, 0, dataset_json, CPU)
    try:
        trainer.on_train_start()
    except (ValueError, NotImplementedError) as error:
        return {"refusal": str(error)}
    start = weights(trainer)
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    trainer.on_train_epoch_end(outputs)
    return {"start": start, "end": weights(trainer), "losses": [float(output["loss"]) for output in outputs]}


def run(rank: int, module: str, name: str, configuration: str, plans: str, dataset_json: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # as forked copies they would agree by chance
    # a rank that waits for ever would be a defect; let it fail soon
    init = f"file://{Path(results) / 'rendezvous'}"
    distributed.init_process_group("gloo", init, timedelta(seconds=60), world_size=WORLD, rank=rank)
    upstream.DDP = lambda module, device_ids: DistributedDataParallel(module)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = lambda module, process_group=None: module  # CUDA only
    cls = getattr(importlib.import_module(module), name)
    found = two_steps(cls, configuration, *(json.loads(Path(file).read_text()) for file in (plans, dataset_json)))
    torch.save(found, Path(results) / f"rank_{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    importlib.import_module(sys.argv[1])  # before the fork: imports take longer than all that is done here
    torch.multiprocessing.start_processes(run, tuple(sys.argv[1:]), nprocs=WORLD, start_method="fork")
