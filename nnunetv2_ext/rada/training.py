"""RADA on nnU-Net: co-trained networks, their class vectors and, if wanted, propagated planes.

After Zeng et al., "RADA", https://arxiv.org/abs/2604.11164, whose full text was not at hand, and the public code of its
ancestor SGTC (https://arxiv.org/abs/2412.15526). What neither says is ours; no reproduction.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_ext.core.step import Batch, Passes, Term
from nnunetv2_ext.rada.annotation.cases import cache_root
from nnunetv2_ext.rada.cotraining import CoTraining
from nnunetv2_ext.rada.network import MemberOutput
from nnunetv2_ext.rada.panel import SampleView, draw_panel, pseudo_label_states
from nnunetv2_ext.rada.propagation.propagate import NONE, voxel_weights
from nnunetv2_ext.rada.semantics.bank import draw_own, mean_vectors, vectors_of
from nnunetv2_ext.rada.semantics.clip_encoder import load_encoder
from nnunetv2_ext.rada.semantics.clip_model import ClipSource
from nnunetv2_ext.rada.semantics.embed import CaseEmbeddings, embed_cases, embedding_key, resolve_region
from nnunetv2_ext.rada.semantics.prompts import class_prompts
from nnunetv2_ext.rada.targets import propagated_loss, propagated_target, spread_axes, unannotated


class RADATraining(CoTraining):
    """Adds class vectors (`rada.semantics`) and propagated planes (`rada.registration`) to the co-trained networks."""

    _own_vectors: dict[str, tuple[Tensor, Tensor]] | None = None  # of the training cases, for semantics=clip
    _weights_identity: dict[str, str] | None = None  # of the CLIP that made them; from the checkpoint when continuing
    _own: tuple[Tensor, Tensor, Tensor] | None = None  # of this step's samples: vectors, valid, which are used

    def get_tr_and_val_datasets(self) -> Any:
        """nnU-Net's with planes; CLIP's vectors come now, before any worker is started and any weight has moved."""
        datasets = super().get_tr_and_val_datasets()
        if self.rada.semantics == "clip":
            embeddings = self._embed()
            self._own_vectors = own_vectors(embeddings)
            if not (self._is_resumed and self.rada_network.bank.is_filled):  # the checkpoint brings its own
                mean = mean_vectors(*(torch.stack(parts) for parts in zip(*self._own_vectors.values())))
                self.rada_network.set_bank(mean.to(self.device), embeddings.text.to(self.device))
        return datasets

    def _embed(self) -> CaseEmbeddings:
        settings, cases, log = self.rada, self.training_sources(), self.print_to_log_file
        if not cases:
            raise ValueError(
                f"no training case of fold {self.fold} has an annotated plane, so there is no slice to show to CLIP: "
                "annotate whole slices, or set rada.semantics=learned or off"
            )
        channels = self.dataset_json.get("channel_names") or self.dataset_json.get("modality")
        source = ClipSource(settings.clip_model, str(settings.clip_weights), settings.alpha_weights)
        self._weights_identity = same_identity(source, self._weights_identity)
        region = resolve_region(settings.region, settings.alpha_weights is not None, log)
        configuration = self.configuration_manager.configuration
        return embed_cases(
            cases,
            class_prompts(self.dataset_json["labels"], channels, settings.prompts, settings.image_channel, log),
            lambda: load_encoder(source, self.device, log),
            cache_root(self.preprocessed_dataset_folder_base),
            embedding_key(self.plans_manager.plans_name, configuration, self._weights_identity, settings.image_channel),
            region,
            log,
        )

    # ---- one step ----------------------------------------------------------------------------------------------------
    def loss_passes(self, batch: Batch) -> Passes:
        """As before; all networks of a step are conditioned alike."""
        if self._own_vectors is not None:
            vectors, valid = vectors_of(self._own_vectors, batch.keys, self.device)
            use = draw_own(valid.flatten(1).any(1), self.rada.own_embedding_p, self.generator)
            self._own = vectors, valid, use
        return super().loss_passes(batch)

    def training_pass_teaches(self, batch: Batch, rows: list[int]) -> bool:
        """Not of samples with vectors of their own: a teacher is conditioned on the bank's, as at prediction."""
        own = self._own_vectors is not None and any(batch.keys[i] in self.labelled_cases for i in rows)
        return not own and super().training_pass_teaches(batch, rows)

    def forward_member(self, k: int, batch: Batch) -> MemberOutput:
        """Network k, conditioned on the samples' own vectors or the bank's."""
        if self._own is None:
            return super().forward_member(k, batch)
        return self.rada_network.forward_member(k, batch.data, self.rada_network.conditioning(k, *self._own))

    def further_terms(self, k: int, batch: Batch, output: MemberOutput, own_share: float) -> dict[str, Term]:
        """Alignment with the class vectors, and the propagated planes."""
        terms = super().further_terms(k, batch, output, own_share)
        settings, target = self.rada, batch.top_target
        if settings.has_semantics and settings.mu_align > 0:
            own = None if self._own is None else self._own[:2]
            label, bits, options = target[:, 0], target[:, 1], (settings.tau, settings.min_voxels)
            loss = self.rada_network.alignment_loss(k, output.features, label, bits, own, *options)
            if loss is not None:
                terms["align"] = Term(loss, settings.mu_align)
        if settings.registration == "on" and self.plane_axes:
            axes = spread_axes(self.masks[k], self.plane_axes)
            label, distance = propagated_target(target, self.masks[k], axes, self.ignore_label, NONE)
            weight = voxel_weights(distance, self.training_share)
            loss = propagated_loss(output.full_resolution, label, weight, self.ignore_label)
            terms["propagated"] = Term(loss, own_share)
        return terms

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """Adds which CLIP made the vectors: `rada.clip_weights` may say another place when a training is continued."""
        states = super().method_state()
        return states | {"rada": states["rada"] | {"clip": self._weights_identity}}

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        self._weights_identity = states.get("rada", {}).get("clip")

    # ---- epochs ------------------------------------------------------------------------------------------------------
    def epoch_figures(self) -> dict[str, float]:
        """Adds the gates of the semantic heads, 0 at the start."""
        figures = super().epoch_figures()
        network = self.rada_network
        for k in range(len(network.members)):
            head = network.member(k).head
            if head is not None:
                figures[f"rada/gate_{k + 1}"] = float(head.gate.detach())
        return figures

    def draw_panel(self, path: Path) -> None:
        """A labelled and an unlabelled patch of the last batch, if it has both. It shows patients' images."""
        super().draw_panel(path)
        if self.last_batch is None:
            return
        batch = self.on_device(self.last_batch)
        rows = sorted({key in self.labelled_cases: i for i, key in enumerate(batch.keys)}.values())
        spacing = self.configuration_manager.spacing
        title = f"{type(self).__name__}, epoch {self.current_epoch - 1}"
        draw_panel(self._views(batch.select(rows)), path, title, self.dataset_json, self.label_manager, spacing)

    def _views(self, batch: Batch) -> list[SampleView]:
        allowed = unannotated(batch.top_target, self.ignore_label)
        with torch.autocast(self.device.type) if self.device.type == "cuda" else nullcontext():
            lessons = self.lessons(batch, allowed)
        labels, keeps = (
            torch.stack([getattr(lesson, name) for lesson in lessons], 1).cpu().numpy() for name in ("label", "keep")
        )
        image, target, free = batch.data[:, 0].cpu().numpy(), batch.top_target.cpu().numpy(), allowed.cpu().numpy()
        states = map(pseudo_label_states, labels, keeps, free)
        return [SampleView(*patch) for patch in zip(batch.keys, image, target[:, 0], target[:, 1], labels, states)]


