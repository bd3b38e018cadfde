"""Class vectors of a RADA training: CLIP makes them before it starts, each step draws which samples use their own."""

from typing import Any

import torch
from torch import Tensor

from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.rada.annotation.cases import cache_root
from nnunetv2_ext.rada.network import RADANet
from nnunetv2_ext.rada.semantics.bank import draw_own, mean_vectors, vectors_of
from nnunetv2_ext.rada.semantics.clip_encoder import load_encoder
from nnunetv2_ext.rada.semantics.clip_model import ClipSource
from nnunetv2_ext.rada.semantics.embed import CaseEmbeddings, embed_cases
from nnunetv2_ext.rada.semantics.prompts import class_prompts
from nnunetv2_ext.rada.sparse_training import SparseTraining
from nnunetv2_ext.rada.views import axes_in


class VectorTraining(SparseTraining):
    """The part of RADATraining that knows the class vectors (`rada.semantics`)."""

    _own_vectors: dict[str, tuple[Tensor, Tensor]] | None = None  # of the training cases, for semantics=clip
    _weights_identity: dict[str, str] | None = None  # of the CLIP that made them; from the checkpoint when continuing
    _own: tuple[Tensor, Tensor, Tensor] | None = None  # of this step's samples: vectors, valid, which are used

    @property
    def rada_network(self) -> RADANet:
        """The network, which nothing wraps."""
        assert isinstance(self.network, RADANet)
        return self.network

    def get_tr_and_val_datasets(self) -> Any:
        """nnU-Net's with planes; CLIP's vectors come now, before any worker is started and any weight has moved."""
        datasets = super().get_tr_and_val_datasets()
        if self.rada.semantics == "clip":
            embeddings = self._embed()
            self._own_vectors = embeddings.with_background()
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
        self._weights_identity = source.identity(self._weights_identity)
        masks = "read by Alpha-CLIP" if settings.alpha_weights else "CLIP without Alpha-CLIP's weights cannot see them"
        log(f"rada.region: {settings.region_shown} (masks: {masks}).")
        return embed_cases(
            cases,
            class_prompts(self.dataset_json["labels"], channels, settings.prompts, settings.image_channel, log),
            lambda: load_encoder(source, self.device, log),
            cache_root(self.preprocessed_dataset_folder_base),
            {**self.preprocessed.key(), **self._weights_identity, "channel": settings.image_channel},
            settings.region_shown,
            log,
        )

    def on_train_start(self) -> None:
        """nnU-Net's, then the bank learns which axes each network holds."""
        super().on_train_start()
        self.rada_network.bank.set_views([axes_in(mask) for mask in self.masks])

    def draw_vectors(self, batch: Batch) -> None:
        """Which labelled samples of the step are conditioned on vectors of their own; all its networks alike."""
        if self._own_vectors is not None:
            vectors, valid = vectors_of(self._own_vectors, batch.keys, self.device)
            use = draw_own(valid.flatten(1).any(1), self.rada.own_embedding_p, self.generator)
            self._own = vectors, valid, use

    def vectors(self, k: int) -> Tensor | None:
        """Those on which network k is conditioned in this step; None: the bank's."""
        return None if self._own is None else self.rada_network.conditioning(k, *self._own)

    def train_step(self, batch: dict) -> dict:
        """The house's; the heads' gates stay within their bound."""
        figures = super().train_step(batch)
        for head in self.rada_network.heads:
            head.bound_gate()
        return figures
