"""How much larger J-RAS makes a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nnunetv2_ext.core.stock import stock_network
from nnunetv2_ext.jras.network import JRASNetwork


class CheckpointGrowth(NamedTuple):
    """What a checkpoint with the optimiser's state holds more than plain nnU-Net's, in bytes.

    Attributes:
        parameters: their number; further inputs of the first convolution (`fusion=concat`) included.
        modules: these parameters.
        momentum: one number for each of them that is trained.
        guides: the bank.
    """

    parameters: int
    modules: int
    momentum: int
    guides: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.modules + self.momentum + self.guides

    def describe(self) -> str:
        """A sentence for the log; 1 MB = 1e6 bytes."""
        parts = (("modules", self.modules), ("momentum", self.momentum), ("guides", self.guides))
        listed = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in parts)
        return f"Every checkpoint grows by {self.total / 1e6:.1f} MB ({listed})."


def checkpoint_growth(network: JRASNetwork, init_args: Mapping[str, Any]) -> CheckpointGrowth:
    """The growth over plain nnU-Net's network for a trainer's `init_args`; fp32, nnU-Net's SGD with momentum."""
    parameters = list(network.parameters())
    plain = sum(p.numel() for p in stock_network(init_args).parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad) - 4 * plain
    return CheckpointGrowth(
        parameters=sum(p.numel() for p in parameters) - plain,
        modules=sum(p.nbytes for p in parameters) - 4 * plain,
        momentum=trained,
        guides=network.bank.num_bytes,
    )
