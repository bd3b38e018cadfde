"""RADA on nnU-Net: three networks, each taught by two plane axes and by the other two networks.

After Zeng et al., "RADA", https://arxiv.org/abs/2604.11164, whose full text was not at hand, and the public code of its
ancestor SGTC (https://arxiv.org/abs/2412.15526). What neither says is ours; no reproduction.
"""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term
from nnunetv2_ext.core.trainer_settings import method_settings_in
from nnunetv2_ext.parts import pseudo_labels
from nnunetv2_ext.parts.epoch_means import EpochMeans
from nnunetv2_ext.parts.pseudo_labels import Lesson
from nnunetv2_ext.rada import targets
from nnunetv2_ext.rada.export import export_network
from nnunetv2_ext.rada.network import MemberOutput, build_rada_network
from nnunetv2_ext.rada.panel import draw_panel, sample_views
from nnunetv2_ext.rada.propagation.propagate import NONE, voxel_weights
from nnunetv2_ext.rada.settings import RADASettings
from nnunetv2_ext.rada.vector_training import VectorTraining


class RADATraining(VectorTraining):
    """The networks and the passes of a step: one without gradient, in which they label the batch, then one each.

    With class vectors (`rada.semantics`) and propagated planes (`rada.registration`) if wanted.
    """

    strides: list[list[int]]  # of the resolutions that have a loss, highest first
    pooled_loss: DeepSupervisionWrapper  # over these
    # the networks are called one by one, not as one module
    bench_parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "forward": ("forward_member",),
        "teacher": ("lessons",),
        "loss": ("_supervised_loss", "further_terms"),
    }

    _figures: EpochMeans

    @property
    def training_share(self) -> float:
        """T, the finished share of all optimiser steps, 0 to 1."""
        return min(1.0, self.global_step / (self.num_epochs * self.num_iterations_per_epoch))

    @property
    def entropy_ceiling(self) -> float:
        """Theta, in nats."""
        base = 2 if self.rada.gate_base == "2" else self.label_manager.num_segmentation_heads
        return pseudo_labels.entropy_ceiling(self.training_share, base)

    # ---- building ----------------------------------------------------------------------------------------------------
    @classmethod
    def build_network_architecture(  # type: ignore[override]  # a class method; it is called the same way
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The networks of these plans. The predictor calls it with nothing but the plans.

        Raises:
            ValueError: plans without this package's block, or an architecture that cannot be used.
        """
        settings = method_settings_in(plans_manager.plans, "rada", RADASettings)
        channels = num_input_channels, num_output_channels
        return build_rada_network(configuration_manager, *channels, enable_deep_supervision, settings)

    def initialize(self) -> None:
        """nnU-Net's; each network is compiled in place, which leaves the names of its weights as they are."""
        super().initialize()
        self._figures = EpochMeans()
        if self._may_compile():
            self.print_to_log_file("Using torch.compile on each network...")
            for member in self.rada_network.members:
                # training and teaching have other batch sizes; a size of its own each is faster than any size
                member.compile(dynamic=False)

    def _may_compile(self) -> bool:
        return super()._do_i_compile()

    def _do_i_compile(self) -> bool:
        return False  # nnU-Net would compile all networks as one; see `initialize`

    def _build_loss(self) -> nn.Module:
        """nnU-Net's Dice and cross-entropy, with batch Dice: a patch holds few annotated voxels."""
        loss = super()._build_loss()
        loss.dc.batch_dice = True
        if self._may_compile():
            loss.dc = torch.compile(loss.dc)
        self.strides, weights = targets.supervised(self.configuration_manager.pool_op_kernel_sizes)
        self.pooled_loss = DeepSupervisionWrapper(loss, weights)
        return loss

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Of all networks, if the setting says so."""
        self.rada_network.deep_supervision = enabled and self.rada.deep_supervision == "pool"

    def on_train_start(self) -> None:
        """nnU-Net's, then the deep supervision of all networks."""
        super().on_train_start()
        self.set_deep_supervision_enabled(True)
        if len(self.masks) > 1 and self.rada.lambda_max == 0:
            self.print_to_log_file(
                "rada.lambda_max=0: the networks do not teach each other, and unlabelled patches teach nothing; "
                "rada.unlabelled=none and rada.labelled_share=1 leave them out"
            )

    # ---- one step ----------------------------------------------------------------------------------------------------
    def loss_passes(self, batch: Batch) -> Passes:
        """One pass without gradient in which the networks label the batch, then one per network.

        The first network teaches from its own training pass where that says the same: one forward less. They replace
        the supervised pass, nnU-Net's last one. All networks of a step are conditioned alike.
        """
        self.draw_vectors(batch)
        mine, count = [], len(self.masks)
        weight = pseudo_labels.teacher_weight(self.training_share, self.rada.lambda_max) if count > 1 else 0.0
        # the unlabelled samples; where there are none all, of which the voxels nobody annotated count
        rows = [i for i, key in enumerate(batch.keys) if key not in self.labelled_cases] or list(range(len(batch.keys)))
        lessons: dict[int, Lesson] = {}
        if weight > 0:
            # a pass of its own: under autocast a pass without gradient must not share the block of one with it
            teachers = list(range(1 if self.training_pass_teaches(batch, rows) else 0, count))
            mine.append(LossPass("teachers", partial(self._teach, batch, rows, teachers, lessons)))
        for k in range(count):
            compute = partial(self._network_terms, k, batch, rows, lessons, weight)
            mine.append(LossPass(f"network {k + 1}", compute))
        return super().loss_passes(batch).replaced("supervised", *mine)

    def training_pass_teaches(self, batch: Batch, rows: list[int]) -> bool:
        """Whether a network's training pass says of samples ``rows`` what its clean pass in eval mode would.

        Not of samples with vectors of their own: a teacher is conditioned on the bank's, as at prediction.
        """
        own = self._own_vectors is not None and any(batch.keys[i] in self.labelled_cases for i in rows)
        return self.rada.passes == 0 and not own and not self._depends_on_mode

    @cached_property
    def _depends_on_mode(self) -> bool:
        """Whether the networks have dropout or batch statistics, which plans may ask for."""
        kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
        return any(isinstance(module, kinds) for module in self.rada_network.modules())

    def _teach(self, batch: Batch, rows: list[int], teachers: list[int], lessons: dict[int, Lesson]) -> dict[str, Term]:
        part = batch if len(rows) == len(batch.keys) else batch.select(rows)
        allowed = targets.unannotated(part.top_target, self.ignore_label)
        lessons.update(zip(teachers, self.lessons(part, allowed, teachers)))
        self._note_lessons(lessons, allowed)
        return {}

    def _note_lessons(self, lessons: dict[int, Lesson], allowed: Tensor) -> None:
        """Figures of the step, once every network has spoken."""
        if len(lessons) == len(self.masks):
            said = list(lessons.values())
            self._figures.add("kept_share", pseudo_labels.kept_share(said, allowed))
            self._figures.add("agreement", pseudo_labels.agreement(said, allowed))
            self._figures.add("agreement_foreground", pseudo_labels.foreground_agreement(said, allowed))

    def lessons(self, batch: Batch, allowed: Tensor, networks: Sequence[int] | None = None) -> list[Lesson]:
        """What the networks say about the batch, without gradient and in eval mode.

        Args:
            batch: of which the data are used.
            allowed: (B, X, Y, Z) bool, the voxels of interest.
            networks: from 0; None: all.
        """
        settings, network = self.rada, self.rada_network
        was_training = network.training
        network.eval()  # plans may ask for dropout or batch statistics
        try:
            return [
                pseudo_labels.teach(
                    lambda data, k=k: network.forward_member(k, data).full_resolution,  # type: ignore[misc]
                    batch.data,
                    allowed,
                    self.entropy_ceiling,
                    passes=settings.passes,
                    noise_std=settings.noise_std,
                    noise_clip=settings.noise_clip,
                    generator=self.generator,
                )
                for k in (range(len(network.members)) if networks is None else networks)
            ]
        finally:
            network.train(was_training)

    def _network_terms(
        self, k: int, batch: Batch, rows: list[int], lessons: dict[int, Lesson], weight: float
    ) -> dict[str, Term]:
        """Supervised, co-training and alignment terms of network k, one forward for all."""
        target = batch.top_target
        output = self.forward_member(k, batch)
        own_share = 1.0
        co_training: dict[str, Term] = {}
        if weight > 0:
            logits, allowed = output.full_resolution, targets.unannotated(target, self.ignore_label)
            if len(rows) < len(logits):
                logits, allowed = logits[rows], allowed[rows]
            if k not in lessons:
                lessons[k] = pseudo_labels.lesson_of(logits, allowed, self.entropy_ceiling)
                self._note_lessons(lessons, allowed)
            others = [lessons[j] for j in range(len(lessons)) if j != k]
            own_share -= len(others) * weight
            log_probabilities = logits.float().log_softmax(1)
            loss = torch.stack(
                [pseudo_labels.lesson_loss(log_probabilities, lesson, allowed) for lesson in others]
            ).sum()
            co_training = {"co_training": Term(loss, weight)}
        terms = {"supervised": Term(self._supervised_loss(k, output, target), own_share), **co_training}
        terms |= self.further_terms(k, batch, output, own_share)
        return terms if len(self.masks) == 1 else {f"{name}_{k + 1}": term for name, term in terms.items()}

    def forward_member(self, k: int, batch: Batch) -> MemberOutput:
        """Network k on the whole batch, with gradient, conditioned on the samples' own vectors or the bank's."""
        return self.rada_network.forward_member(k, batch.data, self.vectors(k))

    def _supervised_loss(self, k: int, output: MemberOutput, target: Tensor) -> Tensor:
        label = targets.supervised_target(target, self.masks[k], self.ignore_label)
        if self.rada.deep_supervision == "off":
            return self.loss(output.full_resolution, label)
        classes = self.label_manager.num_segmentation_heads
        return self.pooled_loss(output.logits, targets.pooled_targets(label, self.strides, classes, self.ignore_label))

    def further_terms(self, k: int, batch: Batch, output: MemberOutput, own_share: float) -> dict[str, Term]:
        """Alignment with the class vectors, and the propagated planes, by name without the network's number.

        `own_share` is the weight of the network's own supervision against its teachers'.
        """
        terms = {}
        settings, target, mask = self.rada, batch.top_target, self.masks[k]
        if settings.semantics != "off" and settings.mu_align > 0:
            own = None if self._own is None else self._own[:2]
            label, bits, options = target[:, 0], target[:, 1], (settings.tau, settings.min_voxels)
            loss = self.rada_network.alignment_loss(k, output.features, label, bits, own, *options)
            if loss is not None:
                terms["align"] = Term(loss, settings.mu_align)
        if settings.registration == "on" and self.plane_axes:
            axes = targets.spread_axes(mask, self.plane_axes)
            label, distance = targets.propagated_target(target, mask, axes, self.ignore_label, NONE)
            weight = voxel_weights(distance, self.training_share)
            loss = targets.propagated_loss(output.full_resolution, label, weight, self.ignore_label)
            terms["propagated"] = Term(loss, own_share)
        return terms

    def clip_gradients(self) -> Tensor:
        """Each network with its head on its own: one norm over all would let one network's gradient slow the others.

        Returns:
            The norm over all networks before clipping, 0-dim.
        """
        clipped = (*self.rada_network.members, *self.training_modules.values())
        norms = [nn.utils.clip_grad_norm_(m.parameters(), self.clip_norm) for m in clipped]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def train_step(self, batch: dict) -> dict:
        """Reports as ``loss`` the mean of the networks' supervised terms."""
        figures = super().train_step(batch)
        supervised = [value for name, value in figures.items() if name.startswith("supervised")]
        return figures | {"loss": sum(supervised) / len(supervised)}

    # ---- epochs ------------------------------------------------------------------------------------------------------
    def epoch_figures(self) -> dict[str, float]:
        """Weights and ceiling of the epoch's end, what the networks agreed on, and the heads' gates, 0 at the start."""
        figures = super().epoch_figures() | {f"rada/{name}": value for name, value in self._figures.read().items()}
        if len(self.masks) > 1:
            figures["rada/lambda"] = pseudo_labels.teacher_weight(self.training_share, self.rada.lambda_max)
            figures["rada/theta"] = self.entropy_ceiling
        return figures | {
            f"rada/gate_{k}": float(head.gate.detach()) for k, head in enumerate(self.rada_network.heads, 1)
        }

    def draw_panel(self, path: Path) -> None:
        """A labelled and an unlabelled patch of the last batch, if it has both. It shows patients' images."""
        super().draw_panel(path)
        if self.last_batch is None:
            return
        batch = self.on_device(self.last_batch)
        rows = sorted({key in self.labelled_cases: i for i, key in enumerate(batch.keys)}.values())
        batch = batch.select(rows)
        allowed = targets.unannotated(batch.top_target, self.ignore_label)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            lessons = self.lessons(batch, allowed)
        spacing = self.configuration_manager.spacing
        title = f"{self.picture_title}, epoch {self.current_epoch - 1}"
        views = sample_views(batch, lessons, allowed, [self.directions_of_case(key) for key in batch.keys])
        draw_panel(views, path, title, self.dataset_json, self.label_manager, spacing)

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """Figures of an unfinished epoch; which CLIP made the vectors, as its files may lie elsewhere by then."""
        return super().method_state() | {
            "rada": {"clip": self._weights_identity, "figures": self._figures.state_dict()}
        }

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        if "rada" in states:
            self._weights_identity = states["rada"].get("clip")
            self._figures.load_state_dict(states["rada"]["figures"], self.device)

    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """One network's, ``net1`` to ``net3``; ValueError if its semantic head is active."""
        return export_network(checkpoint["network_weights"], weights)
