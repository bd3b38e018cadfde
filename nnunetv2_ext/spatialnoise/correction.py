"""Which probability a label gives up to other classes, and the guard over classes that are not learnt yet."""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from nnunetv2_ext.parts.consistency import valid_mask
from nnunetv2_ext.spatialnoise.posterior import (
    axis_correlations,
    clean_distribution,
    clean_regions,
    error_field,
    evidence,
    region_evidence,
    trust,
)
from nnunetv2_ext.spatialnoise.settings import SpatialNoiseSettings

_MOMENTUM = 0.95  # of the guard's shares, over steps


class Correction(NamedTuple):
    """Of a batch.

    Attributes:
        observed: (B, C, *S) the label, one-hot, or (B, R, *S) of regions.
        moved: (B, C, *S) probability that the label gives up to class k. Of regions: to the region's other answer.
        valid: (B, 1, *S) bool, False where the label is ignored.
        regions: what the second axis is.
    """

    observed: Tensor
    moved: Tensor
    valid: Tensor
    regions: bool

    def target(self, share: float = 1.0) -> Tensor:
        """The soft target, (B, C, *S), with that share of what is moved."""
        moved = share * self.moved
        if self.regions:
            return self.observed + (1 - 2 * self.observed) * moved
        return torch.where(self.observed > 0, 1 - moved.sum(1, keepdim=True), moved)

    def given_up(self) -> Tensor:
        """(B, 1, *S) probability that the label is wrong; of regions the highest."""
        return self.moved.amax(1, keepdim=True) if self.regions else self.moved.sum(1, keepdim=True)


@torch.no_grad()
def correct(
    logits: Tensor,
    target: Tensor,
    settings: SpatialNoiseSettings,
    ignore: int | None,
    regions: bool,
    spacing: tuple[float, ...],
) -> Correction:
    """What a teacher would correct, before the guard.

    Args:
        logits: (B, heads, *S) of the teacher.
        target: (B, 1, *S) labels, or (B, R, *S) of regions, with the ignore map behind them if there is one.
        settings: mode and prior.
        ignore: the ignore label.
        regions: whether the heads are regions.
        spacing: mm of the spatial axes.
    """
    s = settings
    valid = valid_mask(target, ignore, regions)
    if valid is None:
        valid = torch.ones_like(target[:, :1], dtype=torch.bool)
    if regions:
        p, observed = logits.float().sigmoid(), target[:, : logits.shape[1]].float()
    else:
        p = logits.float().softmax(1)
        label = torch.where(valid, target[:, :1], 0).long()
        observed = torch.zeros_like(p).scatter_(1, label, 1)
    if s.mode == "relabel":
        if regions:
            moved = (torch.where(observed > 0, 1 - p, p) > s.tau).float()
        else:
            highest, top = p.max(1, keepdim=True)
            sure = (highest > s.tau) & (top != label)
            moved = torch.zeros_like(p).scatter_(1, top, sure.float())
    else:
        a, b = region_evidence(p, observed) if regions else evidence(p, label, s.form)
        rho = axis_correlations(s.rho, spacing) if s.mode == "spatial" else (0.0,) * len(spacing)
        form = "exact" if regions else s.form  # with two answers all forms but the paper's agree
        eta = error_field(a, b, valid, rho, s.mu, s.s, form, s.esteps, s.elr)
        w = trust(eta, a, b, form)
        if regions:
            moved = (clean_regions(observed, w) - observed).abs()
        else:
            moved = clean_distribution(p, label, w, form) * (1 - observed)
    return Correction(observed, moved * valid, valid, regions)


class Guard:
    """Moving averages of the share of each class that is corrected away, and that is added, per voxel labelled so.

    Above `limit` the class is not learnt yet (or swallows others), and nothing is moved from it and to it.

    Args:
        classes: heads of the network.
        limit: share; 1 holds nothing back.
        device: of the averages.
    """

    def __init__(self, classes: int, limit: float, device: torch.device) -> None:
        self.limit = limit if limit < 1 else math.inf  # what is added may be more than there was
        self.shares = torch.full((2, classes), torch.nan, device=device)  # away, added; NaN: never seen

    @torch.no_grad()
    def apply(self, correction: Correction, all_ranks: bool) -> Correction:
        """Take the batch into the averages and hold back what the guard forbids. Every rank must call it."""
        observed = correction.observed * correction.valid
        axes = [0, *range(2, observed.ndim)]
        labelled = observed.sum(axes)
        if correction.regions:
            away, added = (correction.moved * observed).sum(axes), (correction.moved * (1 - observed)).sum(axes)
        else:
            away, added = (observed * correction.moved.sum(1, keepdim=True)).sum(axes), correction.moved.sum(axes)
        counts = torch.stack((away, added, labelled))
        if all_ranks:
            torch.distributed.all_reduce(counts)
        now = counts[:2] / counts[2]  # NaN or infinite without such a label: nothing is learnt of it
        seen = counts[2] > 0
        updated = torch.where(self.shares.isnan(), now, _MOMENTUM * self.shares + (1 - _MOMENTUM) * now)
        self.shares = torch.where(seen, updated, self.shares)
        free = ~(self.shares > self.limit).any(0)
        allowed = free.view(1, -1, *(1,) * (observed.ndim - 2)).float()
        moved = correction.moved * allowed
        if not correction.regions:
            moved = moved * (correction.observed * allowed).sum(1, keepdim=True)
        return correction._replace(moved=moved)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"shares": self.shares.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""
        self.shares = state["shares"].to(self.shares.device)
