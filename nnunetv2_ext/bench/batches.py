"""One fixed batch per trainer: real, from its own loader, or synthetic of the same shape."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("real", "synthetic")
SEED = 20240705  # any fixed number: trainers whose loaders draw alike then get the same patches


def seed_everything() -> None:
    """Seed python, numpy and torch: every trainer starts with the same weights, every loader draws the same patches."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def real_batch(trainer: Any) -> dict[str, Any]:
    """The next training batch of ``trainer``, on the CPU and pinned for a GPU as nnU-Net's loaders do it."""
    seed_everything()
    batch = next(trainer.dataloader_train)
    if trainer.device.type != "cuda":
        return batch
    return {key: _map(value, Tensor.pin_memory) for key, value in batch.items()}


def synthetic_batch(batch: Mapping[str, Any], num_labels: int) -> dict[str, Any]:
    """A batch of the shapes and types of ``batch``: noise as ``data``, random labels as ``target``, the rest kept.

    Args:
        batch: of the trainer's loader.
        num_labels: labels 0..num_labels-1 are drawn where the target holds labels; targets of regions get 0 and 1.
    """
    generator = torch.Generator().manual_seed(SEED)

    def labels(like: Tensor) -> Tensor:
        # regions are stacked along the channels
        highest = 2 if like.dtype == torch.bool or like.shape[1] > 1 else num_labels
        return torch.randint(highest, like.shape, generator=generator).to(like.dtype)

    synthetic = copy.copy(dict(batch))
    synthetic["data"] = torch.randn(batch["data"].shape, generator=generator).to(batch["data"].dtype)
    synthetic["target"] = _map(batch["target"], labels)
    if batch["data"].is_pinned():
        synthetic = {key: _map(value, Tensor.pin_memory) for key, value in synthetic.items()}
    return synthetic


def _map(value: Any, function: Any) -> Any:
    if isinstance(value, list):
        return [_map(v, function) for v in value]
    return function(value) if isinstance(value, Tensor) else value
