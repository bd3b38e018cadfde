"""Local sequence augmentation (LSA): other statistics for one piece of a feature sequence (arXiv 2504.17515).

mu, sd over the sequence;  S_mu, S_sd: their standard deviation over samples;  e1, e2 ~ N(0, 1)
s' = (sd + e2 S_sd) (s - mu) / sd + mu + e1 S_mu   inside of the piece, s elsewhere
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ENOUGH = 6  # samples in a batch from which on the spread is the batch's own, as in the paper
WINDOW = 100  # batches of the running spread. Source: ours
_EPS = 1e-5


class Spread:
    """Standard deviation over samples, of a batch or running over about the last 100 batches."""

    def __init__(self) -> None:
        self.samples, self.batches = 0, 0
        self.mean: Tensor | None = None
        self.variance: Tensor | None = None

    def update(self, values: Tensor) -> Tensor | None:
        """Take a batch ``(B, ...)``; the spread ``(...)``, or None while fewer than two samples were seen."""
        values = values.detach()
        if len(values) >= ENOUGH:
            return values.std(0)
        self.samples, self.batches = self.samples + len(values), self.batches + 1
        mean, variance = values.mean(0), values.var(0, unbiased=False)
        if self.mean is None or self.variance is None:
            self.mean, self.variance = mean, variance
        else:
            rate, step = 1 / min(self.batches, WINDOW), mean - self.mean
            self.mean = self.mean + rate * step
            self.variance = (1 - rate) * (self.variance + rate * step.square()) + rate * variance
        return self.variance.sqrt() if self.samples > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"samples": self.samples, "batches": self.batches, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Counterpart of `state_dict`."""
        self.samples, self.batches = int(state["samples"]), int(state["batches"])
        self.mean, self.variance = (None if state[k] is None else state[k].to(device) for k in ("mean", "variance"))


def piece(position: Tensor, length: int, share: float, start: Tensor) -> Tensor:
    """Which tokens lie in one contiguous piece of ``round(share L)``, by their position in the sequence.

    Args:
        position: of each token, 0..L-1, any shape that goes with ``start``.
        length: L.
        share: of the sequence.
        start: uniform on 0..1; every place of the piece is equally likely.
    """
    size = round(share * length)
    first = (start * (length - size + 1)).floor().clamp(max=length - size)
    return (position >= first) & (position < first + size)


class LSA:
    """LSA of one place in a network. It does nothing unless ``active``, in eval mode, or before two samples were seen.

    Not a module: the network's weights are those of the network without.

    Args:
        generator: of the draws, on the features' device.
        share: of the tokens.
    """

    def __init__(self, generator: torch.Generator | None, share: float) -> None:
        self.generator, self.share = generator, share
        self.active = False
        self.spread = Spread()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LSA":
        return LSA(None, self.share)  # of a teacher: it is never made active

    def hook(self, module: nn.Module, _inputs: Any, features: Tensor) -> Tensor:
        """A forward hook of a stage: its map ``(B, C, *S)`` as a sequence along an axis drawn for each sample."""
        if not self.active or not module.training:
            return features
        return self._of_map(features)

    def of_scans(self, sequences: Tensor, training: bool) -> Tensor:
        """Of scan outputs ``(B, K, D, L)``, a piece for each sample and direction."""
        if not self.active or not training:
            return sequences
        return self._of_scans(sequences)

    @torch.compiler.disable
    def _of_map(self, features: Tensor) -> Tensor:
        size = features.shape[2:]
        orders = torch.stack([scan_order(size, axis, features.device) for axis in range(len(size))])
        axis = torch.randint(len(size), (len(features),), generator=self.generator, device=features.device)
        position = orders[axis].flatten(1)
        inside = piece(position, position.shape[1], self.share, self._uniform(len(features), 1))
        return self._restyle(features.flatten(2), inside[:, None]).view_as(features)

    @torch.compiler.disable
    def _of_scans(self, sequences: Tensor) -> Tensor:
        batch, directions, _, length = sequences.shape
        position = torch.arange(length, device=sequences.device)
        inside = piece(position, length, self.share, self._uniform(batch, directions, 1, 1))
        return self._restyle(sequences, inside)

    def _uniform(self, *shape: int) -> Tensor:
        device = "cpu" if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, device=device)

    def _restyle(self, sequence: Tensor, inside: Tensor) -> Tensor:
        """``(B, ..., L)``; statistics in float32."""
        s = sequence.float()
        sd, mu = torch.std_mean(s, -1, unbiased=False)
        spread = self.spread.update(torch.stack((mu, sd), 1))
        if spread is None:
            return sequence
        e = torch.randn((len(s), *spread.shape), generator=self.generator, device=s.device)
        drawn = e * spread  # (B, 2, ...)
        changed = restyled(s, mu, sd, mu + drawn[:, 0], sd + drawn[:, 1])
        return torch.where(inside, changed.to(sequence.dtype), sequence)


def restyled(s: Tensor, mu: Tensor, sd: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
    """``gamma (s - mu) / sd + beta`` along the last axis."""
    factor = gamma / (sd + _EPS)
    return factor[..., None] * s + (beta - factor * mu)[..., None]


def scan_order(size: Sequence[int], axis: int, device: torch.device) -> Tensor:
    """Position of each voxel ``(*S)`` in the sequence that runs slowest along ``axis``: rows for 0, columns for 1."""
    rest = [n for a, n in enumerate(size) if a != axis]
    order = torch.arange(torch.Size(size).numel(), device=device).view(size[axis], *rest)
    return order.movedim(0, axis)
