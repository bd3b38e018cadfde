"""SpatialNoise on nnU-Net: a robust cross-entropy, or labels that a teacher corrects late in the training.

After Tadokoro, Takagi, Maeda, arXiv 2504.14795; what differs and why is in docs/methods/spatialnoise.md.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from pydantic import BaseModel
from torch import nn

from nnunetv2_ext.core.labelmaps import foreground_names
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term
from nnunetv2_ext.parts.epoch_means import EpochMeans
from nnunetv2_ext.parts.ramps import momentum
from nnunetv2_ext.parts.soft_loss import soft_loss
from nnunetv2_ext.parts.teacher_training import TeacherTraining
from nnunetv2_ext.spatialnoise.correction import Correction, Guard, correct
from nnunetv2_ext.spatialnoise.loss import robust_loss
from nnunetv2_ext.spatialnoise.panel import draw_panel
from nnunetv2_ext.spatialnoise.settings import SpatialNoiseSettings

_GUARD = "spatialnoise_guard"  # in method_state, beside the teacher


class SpatialNoiseTraining(TeacherTraining):
    """One supervised pass: on nnU-Net's targets with another cross-entropy, or on corrected, soft targets."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"spatialnoise": SpatialNoiseSettings}
    teacher_state: ClassVar[str] = "spatialnoise"

    guard: Guard | None = None
    _figures: EpochMeans

    @property
    def spatialnoise(self) -> SpatialNoiseSettings:
        """This method's settings."""
        return self.settings.spatialnoise  # type: ignore[attr-defined]  # the block settings_model added

    @property
    def wants_teacher(self) -> bool:
        """Of the modes that correct labels, unless they never start."""
        return self.spatialnoise.mode != "robust" and self.spatialnoise.warmup < 1

    def teacher_momentum(self, step: int) -> float:
        """Constant once its window is full."""
        ema = self.spatialnoise.ema
        m = 1 - 1 / max(2, self.num_iterations_per_epoch) if ema is None else ema
        return momentum(step, self.total_steps, m, m)

    def initialize(self) -> None:
        """After nnU-Net's: the guard, and a warning in the modes that correct labels."""
        super().initialize()
        self._figures = EpochMeans()
        if self.teacher is not None:
            self.guard = Guard(self.label_manager.num_segmentation_heads, self.spatialnoise.guard, self.device)
            self.print_to_log_file(
                f"WARNING: spatialnoise.mode={self.spatialnoise.mode} corrects labels. Where annotators err in one "
                "direction (they leave out), that makes it worse: 5 to 12 Dice points in a prototype."
            )

    def _build_loss(self) -> nn.Module:
        """nnU-Net's; in mode robust with another loss in the place of its cross-entropy."""
        loss = super()._build_loss()
        if self.spatialnoise.mode == "robust":
            inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
            inner.ce = robust_loss(inner.ce, self.spatialnoise.loss, self.spatialnoise.q)
        return loss

    # ---- the step ----------------------------------------------------------------------------------------------------
    def correction_share(self, step: int) -> float:
        """Share of the correction that is applied at global step ``step``, 0..1."""
        s, behind = self.spatialnoise, step / self.total_steps - self.spatialnoise.warmup
        if behind < 0:
            return 0.0
        return min(1.0, behind / s.ramp) if s.ramp else 1.0

    def loss_passes(self, batch: Batch) -> Passes:
        """The supervised pass, of corrected targets once the warm-up is over."""
        passes, share = super().loss_passes(batch), self.correction_share(self.global_step)
        if self.teacher is None or share == 0:
            return passes
        return passes.replaced("supervised", LossPass("supervised", lambda: self._corrected_terms(batch, share)))

    def _corrected_terms(self, batch: Batch, share: float) -> dict[str, Term]:
        found = self._correction(batch)
        assert self.guard is not None
        found = self.guard.apply(found, self.is_ddp)
        valid = found.valid.sum()
        self._figures.add("spatialnoise/trust", 1 - (found.given_up() * found.valid).sum() / valid)
        loss = soft_loss(self.forward(batch), found.target(share), found.valid, self.loss)
        return {"supervised": Term(loss)}

    def _correction(self, batch: Batch) -> Correction:
        """Before the guard."""
        assert self.teacher is not None
        logits, labels = self.forward(batch, self.teacher), self.label_manager
        with torch.autocast(self.device.type, enabled=False):
            spacing = tuple(float(mm) for mm in self.configuration_manager.spacing[-(batch.data.ndim - 2) :])
            ignore = labels.ignore_label
            return correct(logits, batch.top_target, self.spatialnoise, ignore, labels.has_regions, spacing)

    # ---- log and picture ---------------------------------------------------------------------------------------------
    def epoch_figures(self) -> dict[str, float]:
        """Mean trust in the labels, the share of each class that is corrected, and how many the guard holds."""
        figures = super().epoch_figures() | self._figures.read()
        if self.guard is not None and not bool(self.guard.shares.isnan().all()):
            away = self.guard.shares[0].cpu()
            names = foreground_names(self.dataset_json, self.label_manager)
            if not self.label_manager.has_regions:
                names = ["background", *names]
            held = (self.guard.shares > self.guard.limit).any(0).sum()
            figures["spatialnoise/held_by_guard"] = float(held)
            for name, share in zip(names, away.tolist(), strict=True):
                if share == share:
                    figures[f"spatialnoise/corrected_{name}"] = share
        return figures

    def draw_panel(self, path: Path) -> None:
        """Image, label, what the teacher says, probability of error and corrected label of patches."""
        super().draw_panel(path)
        if self.teacher is None or self.last_batch is None:
            return
        batch = self.on_device(self.last_batch)
        logits = self.forward(batch, self.teacher).float()
        title = f"{self.picture_title}, epoch {self.current_epoch - 1}"
        spacing = self.configuration_manager.spacing[-(batch.data.ndim - 2) :]
        draw_panel(batch, logits, self._correction(batch), path, title, self.dataset_json, self.label_manager, spacing)

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """Adds the guard."""
        state = super().method_state()
        if self.guard is not None:
            state[_GUARD] = {**self.guard.state_dict(), "figures": self._figures.state_dict()}
        return state

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Takes up the guard."""
        super().load_method_state(states)
        if self.guard is not None and (state := states.get(_GUARD)) is not None:
            self.guard.load_state_dict(state)
            self._figures.load_state_dict(state["figures"], self.device)
