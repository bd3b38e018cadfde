"""Two gloo processes on the CPU for test_ddp.py; what they find goes to RESULTS/rank_*.pt.

python ddp_worker.py PLANS DATASET_JSON RESULTS
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as upstream
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.logs import EpochLog
from nnunetv2_ext.core.step import LossPass, Term, backward_passes
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

WORLD, CPU = 2, torch.device("cpu")
DEFAULTS = "seed=3 batch_size=4 num_epochs=2 num_iterations_per_epoch=5 num_val_iterations_per_epoch=1 panel_every=0"
SETTINGS = (
    f"{DEFAULTS} medcontext.masked_every=2 medcontext.masked_fraction=0.5 medcontext.ramp_fraction=0.2 "
    "medcontext.fill=noise"
)


def pass_data(rank: int) -> list[torch.Tensor]:
    """Three batches of a rank, (2, 1, 8, 8) each."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def pass_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()


def averaged_gradients(rank: int) -> dict[str, Any]:
    network = DistributedDataParallel(pass_network())
    exchanges: list[int] = []

    def counting_average(state, bucket):  # DDP refuses annotations that are strings
        exchanges.append(1)
        work = distributed.all_reduce(bucket.buffer() / WORLD, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    network.register_comm_hook(None, counting_average)
    passes = [
        LossPass(f"p{i}", lambda d=data, i=i: {f"p{i}": Term((network(d) ** 2).mean(), i + 1.0)})
        for i, data in enumerate(pass_data(rank))
    ]
    counts = []
    for _ in range(2):  # from the second step on DDP has its final buckets
        network.zero_grad()
        exchanges.clear()
        backward_passes(passes, network, CPU, None)
        counts.append(len(exchanges))
    return {"gradients": [p.grad for p in network.parameters()], "exchanges": counts}


class OnTheCpu(nnUNetTrainerMedContext):
    """nnU-Net takes CUDA for granted under DDP; everything else is the trainer's own."""

    def __init__(self, plans, configuration, fold, dataset_json, device=CPU) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.device, self.grad_scaler = CPU, None


def make_trainer(
    plans: dict, dataset_json: dict, results: Path, settings: str = SETTINGS, continued: bool = False
) -> OnTheCpu:
    os.environ.update(nnUNet_results=str(results), nnUNet_ext_settings=settings)
    plans = json.loads(json.dumps(plans)) | {"continue_training": continued}
    return OnTheCpu(plans, "2d", 0, dataset_json, CPU)


def state(trainer: OnTheCpu) -> dict[str, Any]:
    return {
        "student": {k: v.clone() for k, v in unwrap(trainer.network).state_dict().items()},
        "teacher": {k: v.clone() for k, v in trainer.teacher.state_dict().items()},
        "generator": trainer.generator.get_state(),
        "step": trainer.global_step,
        "batch_size": trainer.batch_size,
    }


def whole_training(trainer: OnTheCpu) -> dict[str, Any]:
    """Run to the end and keep the state from before nnU-Net's on_train_end, which frees the teacher."""
    kept: dict[str, Any] = {"figures": []}
    step, end = trainer.train_step, trainer.on_train_end
    trainer.train_step = lambda batch: (kept["figures"].append(step(batch)), kept["figures"][-1])[1]
    trainer.on_train_end = lambda: (kept.update(state(trainer)), end())
    trainer.run_training()
    return kept


def five_steps(plans: dict, dataset_json: dict, results: Path, settings: str) -> dict[str, Any]:
    trainer = make_trainer(plans, dataset_json, results, settings)
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    figures = [sorted(trainer.train_step(next(trainer.dataloader_train))) for _ in range(5)]
    return state(trainer) | {"figures": figures}


def stopped_and_continued(plans: dict, dataset_json: dict, results: Path, rank: int) -> dict[str, Any]:
    trainer = make_trainer(plans, dataset_json, results / "stopped")
    step, code = trainer.train_step, None

    def step_and_signal(batch: dict) -> dict:
        output = step(batch)
        if rank == 1 and trainer.global_step == 7:  # one rank only
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    trainer.train_step = step_and_signal
    try:
        trainer.run_training()
    except SystemExit as error:
        code = error.code
    stopped = {"code": code, "stopped_at": trainer.global_step, "log": ""}
    if rank == 0:  # the others write none
        stopped["log"] = Path(trainer.log_file).read_text()
    distributed.barrier()
    again = make_trainer(plans, dataset_json, results / "stopped", continued=True)
    path = Path(again.output_folder) / "checkpoint_latest.pth"
    again.load_checkpoint(str(path))
    distributed.barrier()
    return stopped | {"final": whole_training(again)}


def run(rank: int, plans: dict, dataset_json: dict, results: Path) -> None:
    torch.set_num_threads(1)
    # a rank that waits for ever would be a defect; let it fail soon
    init = f"file://{results / 'rendezvous'}"
    distributed.init_process_group("gloo", init, timedelta(seconds=60), world_size=WORLD, rank=rank)
    upstream.DDP = lambda module, device_ids: DistributedDataParallel(module)
    MetaLogger.plot_progress_png = lambda self, folder: None
    EpochLog.plot = lambda self, path=None: None
    found: dict[str, Any] = {"passes": averaged_gradients(rank)}
    found["steps"] = five_steps(plans, dataset_json, results / "steps", SETTINGS)
    found["defaults"] = five_steps(plans, dataset_json, results / "defaults", DEFAULTS)
    found["whole"] = whole_training(make_trainer(plans, dataset_json, results / "whole"))
    found["stopped"] = stopped_and_continued(plans, dataset_json, results, rank)
    torch.save(found, results / f"rank_{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    plans_file, dataset_file, folder = map(Path, sys.argv[1:])
    arguments = (json.loads(plans_file.read_text()), json.loads(dataset_file.read_text()), folder)
    # fork: the imports above take longer than all that is done here
    torch.multiprocessing.start_processes(run, arguments, nprocs=WORLD, start_method="fork")
