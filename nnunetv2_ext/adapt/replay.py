"""Batches that are filled up with cases of the old site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

NEW, OLD = "new", "old"


class ReplayLoader:
    """Joins nnU-Net's batches of two loaders; ``domain`` says of each sample whether it is new or old.

    The number of old samples is ``share`` times the batch size. What is left of a whole sample is drawn, so that a
    batch of one is old in that share of the steps. New samples come first.

    Args:
        new, old: nnUNetDataLoader, both with probabilistic oversampling: nnU-Net's other rule counts within a batch.
        share: of old samples, 0 to 1.
    """

    def __init__(self, new: Any, old: Any, share: float) -> None:
        self.new, self.old = new, old
        self.batch_size = int(new.batch_size)
        self._whole, self._rest = divmod(share * self.batch_size, 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        number = int(self._whole)
        if self._rest:  # numpy's stream, which a checkpoint keeps
            number += int(np.random.uniform() < self._rest)
        parts = []
        for loader, size in ((self.new, self.batch_size - number), (self.old, number)):
            if size:
                loader.batch_size = size
                parts.append(next(loader))
        batch = parts[0] if len(parts) == 1 else _joined(*parts)
        return batch | {"domain": (NEW,) * (self.batch_size - number) + (OLD,) * number}

    def set_thread_id(self, thread_id: int) -> None:
        """What nnU-Net's worker processes call first."""
        for loader in (self.new, self.old):
            loader.set_thread_id(thread_id)


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    target = one["target"]
    return {
        "data": torch.cat((one["data"], other["data"])),
        "target": [torch.cat(levels) for levels in zip(target, other["target"])]
        if isinstance(target, list)
        else torch.cat((target, other["target"])),
        "keys": np.concatenate((one["keys"], other["keys"])),
    }
