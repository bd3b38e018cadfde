"""J-RAS on nnU-Net: the contrastive and the supervised pass in turns, the warm-up, and what is logged.

After Ahmed, Mohammed, Asilian Bidgoli, "J-RAS", https://arxiv.org/abs/2510.09953: retriever and segmenter are trained
jointly, on retrieved image-mask guides, by contrastive and supervised learning in turns. What the abstract does not say
is ours; no reproduction.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor

from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term
from nnunetv2_ext.jras.bank import OUTSIDE
from nnunetv2_ext.jras.bank_training import BankTraining
from nnunetv2_ext.jras.contrastive import (
    Masks,
    flip,
    mask_overlap,
    masks_of_target,
    nt_xent,
    overlap_loss,
    perturb,
    pool_masks,
)
from nnunetv2_ext.jras.network import Retrieval
from nnunetv2_ext.jras.panel import draw_guides, view_of_batch

RETRIEVER = "retriever"  # name of its group in the optimiser


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
        self, retrieval: Retrieval, masks: Masks, random_ids: Tensor, masks_of: Callable[[Tensor], Masks]
    ) -> None:
        """Mean mask overlap S of the batch with its guides, and with random ones."""
        for row, (ids, valid) in enumerate(zip(retrieval.ids, retrieval.valid)):
            overlap = mask_overlap(Masks(*(part[row : row + 1] for part in masks)), masks_of(ids))[0]
            self.add("guide_overlap", (overlap * valid).sum(), valid.sum())
        if len(random_ids):
            overlap = mask_overlap(masks, masks_of(random_ids))
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
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._counts = {name: value.to(device) for name, value in state["counts"].items()}
        self.used = None if state["used"] is None else state["used"].to(device)


class ScaledPolyLR(PolyLRScheduler):
    """nnU-Net's schedule, times each group's `lr_scale`; nnU-Net's own writes one rate into all groups."""

    def step(self, current_step: int | None = None) -> None:
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class JRASTraining(BankTraining):
    """Adds retrieval in every forward and a contrastive pass in front of nnU-Net's supervised pass."""

    bench_parts: ClassVar = {"lookup": ("network.bank.lookup",), "contrastive": ("_contrastive_terms",)}

    _figures: RetrievalFigures
    _compared: tuple[Masks, Tensor] | None = None  # masks of this step's batch and random guides

    @property
    def is_warming_up(self) -> bool:
        """Whether the segmentation loss does not move the retriever in this epoch."""
        return self.current_epoch < math.ceil(self.jras.warmup_fraction * self.num_epochs)

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's optimiser with the retriever in a group of its own."""
        optimizer, scheduler = super().configure_optimizers(*args, **kwargs)
        network = self.retrieval_network
        if network is None:
            return optimizer, scheduler
        if type(scheduler) is not PolyLRScheduler:
            raise NotImplementedError(
                f"the retriever's rate follows nnU-Net's polynomial schedule, not {type(scheduler).__name__}: "
                "use a base trainer with nnU-Net's own, or jras.retriever=none"
            )
        retrieval = {id(p) for p in network.retrieval_parameters()}
        group = optimizer.param_groups[0]
        mine = [p for p in group["params"] if id(p) in retrieval]
        group["params"] = [p for p in group["params"] if id(p) not in retrieval]
        optimizer.add_param_group({"params": mine, "lr_scale": self.jras.retriever_lr_scale, "name": RETRIEVER})
        return optimizer, ScaledPolyLR(optimizer, self.initial_lr, self.num_epochs)

    def initialize(self) -> None:
        """Figures start empty."""
        super().initialize()
        self._figures = RetrievalFigures()

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; then who teaches the retriever in this epoch."""
        super().on_train_epoch_start()
        network = self.retrieval_network
        if network is None:
            return
        network.retriever_is_fixed = self.jras.retriever == "frozen" or self.is_warming_up
        if self.jras.retriever == "frozen" and not self.is_warming_up:
            group = next(group for group in self.optimizer.param_groups if group.get("name") == RETRIEVER)
            group["lr"] = 0.0  # no gradient, but momentum and weight decay would still move it

    def loss_passes(self, batch: Batch) -> Passes:
        """The contrastive pass first, on its steps; under DDP the last pass must use every parameter."""
        passes, s = super().loss_passes(batch), self.jras
        warming_up = s.trains_retriever and self.is_warming_up
        self._compared = None
        if self.retrieval_network is None or not (warming_up or self.global_step % s.contrastive_every == 0):
            return passes
        network = self.retrieval_network
        masks = masks_of_target(batch.top_target, network.low_shape, self.label_manager)
        rows = torch.randperm(len(network.bank), generator=self.generator, device=self.device)
        self._compared = masks, rows[: s.contrastive_candidates]  # a figure of the controls as well
        if s.contrastive_weight == 0 or not (warming_up or s.retriever == "joint"):
            return passes
        return passes.first(LossPass("contrastive", lambda: self._contrastive_terms(batch)))

    def _contrastive_terms(self, batch: Batch) -> dict[str, Term]:
        network, s = self.retrieval_network, self.jras
        assert network is not None and self._compared is not None
        masks, ids = self._compared
        # both views mirrored alike: the mask is mirrored with them, and S of the two is 1
        shape = (len(batch.keys), len(network.low_shape))
        flips = torch.rand(shape, generator=self.generator, device=self.generator.device) < 0.5
        patches = flip(batch.data if s.reads_bottleneck else network.low_resolution(batch.data), flips)
        masks = Masks(flip(masks.share, flips), flip(masks.annotated[:, None], flips)[:, 0])
        views = perturb(patches, self.generator), perturb(patches, self.generator)
        n = len(patches)
        if s.reads_bottleneck:  # the candidates' whole patches would have to be read from disk
            first, second = network.embed(torch.cat(views)).split(n)
            stored = network.bank.keys[ids]
        else:
            candidates = network.bank.stored_images(ids)
            first, second, stored = network.embed(torch.cat((*views, candidates))).split([n, n, len(ids)])
        groups = self.groups_of(batch.keys)
        others = groups[:, None] != network.bank.groups[ids][None]
        allowed = torch.cat((torch.ones_like(groups[:, None].expand(-1, len(groups)), dtype=torch.bool), others), 1)
        overlap = mask_overlap(masks, Masks(*map(torch.cat, zip(masks, self._guide_masks(ids)))))
        with torch.autocast(self.device.type, enabled=False):
            loss = overlap_loss(first @ torch.cat((second, stored)).T, overlap, allowed, s.tau)
            loss = loss + nt_xent(first, second, s.tau)
        return {"contrastive": Term(loss, s.contrastive_weight)}

    def _guide_masks(self, ids: Tensor) -> Masks:
        """Foreground masks of guides `ids` (n), pooled for `mask_overlap`."""
        bank = self.retrieval_network.bank  # type: ignore[union-attr]
        masks = bank.masks(ids)
        return pool_masks(masks if self.label_manager.has_regions else masks[:, 1:], bank.labels[ids] != OUTSIDE)

    def clip_gradients(self) -> Tensor:
        """Takes the retriever's gradient norm before nnU-Net clips."""
        parameters = [] if self.retrieval_network is None else self.retrieval_network.retrieval_parameters()
        if norms := [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]:
            self._figures.add("retriever_grad_norm", torch.linalg.vector_norm(torch.stack(norms)))
        return super().clip_gradients()

    def after_step(self) -> None:
        """Adds what this step retrieved to the epoch's figures."""
        super().after_step()
        network = self.retrieval_network
        if network is None or network.last is None:
            return
        self._figures.add_retrieval(network.last, len(network.bank))
        if self._compared is not None:
            self._figures.add_overlap(network.last, *self._compared, self._guide_masks)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """nnU-Net's, then the guides are embedded anew: validation and checkpoint have keys that fit the weights.

        Every `refresh_every` epochs and after the last, and not where nothing has moved the retriever.
        """
        super().on_train_epoch_end(train_outputs)
        network, s = self.retrieval_network, self.jras
        done = self.current_epoch + 1
        moved = s.retriever == "joint" or (s.retriever == "frozen" and self.is_warming_up)
        interval = s.refresh_every or (5 if s.reads_bottleneck else 1)
        if network is None or not moved or (done % interval and done != self.num_epochs):
            return
        seconds = self._seconds(lambda: self._refresh(network))
        if self.epoch_log is not None:
            self.epoch_log.add({"jras/refresh_seconds": seconds}, self.current_epoch)

    def epoch_figures(self) -> dict[str, float]:
        """What retrieval did (see `RetrievalFigures`), and the time of a lookup."""
        figures = super().epoch_figures()
        network = self.retrieval_network
        if network is None or network.last is None:
            return figures
        figures |= {f"jras/{name}": value for name, value in self._figures.read().items()}
        lookup = partial(network.bank.lookup, network.last.queries, self.jras.num_guides)
        figures["jras/lookup_ms"] = 1e3 * sorted(self._seconds(lookup) for _ in range(3))[1]
        return figures

    def _seconds(self, action: Callable[[], object]) -> float:
        """Wall time, with what the device still has to do."""
        start = time.perf_counter()
        action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def draw_panel(self, path: Path) -> None:
        """One patch, its guides and their weights, prediction and truth. It shows patients' images."""
        super().draw_panel(path)
        if self.retrieval_network is None or self.last_batch is None:
            return
        view, plan = view_of_batch(self, self.on_device(self.last_batch)), self.configuration_manager
        file = path.with_name(f"{path.stem}_guides{path.suffix}")  # another method may draw to the path itself
        title, spacing = f"{type(self).__name__}, epoch {self.current_epoch - 1}", plan.spacing[-len(plan.patch_size) :]
        draw_guides(view, file, title, self.dataset_json, self.label_manager, spacing)

    def method_state(self) -> dict[str, Any]:
        """Adds the figures of an unfinished epoch."""
        state = super().method_state()
        if "jras" in state:
            state["jras"]["figures"] = self._figures.state_dict()
        return state

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        if self._bank_state is not None and "figures" in states["jras"]:
            self._figures.load_state_dict(states["jras"]["figures"], self.device)
