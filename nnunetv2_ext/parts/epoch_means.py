"""Means over the steps of an epoch, kept on the device so that no step waits for them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class EpochMeans:
    """Running means by name; values that are not finite (nothing to measure in a step) are left out."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,) float32: sum and number of the values

    def add(self, name: str, value: Tensor) -> None:
        """Take a step's value, 0-dim."""
        value = value.detach().float()
        finite = torch.isfinite(value)
        entry = torch.stack((torch.where(finite, value, 0.0), finite.float()))
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def read(self) -> dict[str, float]:
        """The means since the last call, without names that never had a finite value; starts anew."""
        sums = {name: entry.tolist() for name, entry in self._sums.items()}
        self._sums = {}
        return {name: total / number for name, (total, number) in sums.items() if number}

    def state_dict(self) -> dict[str, Tensor]:
        """Of an unfinished epoch, for the checkpoint."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Counterpart of `state_dict`."""
        self._sums = {name: entry.clone().to(device) for name, entry in state.items()}
