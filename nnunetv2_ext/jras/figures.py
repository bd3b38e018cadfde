"""What is logged about retrieval: sums over the steps of an epoch, kept on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnunetv2_ext.jras.bank import GuideBank
from nnunetv2_ext.jras.contrastive import Masks, mask_overlap, pool_masks
from nnunetv2_ext.jras.labels import OUTSIDE
from nnunetv2_ext.jras.network import Retrieval


def guide_masks(bank: GuideBank, ids: Tensor, has_regions: bool) -> Masks:
    """Foreground masks of guides `ids` (n), pooled for `mask_overlap`."""
    masks = bank.masks(ids)
    return pool_masks(masks if has_regions else masks[:, 1:], bank.labels[ids] != OUTSIDE)


class RetrievalFigures:
    """Means over the steps since the last `read`; adding never waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self.used: Tensor | None = None  # (N,) int32, 1 for guides ever retrieved in this training

    def add(self, name: str, total: Tensor, count: Tensor | float = 1.0) -> None:
        """Add `total` over `count` values to the mean called `name`."""
        zero = torch.zeros_like(total)
        self._sums[name] = self._sums.get(name, zero) + total
        self._counts[name] = self._counts.get(name, zero) + count

    @torch.no_grad()
    def add_retrieval(self, retrieval: Retrieval, size: int) -> None:
        """Entropy of w in nats, weight of the null guide, and which of the bank's `size` guides came up."""
        w = retrieval.weights
        self.add("weight_entropy", torch.special.entr(w).sum(), len(w))
        self.add("null_weight", w[:, -1].sum(), len(w))
        if self.used is None or len(self.used) != size:
            self.used = torch.zeros(size, dtype=torch.int32, device=w.device)
        # no boolean indexing, which would wait for the device; slots that are not valid hold id 0 and add nothing
        self.used.scatter_reduce_(0, retrieval.ids.flatten(), retrieval.valid.flatten().int(), "amax")

    @torch.no_grad()
    def add_overlap(
        self, retrieval: Retrieval, masks: Masks, bank: GuideBank, has_regions: bool, random_ids: Tensor
    ) -> None:
        """Mean mask overlap S of the batch with its guides, and with random ones."""
        for row, (ids, valid) in enumerate(zip(retrieval.ids, retrieval.valid)):
            overlap = mask_overlap(
                Masks(*(part[row : row + 1] for part in masks)), guide_masks(bank, ids, has_regions)
            )[0]
            self.add("guide_overlap", (overlap * valid).sum(), valid.sum())
        if len(random_ids):
            overlap = mask_overlap(masks, guide_masks(bank, random_ids, has_regions))
            self.add("random_overlap", overlap.sum(), overlap.numel())

    def read(self) -> dict[str, float]:
        """The means since the last call, and the share of the bank ever used."""
        figures = {name: float(total / self._counts[name].clamp(min=1e-9)) for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        if self.used is not None and len(self.used):
            figures["bank_share_used"] = float(self.used.float().mean())
        return figures

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint of an unfinished epoch."""
        return {"sums": self._sums, "counts": self._counts, "used": self.used}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Counterpart of `state_dict`."""
        self._sums, self._counts = (
            {name: value.to(device) for name, value in state[part].items()} for part in ("sums", "counts")
        )
        self.used = None if state["used"] is None else state["used"].to(device)