def same_identity(source: ClipSource, before: dict[str, str] | None) -> dict[str, str]:
    """What the weights are: as a continued training has them (`before`), or as `source` says.

    Weights whose files are gone are not needed while the vectors they made are kept.

    Raises:
        ValueError: those at hand are others than before, or there is no before and a file is missing.
    """
    if before is None:
        return source.identity()
    changed = {name: now for name, now in source.identity(missing_ok=True).items() if before.get(name) != now}
    if changed:
        settings = {"model": "rada.clip_model", "weights": "rada.clip_weights", "alpha": "rada.alpha_weights"}
        what = "; ".join(f"{settings[name]}: {before.get(name)} became {now}" for name, now in changed.items())
        raise ValueError(
            f"this training was started with vectors of other CLIP weights ({what}): give the same ones, whose place "
            "may be another one, or start a new training without --c"
        )
    return before


def own_vectors(embeddings: CaseEmbeddings) -> dict[str, tuple[Tensor, Tensor]]:
    """The cases' vectors with the background's in the place of class 0, for every axis, and which are valid."""
    vectors, valid = embeddings.vectors.clone(), embeddings.present.clone()
    vectors[:, :, 0] = embeddings.background[:, None]
    valid[:, :, 0] = embeddings.background.any(1)[:, None]
    return dict(zip(embeddings.cases, zip(vectors, valid)))
