"""One training step as an ordered list of loss passes.

Each pass is back-propagated before the next one's forward, so activation memory stays that of a single pass while the
gradients are those of the summed loss (gradients accumulate in ``.grad``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RESERVED = ("loss", "grad_norm")  # what a step reports beside its terms


@dataclass(frozen=True)
class Batch:
    """A training batch on the device.

    Attributes:
        data: ``(B, C, *S)``, image channels first, then the one-hot channels of a previous stage if the configuration
            is a cascade.
        target: ``(B, 1 or regions, *S)``, or the list of it over deep-supervision resolutions, highest first.
        keys: B case ids.
    """

    data: Tensor
    target: Tensor | list[Tensor]
    keys: tuple[str, ...]

    @classmethod
    def from_loader(cls, batch: Mapping[str, Any], device: torch.device) -> Batch:
        """Move nnU-Net's batch dictionary (``data``, ``target``, ``keys``) to the device."""
        target = batch["target"]
        if isinstance(target, list):
            target = [t.to(device, non_blocking=True) for t in target]
        else:
            target = target.to(device, non_blocking=True)
        return cls(batch["data"].to(device, non_blocking=True), target, tuple(str(k) for k in batch["keys"]))

    @property
    def top_target(self) -> Tensor:
        """The target at the resolution of the data, ``(B, 1 or regions, *S)``."""
        return self.target[0] if isinstance(self.target, list) else self.target

    def select(self, index: Sequence[int]) -> Batch:
        """The samples ``index``, in that order."""
        rows = list(index)
        target = [t[rows] for t in self.target] if isinstance(self.target, list) else self.target[rows]
        return Batch(self.data[rows], target, tuple(self.keys[i] for i in rows))

    def with_data(self, data: Tensor) -> Batch:
        """The same targets and keys with other data."""
        return replace(self, data=data)


class Term(NamedTuple):
    """A loss term: its value, which is logged, and the weight at which it enters the sum that is back-propagated."""

    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class LossPass:
    """One forward and what it is worth.

    Attributes:
        name: for messages.
        compute: runs the forward under autocast and returns the named terms.
        weight: multiplies all terms of this pass.
    """

    name: str
    compute: Callable[[], dict[str, Term]]
    weight: float = 1.0


def backward_passes(
    passes: Sequence[LossPass],
    network: nn.Module,
    device: torch.device,
    grad_scaler: torch.amp.GradScaler | None,
    weights: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """Run forward and backward of each pass in turn; gradients add up in the parameters.

    The last pass must use every parameter: under DDP only its backward is synchronised (all others run inside
    ``no_sync``), which averages the accumulated gradients over the ranks.

    Args:
        passes: in order; at least one.
        network: the trained network, wrapped for DDP or not.
        device: autocast is used on CUDA only, as nnU-Net does.
        grad_scaler: scales each loss, or None.
        weights: if given, gets the weight of every term, its pass's included.

    Returns:
        Every term's unweighted value, 0-dim, detached, on the device.

    Raises:
        ValueError: no pass, two terms of one name, or a reserved name.
    """
    if not passes:
        raise ValueError("a training step needs at least one loss pass")
    values: dict[str, Tensor] = {}
    for number, loss_pass in enumerate(passes, 1):
        local = number < len(passes) and isinstance(network, DistributedDataParallel)
        with cast(DistributedDataParallel, network).no_sync() if local else nullcontext():
            # one autocast block per forward: on older torch a no_grad forward before a grad forward in one block loses
            # gradients (pytorch/pytorch#112583)
            with torch.autocast(device.type) if device.type == "cuda" else nullcontext():
                terms = loss_pass.compute()
                total = _weighted_sum(terms, loss_pass.weight)
            if total is not None and total.requires_grad:
                (total if grad_scaler is None else grad_scaler.scale(total)).backward()
        for name, term in terms.items():
            if name in values or name in RESERVED:
                raise ValueError(
                    f"a loss term cannot be called {name!r}: names are unique in a step, "
                    f"and not {' or '.join(RESERVED)}"
                )
            values[name] = term.value.detach()
            if weights is not None:
                weights[name] = term.weight * loss_pass.weight
        del terms, total  # their graphs, before the next pass builds its own
    return values


def _weighted_sum(terms: Mapping[str, Term], pass_weight: float) -> Tensor | None:
    weighted = [(value, weight * pass_weight) for value, weight in terms.values()]
    # a term of weight 0 costs no backward, unless nothing else is left: DDP needs a backward through the last pass
    active = [(value, weight) for value, weight in weighted if weight != 0] or weighted
    total: Tensor | None = None
    for value, weight in active:
        # no multiplication by 1 and no sum with 0: one term of weight 1 is back-propagated exactly as nnU-Net does it
        value = value if weight == 1 else weight * value
        total = value if total is None else total + value
    return total
