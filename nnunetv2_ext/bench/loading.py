"""How long a training waits for its loader, whose worker processes share the machine with the step."""

import time
from typing import Any

import torch


def measure_loading(trainer: Any, steps: int) -> dict[str, float]:
    """Mean seconds of a training step, of which ``step`` and the ``wait`` for its batch, and the wait's ``share`` 0..1.

    The batches that lie ready are used up first: the rate at which new ones come is what counts over a training.

    Args:
        trainer: after ``on_train_epoch_start``; its loader has worker processes.
        steps: that count.
    """
    loader, device = trainer.dataloader_train, trainer.device
    # batchgenerators keeps so many in each of two queues, and each worker holds one
    ready = 2 * getattr(loader, "num_cached", 0) + getattr(loader, "num_processes", 0) + 1
    finish = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    seconds = {"wait": 0.0, "step": 0.0}
    for number in range(ready + steps):
        begin = time.perf_counter()
        batch = next(loader)
        got = time.perf_counter()
        trainer.train_step(batch)
        finish()
        if number >= ready:
            seconds["wait"] += (got - begin) / steps
            seconds["step"] += (time.perf_counter() - got) / steps
    return {**seconds, "share": seconds["wait"] / (seconds["wait"] + seconds["step"])}


def end_workers(trainer: Any) -> None:
    """As nnU-Net does after a training."""
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):  # else without workers
            loader._finish()
