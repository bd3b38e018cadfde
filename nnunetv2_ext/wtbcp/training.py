"""Training with unlabelled patches: mean teacher, pseudo-labels, bidirectional copy-paste, and its wavelet form.

After Bai et al., arXiv 2305.00673 (BCP), and Zhang et al., arXiv 2504.14445 (WT-BCP). x, y labelled batch, u unlabelled
one, k the teacher's hard labels of u, M outside of a box, w weight and ramp, L nnU-Net's loss where a mask is set:

    pseudo:  L(s(x), y) + w L(s(u), k)
    bcp:     m = M for half of the batch, else 1 - M;  x' = m x + (1 - m) u;  y' = m y + (1 - m) k
             L(s(x'), y' | m) + w L(s(x'), y' | 1 - m)
    bcp+:    both terms of bcp, and L(s(x), y)
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term, top_resolution
from nnunetv2_ext.core.trainer_settings import method_settings_in
from nnunetv2_ext.parts.consistency import consistency_loss
from nnunetv2_ext.parts.epoch_means import EpochMeans
from nnunetv2_ext.parts.ramps import momentum
from nnunetv2_ext.parts.soft_loss import soft_loss
from nnunetv2_ext.parts.unlabelled_training import UnlabelledTraining
from nnunetv2_ext.wtbcp.copy_paste import Mixed, both_ways, outside_of_box
from nnunetv2_ext.wtbcp.labels import annotated, single_structures, taught
from nnunetv2_ext.wtbcp.network import Outputs, WaveletUNet, dice_consistency
from nnunetv2_ext.wtbcp.panel import draw_panel
from nnunetv2_ext.wtbcp.settings import WTBCPSettings

NAME = "wtbcp"
_FIGURES = "wtbcp_figures"  # in method_state, beside the teacher


class WTBCPTraining(UnlabelledTraining):
    """Adds what the mode makes of unlabelled patches, from the start that the settings name."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {NAME: WTBCPSettings}
    unlabelled_block: ClassVar[str] = NAME
    teacher_state: ClassVar[str] = NAME

    _single: Sequence[bool] = ()  # -> make_train_loader: for each head whether its largest component is kept
    _figures: EpochMeans

    @property
    def wtbcp(self) -> WTBCPSettings:
        """This method's settings."""
        return self.settings.wtbcp  # type: ignore[attr-defined]  # the block settings_model added

    @property
    def wants_teacher(self) -> bool:
        """Of the unlabelled patches."""
        return self.has_unlabelled

    def teacher_momentum(self, step: int) -> float:
        """Constant once its window is full."""
        return momentum(step, self.total_steps, self.wtbcp.ema, self.wtbcp.ema)

    @property
    def mixes(self) -> bool:
        """Whether patches are cut into each other."""
        s = self.wtbcp
        return s.mode in ("bcp", "bcp+", "wtbcp") and s.unlabelled is not None and s.unlabelled_weight > 0

    @classmethod
    def build_network_architecture(  # type: ignore[override]  # a class method, so that super() works; called the same way
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network for these plans; with mode wtbcp three of them. The predictor calls it with the plans only.

        Raises:
            ValueError: plans without this package's block, or a network that is not a U-Net.
        """
        s = method_settings_in(plans_manager.plans, NAME, WTBCPSettings)
        arguments = plans_manager, configuration_manager, num_input_channels, num_output_channels
        build = super().build_network_architecture
        main = build(*arguments, enable_deep_supervision)
        if s.mode != "wtbcp":
            return main
        low, high = (build(*arguments, enable_deep_supervision) for _ in range(2))
        return WaveletUNet(main, low, high, s.alpha, s.beta)

    def initialize(self) -> None:
        """nnU-Net's.

        Raises:
            ValueError: one sample in a batch, and a mode that cuts two patches into each other.
        """
        super().initialize()
        self._figures = EpochMeans()
        if self.mixes and self.batch_size < 2:
            raise ValueError(
                f"wtbcp.mode={self.wtbcp.mode} cuts two patches into each other, and this batch has one: set "
                "batch_size=2 (for each GPU), or wtbcp.mode=pseudo"
            )

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> Any:
        """``super()``'s; the labelled cases say which structures are one piece."""
        loader = super().make_train_loader(dataset, **nnunet_arguments)
        s, labels = self.wtbcp, self.label_manager
        heads = labels.num_segmentation_heads
        if not self.has_unlabelled or s.mode == "mean_teacher":
            return loader  # and no component is dropped
        if s.largest_component is None:
            self._single = single_structures(dataset, labels, len(self.configuration_manager.patch_size))
        else:
            self._single = [s.largest_component and (labels.has_regions or head > 0) for head in range(heads)]
        self.print_to_log_file(
            f"Of {sum(self._single)} of {heads - (not labels.has_regions)} structures the teacher's largest component "
            "is learnt."
        )
        return loader

    # ---- the step ----------------------------------------------------------------------------------------------------
    def loss_passes(self, batch: Batch) -> Passes:
        """nnU-Net's pass, and before it, or instead of it, what the mode adds."""
        passes, mode, weight = super().loss_passes(batch), self.wtbcp.mode, self.unlabelled_weight(self.global_step)
        if mode in ("pseudo", "mean_teacher", "bcp+"):
            if weight == 0:
                return passes
            compute = {
                "pseudo": lambda: self._pseudo_terms(batch.stream(), weight),
                "mean_teacher": lambda: self._agreeing_terms(batch.stream(), weight),
                "bcp+": lambda: self._mixed_terms(batch, weight, "mixed"),
            }[mode]
            return passes.before("supervised", LossPass("unlabelled", compute))
        if not self.mixes:
            return passes
        return passes.replaced(
            "supervised", LossPass("supervised", lambda: self._mixed_terms(batch, weight, "supervised"))
        )

    def _pseudo_terms(self, other: Batch, weight: float) -> dict[str, Term]:
        labels, inside = self.teacher_labels(other), other.extra("inside")
        output = self.forward(other)
        self._note_agreement(top_resolution(output), labels, inside)
        return {"unlabelled": Term(soft_loss(output, labels, inside, self.loss), weight)}

    def _agreeing_terms(self, other: Batch, weight: float) -> dict[str, Term]:
        s = self.wtbcp
        seen = self.forward(other, self.teacher)
        noise = torch.randn(other.data.shape, generator=self.generator, device=self.device) * s.noise
        student = top_resolution(self.forward(other.with_data(other.data + noise.clamp(-2 * s.noise, 2 * s.noise))))
        regions, inside = self.label_manager.has_regions, other.extra("inside")
        self._note_agreement(student, taught(seen, regions, ()), inside)
        return {"unlabelled": Term(consistency_loss(seen, student, inside, "prob_mse", regions), weight)}

    def _mixed_terms(self, batch: Batch, weight: float, name: str) -> dict[str, Term]:
        mixed = self.mix(batch, weight > 0)
        output = self.forward(batch.with_data(mixed.data))
        outputs = list(output) if isinstance(output, Outputs) else [output]
        first = mixed.first if weight > 0 else mixed.first | mixed.second
        values = [soft_loss(one, mixed.target, first, self.loss) for one in outputs]
        terms = {name: Term(values[0])}
        if len(values) > 1:
            terms[f"{name}_bands"] = Term(values[1] + values[2])
        if weight == 0:
            return terms
        self._note_agreement(top_resolution(outputs[0]), mixed.target, mixed.second)
        learnt = [soft_loss(one, mixed.target, mixed.second, self.loss) for one in outputs]
        terms["unlabelled"] = Term(torch.stack(learnt).sum(), weight)
        if len(outputs) > 1:
            tops, valid = [top_resolution(one) for one in outputs], mixed.first | mixed.second
            regions, pairs = self.label_manager.has_regions, combinations(tops, 2)
            cross = torch.stack([dice_consistency(one, other, valid, regions) for one, other in pairs]).sum()
            ramp = weight / self.wtbcp.unlabelled_weight
            terms["consistency"] = Term(cross, self.wtbcp.consistency * ramp)
        return terms

    def mix(self, batch: Batch, with_unlabelled: bool) -> Mixed:
        """Labelled patches cut into the unlabelled ones, or into each other."""
        target, known = annotated(batch.top_target, self.label_manager)
        if with_unlabelled:
            stream = batch.stream()
            data, labels, inside = stream.data, self.teacher_labels(stream), stream.extra("inside")
        else:
            data, labels, inside = (value.roll(1, 0) for value in (batch.data, target, known))
        size = len(batch.data)
        mine = both_ways(outside_of_box(batch.data.shape[2:], self.wtbcp.box, self.generator), size)
        return Mixed(
            torch.where(mine, batch.data, data),
            torch.where(mine, target, labels),
            mine & known,
            ~mine & inside,
            mine,
        )

    def teacher_labels(self, other: Batch) -> Tensor:
        """What is learnt of unlabelled patches, float (B, heads, *S) of 0 and 1."""
        return taught(self.forward(other, self.teacher), self.label_manager.has_regions, self._single)

    @torch.no_grad()
    def _note_agreement(self, student: Tensor, labels: Tensor, where: Tensor) -> None:
        """Share of foreground among the labels, and of voxels that either calls foreground on which both agree."""
        if self.label_manager.has_regions:
            learnt, said = labels > 0, student > 0
            same, foreground = (learnt == said).all(1), [hot.any(1) for hot in (learnt, said)]
        else:
            learnt, said = labels.max(1).indices, student.max(1).indices
            same, foreground = learnt == said, [learnt > 0, said > 0]
        counts = where[:, 0]
        either = (foreground[0] | foreground[1]) & counts
        self._figures.add("wtbcp/foreground", (foreground[0] & counts).sum() / counts.sum())
        self._figures.add("wtbcp/agreement", (same & either).sum() / either.sum())

    # ---- log, picture and checkpoint ---------------------------------------------------------------------------------
    def epoch_figures(self) -> dict[str, float]:
        """Weight of unlabelled voxels, share of foreground among their labels, and agreement of the student with it."""
        weight = {"wtbcp/weight": self.unlabelled_weight(self.global_step - 1)} if self.has_unlabelled else {}
        return super().epoch_figures() | weight | self._figures.read()

    @torch.no_grad()
    def draw_panel(self, path: Path) -> None:
        """Patches of the last batch as they are mixed, or unlabelled ones, with what teacher and student say."""
        super().draw_panel(path)
        if self.last_batch is None or self.teacher is None:
            return
        batch = self.on_device(self.last_batch)
        other, spacing = batch.stream(), self.configuration_manager.spacing[-(batch.data.ndim - 2) :]
        if self.mixes:
            mixed = self.mix(batch, True)
            data, target, where = mixed.data, mixed.target * (mixed.first | mixed.second), mixed.second
            keys = [" with ".join(pair) for pair in zip(batch.keys, other.keys, strict=True)]
        else:
            seen = taught(self.forward(other, self.teacher), self.label_manager.has_regions, self._single)
            data, where, keys = other.data, other.extra("inside"), list(other.keys)
            target = seen * where
        network = unwrap(self.network).eval()  # after the last epoch's validation, and train mode is set before each
        student = top_resolution(self.forward(other.with_data(data), network))
        title = f"{self.picture_title}, epoch {self.current_epoch - 1}, wtbcp.mode={self.wtbcp.mode}"
        draw_panel(keys, data, target, where, student, path, title, self.dataset_json, self.label_manager, spacing)

    def method_state(self) -> dict[str, Any]:
        """Adds the figures of an unfinished epoch."""
        return super().method_state() | {_FIGURES: self._figures.state_dict()}

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        self._figures.load_state_dict(states.get(_FIGURES, {}), self.device)
