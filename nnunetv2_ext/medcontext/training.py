"""MedContext on nnU-Net: the loss passes, the teacher's life, and what is saved and logged.

Written from the paper's abstract with the released code's errors corrected; not a reproduction of its experiments.
Gani, Naseer, Khan, Khan, "MedContext: Learning Contextual Cues for Efficient Volumetric Medical Segmentation",
MICCAI 2024, https://arxiv.org/abs/2402.17725.

    total = a L(s(x)) + a' L(s(m(x))) + beta ramp(t) L_cons(teacher(x), s(m(x)))
            + gamma ramp_u(t) L_cons(teacher(u), s(m(u)))

The last term is there with unlabelled patches u only. s student, m mask operator, L nnU-Net's own loss over all
deep-supervision resolutions, t the global step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term, top_resolution
from nnunetv2_ext.medcontext.diagnosis import Diagnosis, diagnose, diagnose_unlabelled
from nnunetv2_ext.medcontext.panel import draw_panel
from nnunetv2_ext.medcontext.settings import MedContextSettings
from nnunetv2_ext.parts.consistency import consistency_loss, valid_mask
from nnunetv2_ext.parts.masking import apply_mask, block_mask, cell_counts, resolve_block
from nnunetv2_ext.parts.ramps import momentum, ramp, released_momentum
from nnunetv2_ext.parts.unlabelled_training import UnlabelledTraining


class MedContextTraining(UnlabelledTraining):
    """Adds a masked pass with a moving-average teacher in front of nnU-Net's supervised pass.

    The network that is trained, validated, saved and predicted with is the student, nnU-Net's own; the teacher is an
    attribute of the trainer, no part of the network, and travels in the checkpoint under the extension's key.
    """

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"medcontext": MedContextSettings}
    teacher_state: ClassVar[str] = "medcontext"  # as checkpoints have it
    unlabelled_block: ClassVar[str] = "medcontext"
    # of short runs that learned well (docs/methods/medcontext.md)
    healthy_figures: ClassVar[dict[str, tuple[float, float]]] = {
        "medcontext/momentum": (0.99, 1.0),
        "medcontext/disagreement": (0.02, 0.2),
        "medcontext/gradient_ratio": (0.05, 1.0),
    }

    _diagnosis: Diagnosis | None = None

    @property
    def medcontext(self) -> MedContextSettings:
        """This method's settings."""
        return self.settings.medcontext  # type: ignore[attr-defined]  # the block settings_model added

    @property
    def num_image_channels(self) -> int:
        """Input channels that hold image; the rest is the one-hot result of a previous stage."""
        return len(self.configuration_manager.normalization_schemes)

    @property
    def mask_block(self) -> tuple[int, ...]:
        """Edge of a hidden block in voxels, per axis."""
        s, plan = self.medcontext, self.configuration_manager
        return resolve_block(s.mask_block, plan.patch_size, plan.pool_op_kernel_sizes, s.tube)

    # ---- the teacher -------------------------------------------------------------------------------------------------
    def initialize(self) -> None:
        """After nnU-Net's: DDP's constructor broadcasts rank 0's weights, so the teacher is copied from the result."""
        architecture = self.configuration_manager.configuration["architecture"]
        if "strides" not in architecture["arch_kwargs"]:
            raise NotImplementedError(
                "MedContext takes the block size and nnU-Net the deep supervision from the plan's strides, and the "
                f"network {architecture['network_class_name']} has none: use plans of a U-Net (PlainConvUNet, "
                "ResidualEncoderUNet)"
            )
        super().initialize()
        s, patch = self.medcontext, self.configuration_manager.patch_size
        cells, hidden = cell_counts(patch, self.mask_block, s.mask_ratio, s.mask_rounding)
        self.print_to_log_file(
            f"MedContext hides {hidden} of {cells} blocks of {self.mask_block} voxels in a patch of {tuple(patch)}."
        )
        if 0 < s.mask_ratio < 1 and hidden in (0, cells):
            self.print_to_log_file(
                "WARNING: that hides nothing, or everything; set medcontext.mask_block to smaller blocks."
            )
        if s.preset == "paper_code":
            self.print_to_log_file(
                "WARNING: medcontext.preset=paper_code repeats the released code's numbers for ablation: "
                "its consistency is close to zero and its teacher is almost the student."
            )

    @property
    def wants_teacher(self) -> bool:
        """Without consistency there is nothing to teach."""
        return self.medcontext.beta > 0 or self.has_unlabelled

    def teacher_momentum(self, step: int) -> float:
        """m(t) of the update after global step ``step``."""
        s = self.medcontext
        if s.ema_schedule == "released":
            return released_momentum(step % self.num_iterations_per_epoch, s.ema_base)
        return momentum(step, self.total_steps, s.ema_base, s.ema_final)

    # ---- the masked pass ---------------------------------------------------------------------------------------------
    def loss_passes(self, batch: Batch) -> Passes:
        """The masked passes first, then the clean, supervised one: under DDP the last pass must use every parameter."""
        s = self.medcontext
        passes = super().loss_passes(batch).weighted("supervised", s.supervised_weight)
        if self.unlabelled_weight(self.global_step) > 0:
            passes = passes.first(LossPass("unlabelled", lambda: self._unlabelled_terms(batch.stream())))
        teaches = self.masked_weight > 0 or s.beta > 0
        if not teaches or s.masked_fraction == 0 or self.global_step % s.masked_every:
            return passes
        masked = LossPass("masked", lambda: self._masked_terms(self._masked_samples(batch)))
        return passes.before("supervised", masked)

    def _masked_samples(self, batch: Batch) -> Batch:
        total = len(batch.keys)
        wanted = max(1, round(self.medcontext.masked_fraction * total))
        if wanted >= total:
            return batch
        return batch.select(torch.randperm(total, generator=self.generator, device=self.device)[:wanted].tolist())

    @property
    def masked_weight(self) -> float:
        """Weight of L_seg in the masked pass."""
        s = self.medcontext
        return s.supervised_weight if s.masked_supervised_weight is None else s.masked_supervised_weight

    def mask_ratio(self, step: int) -> float:
        """Share of blocks hidden at global step ``step``."""
        s = self.medcontext
        length = s.mask_warmup * self.total_steps
        return s.mask_ratio * min(1.0, step / length) if length else s.mask_ratio

    def draw_mask(self, shape: Sequence[int]) -> Tensor:
        """A mask for data of ``shape`` (B, C, *S): bool (B, 1, *S), True = hidden."""
        s, ratio = self.medcontext, self.mask_ratio(self.global_step)
        how = (s.mask_per_sample, s.mask_rounding)
        return block_mask(shape[0], shape[2:], self.mask_block, ratio, self.generator, self.device, *how)

    def hide(self, data: Tensor, mask: Tensor) -> Tensor:
        """m(x): ``data`` (B, C, *S) with the masked voxels filled; the loader's tensor is left as it is."""
        return apply_mask(data, mask, self.medcontext.fill, self.num_image_channels, self.generator)

    def _masked_terms(self, batch: Batch) -> dict[str, Term]:
        s = self.medcontext
        valid = self.valid_voxels(batch)  # before any loss sees the target
        masked = batch.with_data(self.hide(batch.data, self.draw_mask(batch.data.shape)))
        # the teacher first: its activations are gone before the student's are kept
        seen = self.forward(batch, self.teacher) if s.beta > 0 else None
        output = self.forward(masked)
        with torch.set_grad_enabled(self.masked_weight > 0):  # of weight 0 it is only logged
            terms = {"masked_supervised": Term(self.loss(output, batch.target), self.masked_weight)}
        if seen is not None:
            weight = s.beta * ramp(self.global_step, self.total_steps, s.ramp_fraction)
            terms["consistency"] = Term(self.consistency(seen, top_resolution(output), valid), weight)
        return terms

    def _unlabelled_terms(self, batch: Batch) -> dict[str, Term]:
        """Consistency on patches of unlabelled cases, where they lie inside of the scan."""
        masked = batch.with_data(self.hide(batch.data, self.draw_mask(batch.data.shape)))
        seen = self.forward(batch, self.teacher)
        output = top_resolution(self.forward(masked))
        loss = self.consistency(seen, output, batch.extra("inside"))
        return {"unlabelled_consistency": Term(loss, self.unlabelled_weight(self.global_step))}

    def valid_voxels(self, batch: Batch) -> Tensor | None:
        """Where the consistency counts, bool (B, 1, *S); None for everywhere."""
        labels = self.label_manager
        if self.medcontext.cons_on_ignored:
            return None
        return valid_mask(batch.top_target, labels.ignore_label, labels.has_regions)

    def consistency(self, teacher_logits: Tensor, student_logits: Tensor, valid: Tensor | None) -> Tensor:
        """L_cons, 0-dim fp32, of top-resolution logits (B, heads, *S) where ``valid`` (`valid_voxels`)."""
        kind, regions = self.medcontext.consistency, self.label_manager.has_regions
        return consistency_loss(teacher_logits, student_logits, valid, kind, regions)

    # ---- log and picture ---------------------------------------------------------------------------------------------
    def epoch_figures(self) -> dict[str, float]:
        """Momentum, ramp, share of voxels on which teacher and student disagree, and a ratio of gradient norms.

        The ratio is |grad consistency| / |grad supervised|.
        """
        figures = super().epoch_figures()
        last = self.global_step - 1
        self._diagnosis = None
        if self.teacher is None or self.last_batch is None or self.medcontext.masked_fraction == 0:
            return figures
        self._diagnosis = diagnose(self, self.on_device(self.last_batch))
        figures["medcontext/momentum"] = self.teacher_momentum(last)
        figures["medcontext/ramp"] = ramp(last, self.total_steps, self.medcontext.ramp_fraction)
        figures["medcontext/disagreement"] = self._diagnosis.disagreement
        figures["medcontext/gradient_ratio"] = self._diagnosis.gradient_ratio
        return figures

    def draw_panel(self, path: Path) -> None:
        """A patch, and an unlabelled one: image, mask, target, what student (clean and masked) and teacher say."""
        super().draw_panel(path)
        if self.last_batch is None:
            return
        batch, results = self.on_device(self.last_batch), []
        if self.medcontext.masked_fraction > 0:
            results.append(self._diagnosis or diagnose(self, batch))
        if self.has_unlabelled and self.teacher is not None:
            results.append(diagnose_unlabelled(self, batch.stream()))
        if not results:
            return
        title = f"{self.picture_title}, epoch {self.current_epoch - 1}"
        spacing = self.configuration_manager.spacing[-results[0].image.ndim :]
        directions = [self.directions_of_case(result.case) for result in results]
        draw_panel(results, path, title, self.dataset_json, self.label_manager, spacing, directions)

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """``teacher``: the moving average instead of the trained network; everything else as in core."""
        if weights not in ("student", "teacher"):
            raise ValueError(f"{cls.__name__} has no {weights!r} weights to export; it has: student, teacher")
        if weights == "student":
            return super().export_weights(checkpoint, weights)
        state = checkpoint.get(EXTENSION_KEY, {}).get("methods", {}).get(cls.teacher_state)
        if state is None:
            raise ValueError(
                "this checkpoint has no teacher (medcontext.beta was 0, or plain nnU-Net wrote it); "
                "export --weights student"
            )
        return state["teacher"]
