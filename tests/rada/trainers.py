"""RADA trainers on the sparse phantoms, and batches of their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_ext.rada.views import INSIDE
from nnunetv2_ext.trainers.nnUNetTrainerRADA import nnUNetTrainerRADA
from tests.conftest import TinyDataset

IGNORE = 3


@pytest.fixture
def make_rada(make_trainer, sparse_tiny: TinyDataset) -> Callable[..., Any]:
    """``make_rada("key=value ...", **make_trainer's options)``: semantics off, seed 3, both kinds of cases."""

    def make(settings: str = "", cls: type = nnUNetTrainerRADA, **options: Any) -> Any:
        keys = {pair.split("=")[0] for pair in settings.split()}
        base = " ".join(
            pair for pair in ("rada.semantics=off", "rada.min_labelled=1", "seed=3") if pair.split("=")[0] not in keys
        )
        return make_trainer(cls, f"{base} {settings}", **{"dataset": sparse_tiny, **options})

    return make


def sparse_batch(trainer: Any, keys: list[str], seed: int = 0, bits: int | None = None) -> dict[str, Any]:
    """Noise with three random orthogonal planes in labelled cases, or with all their voxels on planes of ``bits``."""
    generator = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    data = torch.randn(len(keys), 1, *patch, generator=generator)
    target = torch.full((len(keys), 2, *patch), IGNORE, dtype=torch.int16)
    target[:, 1] = INSIDE
    for n, key in enumerate(keys):
        if key not in trainer.labelled_cases:
            continue
        dense = torch.randint(0, 3, patch, generator=generator).to(torch.int16)
        for axis in range(3):
            index = int(torch.randint(2, patch[axis] - 2, (1,), generator=generator))
            where = (slice(None),) * axis + (index,)
            target[(n, 0, *where)] = dense[where]
            target[(n, 1, *where)] |= 1 << axis
        if bits is not None:
            target[n, 0], target[n, 1] = dense, INSIDE | bits
    return {"data": data, "target": target, "keys": np.array(keys)}


def mixed_keys(trainer: Any) -> list[str]:
    """A labelled and an unlabelled training case."""
    cases = trainer.training_data.identifiers
    return [
        next(case for case in cases if case in trainer.labelled_cases),
        next(case for case in cases if case not in trainer.labelled_cases),
    ]


def log_of(trainer: Any) -> str:
    with open(trainer.log_file) as file:
        return file.read()
