"""One training step as an ordered list of loss passes.

Each pass is back-propagated before the next one's forward, so activation memory stays that of a single pass while the
gradients are those of the summed loss (gradients accumulate in ``.grad``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
        extras: whatever else the loader put into the batch, tensors on the device. An entry has a row for each sample
            (tensor, array, list or tuple of length B), or is a mapping: another stream with rows of its own.
        owner: the trainer, for messages.
    """

    data: Tensor
    target: Tensor | list[Tensor]
    keys: tuple[str, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)
    owner: str = "the trainer"

    @classmethod
    def from_loader(cls, batch: Mapping[str, Any], device: torch.device, owner: str = "the trainer") -> Batch:
        """Move nnU-Net's batch dictionary (``data``, ``target``, ``keys``, and what a loader adds) to the device."""
        moved = {name: _to_device(value, device) for name, value in batch.items() if name != "keys"}
        data, target = moved.pop("data"), moved.pop("target")
        return cls(data, target, tuple(str(k) for k in batch["keys"]), moved, owner)

    def extra(self, name: str) -> Any:
        """An entry of ``extras``.

        Raises:
            ValueError: the loader did not put it there.
        """
        if name not in self.extras:
            has = ", ".join(self.extras) or "nothing beside data, target and keys"
            raise ValueError(
                f"{self.owner}: the batch has no {name!r} (it has {has}); the loader that make_train_loader returns "
                "must put it into every batch"
            )
        return self.extras[name]

    def stream(self, name: str = "unlabelled") -> Batch:
        """Another stream among ``extras`` as a batch of its own, without target.

        Raises:
            ValueError: the loader did not put it there.
        """
        other = dict(self.extra(name))
        data, keys = other.pop("data"), tuple(str(key) for key in other.pop("keys"))
        return Batch(data, [], keys, other, self.owner)

    @property
    def top_target(self) -> Tensor:
        """The target at the resolution of the data, ``(B, 1 or regions, *S)``."""
        return self.target[0] if isinstance(self.target, list) else self.target

    def select(self, index: Sequence[int]) -> Batch:
        """The samples ``index``, in that order."""
        rows = list(index)
        target = [t[rows] for t in self.target] if isinstance(self.target, list) else self.target[rows]
        extras = {name: _rows(value, rows) for name, value in self.extras.items()}
        return Batch(self.data[rows], target, tuple(self.keys[i] for i in rows), extras, self.owner)

    def with_data(self, data: Tensor) -> Batch:
        """The same targets and keys with other data."""
        return replace(self, data=data)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_to_device(v, device) for v in value]
    if isinstance(value, Mapping):
        return {name: _to_device(v, device) for name, v in value.items()}
    return value


def _rows(value: Any, rows: list[int]) -> Any:
    if isinstance(value, Mapping):
        return value
    return type(value)(value[i] for i in rows) if isinstance(value, (list, tuple)) else value[rows]


def top_resolution(output: Any) -> Tensor:
    """The logits ``(B, heads, *S)`` of what a network returned, with deep supervision those of the highest resolution.

    Only a list is a list of resolutions; indexing a tensor would pick the first sample of the batch.
    """
    return output[0] if isinstance(output, (list, tuple)) else output


class Term(NamedTuple):
    """A loss term: its value, which is logged, and the weight at which it enters the sum that is back-propagated."""

    value: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class LossPass:
    """One forward and what it is worth.

    Attributes:
        name: unique in a step; methods place theirs by it.
        compute: runs the forward under autocast and returns the named terms.
        weight: multiplies all terms of this pass.
    """

    name: str
    compute: Callable[[], dict[str, Term]]
    weight: float = 1.0


class Passes(Sequence[LossPass]):
    """The passes of a step, in order, found and placed by their names. Each method returns a new one.

    Args:
        passes: in order.
        owner: the trainer, for messages.

    Raises:
        ValueError: two passes of one name; and, from every method, a name that is not there.
    """

    def __init__(self, passes: Iterable[LossPass], owner: str = "the trainer") -> None:
        self._passes, self._owner = tuple(passes), owner
        names = self.names
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        if twice:
            raise ValueError(f"{owner}: loss_passes has two passes called {twice[0]!r}; give yours another name")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the passes, in order."""
        return tuple(p.name for p in self._passes)

    def before(self, name: str, *mine: LossPass) -> Passes:
        """With passes in front of the one called ``name``."""
        at = self._index(name)
        return self._with([*self._passes[:at], *mine, *self._passes[at:]])

    def first(self, *mine: LossPass) -> Passes:
        """With passes in front of all others."""
        return self._with([*mine, *self._passes])

    def replaced(self, name: str, *mine: LossPass) -> Passes:
        """With passes (or none) in the place of the one called ``name``."""
        at = self._index(name)
        return self._with([*self._passes[:at], *mine, *self._passes[at + 1 :]])

    def weighted(self, name: str, weight: float) -> Passes:
        """With all terms of the pass called ``name`` multiplied by ``weight``."""
        old = self._passes[self._index(name)]
        return self.replaced(name, replace(old, weight=old.weight * weight))

    def __len__(self) -> int:
        return len(self._passes)

    def __getitem__(self, index: Any) -> Any:
        return self._passes[self._index(index) if isinstance(index, str) else index]

    def __iter__(self) -> Iterator[LossPass]:
        return iter(self._passes)

    def _with(self, passes: Iterable[LossPass]) -> Passes:
        return Passes(passes, self._owner)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(
                f"{self._owner}: loss_passes has no pass called {name!r}; it has {', '.join(self.names) or 'none'}"
            )
        return self.names.index(name)


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
