"""Two ranks train with J-RAS for two steps and embed the bank anew; for test_ddp_training.py.

python ddp_training_worker.py PLANS DATASET_JSON RESULTS
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as upstream
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_ext.core.logs import EpochLog
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS

WORLD, CPU = 2, torch.device("cpu")
# no seed: nothing but the broadcast lets the ranks agree; 15 guides do not divide evenly
SETTINGS = (
    "batch_size=4 num_epochs=1 num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 panel_every=0 "
    "jras.retriever_widths=[4,8,8] jras.guide_widths=[4,8,8] jras.key_dim=16 jras.bank_size=15 "
    "jras.contrastive_every=2 jras.warmup_fraction=0"
)


class OnTheCpu(nnUNetTrainerJRAS):
    """nnU-Net takes CUDA for granted under DDP; everything else is the trainer's own."""

    def __init__(self, plans, configuration, fold, dataset_json, device=CPU) -> None:
        super().__init__(plans | {"continue_training": False}, configuration, fold, dataset_json, device)
        self.device, self.grad_scaler = CPU, None


def state(trainer: OnTheCpu) -> dict[str, Any]:
    network = trainer.retrieval_network
    assert network is not None
    return {
        "weights": {name: value.clone() for name, value in network.state_dict().items()},
        "bank_state": dict(trainer._bank_state or {}),
        "whole_bank_embedded_alone": network.embed_bank(),
        "generator": trainer.generator.get_state(),
    }


def train(plans: dict, dataset_json: dict) -> dict[str, Any]:
    trainer = OnTheCpu(plans, "2d", 0, dataset_json, CPU)
    trainer.on_train_start()
    found: dict[str, Any] = {"start": state(trainer), "batch_size": trainer.batch_size}
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    found |= {"figures": [sorted(output) for output in outputs], "stepped": state(trainer)}
    trainer.on_train_epoch_end(outputs)
    return found | {"refreshed": state(trainer)}


def run(rank: int, plans: dict, dataset_json: dict, results: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # as forked copies they would agree by chance
    os.environ.update(nnUNet_results=str(results), nnUNet_ext_settings=SETTINGS)
    # a rank that waits for ever would be a defect; let it fail soon
    init = f"file://{results / 'rendezvous'}"
    distributed.init_process_group("gloo", init, timedelta(seconds=60), world_size=WORLD, rank=rank)
    upstream.DDP = lambda module, device_ids: DistributedDataParallel(module)
    EpochLog.plot = lambda self, path=None: None
    torch.save(train(plans, dataset_json), results / f"rank_{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    plans_file, dataset_file, folder = map(Path, sys.argv[1:])
    arguments = (json.loads(plans_file.read_text()), json.loads(dataset_file.read_text()), folder)
    # fork: the imports above take longer than all that is done here
    torch.multiprocessing.start_processes(run, arguments, nprocs=WORLD, start_method="fork")
