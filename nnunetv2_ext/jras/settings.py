"""J-RAS's settings in one readable block: meaning, unit, default and where the default comes from.

Sources: "paper" is the abstract of arXiv 2510.09953; "author code" is the first author's public code from before the
paper; "ours" is this package's own choice.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from nnunetv2_ext.core.settings import STRUCTURAL, Settings

Widths = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=6)]
_structural: Any = partial(Field, json_schema_extra=STRUCTURAL)


class JRASSettings(Settings):
    """Settings of `nnUNetTrainerJRAS`, given as `jras.NAME`.

    total = L(decoder(fuse(encoder(x), guides, w))) + `contrastive_weight` L_con, the second on every
    `contrastive_every`-th step.
    """

    RENAMED: ClassVar[dict[str, str]] = {"init_from": "init_from", "group_regex": "group_regex"}  # common keys

    # ---- what is part of the network
    retriever: Literal["joint", "frozen", "random", "none"] = _structural(
        "joint",
        description="joint: the segmentation loss teaches the retriever; controls: frozen (fixed after the warm-up), "
        "random (any guides, equal weights), none (no guides: plain nnU-Net). Source: paper (joint), ours (controls).",
    )
    retriever_encoder: Literal["conv", "bottleneck"] = _structural(
        "conv",
        description="What embeds a patch: conv, a small network on the low-resolution patch; bottleneck, the "
        "segmentation network's deepest features (reads all guides' patches at every refresh; teaches the query side "
        "only; not with concat, frozen or a cascade). Source: ours.",
    )
    fusion: Literal["attention", "concat"] = _structural(
        "attention",
        description="How guides enter: attention at the bottleneck and the skip above it, or concat, the weighted "
        "guide image and mask as further input channels. Source: ours (attention), author code (concat).",
    )
    num_guides: int = _structural(4, ge=1, description="K, guides per patch. Source: ours (author code: 2).")
    tau: float = _structural(
        0.1, gt=0, description="Temperature of the softmax over the guides' cosines, no unit. Source: author code."
    )
    key_dim: int = _structural(128, ge=2, description="D, numbers in an embedding. Source: author code.")
    store_stride: int = _structural(
        4,
        ge=1,
        description="Guides are stored at patch size / store_stride, at least 8 cells per axis (or the patch size). "
        "Source: ours, memory: 50 MB for 512 guides of 128 voxels per axis.",
    )
    retriever_widths: Widths = _structural(
        [32, 64, 128, 128], description="Channels of the retrieval encoder's convolutions. Source: ours."
    )
    guide_widths: Widths = _structural(
        [32, 64, 128, 128], description="Channels of the guide encoder's, for fusion=attention. Source: ours."
    )
    # ---- the bank
    bank_size: int = Field(512, ge=1, description="N, guides over all training cases. Source: ours, see store_stride.")
    fg_share: float = Field(
        0.75, ge=0, le=1, description="Share of the guides whose patch is centred on a foreground voxel. Source: ours."
    )
    mirror_guides: bool = Field(
        True,
        description="Whether guides are stored mirrored, in all orientations of nnU-Net's augmentation equally often. "
        "Source: measured (a mirrored patch finds none of its shape among unmirrored guides).",
    )
    dedup_cosine: float | None = _structural(
        None,
        gt=-1,
        le=1,
        description="Guides more similar to the patch are not used: a partial guard if training cases are predicted. "
        "Source: ours.",
    )
    # ---- the training
    refresh_every: int | None = Field(
        None,
        ge=1,
        description="Epochs between two embeddings of the whole bank; the last epoch always has one. Unset: 1, with "
        "retriever_encoder=bottleneck 5. Source: ours (author code: 1).",
    )
    detach_keys: bool = Field(
        False, description="Whether the segmentation loss teaches the query side only. Source: ours (author code: yes)."
    )
    guide_dropout: float = Field(0.1, ge=0, le=1, description="Share of training patches without guides. Source: ours.")
    contrastive_weight: float = Field(0.1, ge=0, description="Weight of the contrastive loss; 0: none. Source: ours.")
    contrastive_every: int = Field(
        4,
        ge=1,
        description="Contrastive loss on every n-th step after the warm-up. Source: ours, a reading of the paper's "
        '"alternating contrastive and supervised learning".',
    )
    contrastive_candidates: int = Field(
        32, ge=0, description="Bank entries drawn as candidates of a contrastive step. Source: ours."
    )
    warmup_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="First part of the epochs: only the contrastive loss teaches the retriever. Source: ours.",
    )
    retriever_lr_scale: float = Field(
        0.3, gt=0, le=10, description="The retriever's learning rate as a share of initial_lr. Source: ours."
    )
    # ---- of an approximate search that is no more: read, so that old models and files of settings stay valid
    index: str = Field("Flat", description="Without effect: guides are always searched exactly. Source: ours.")
    nprobe: int | None = Field(None, description="Without effect, as jras.index. Source: ours.")
    ef_search: int | None = Field(None, description="Without effect, as jras.index. Source: ours.")

    @field_validator("retriever", mode="before")
    @classmethod
    def _none_is_a_name(cls, value: Any) -> Any:
        # "none" of a settings text arrives as None, like that of every key that may be unset
        return "none" if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> JRASSettings:
        if (self.index, self.nprobe, self.ef_search) != ("Flat", None, None):
            message = "jras.index, nprobe and ef_search have no effect any more: guides are searched exactly"
            warnings.warn(message, stacklevel=1)
        if not self.has_retrieval:
            return self
        if self.num_guides > self.bank_size:
            raise ValueError(
                f"num_guides ({self.num_guides}) must not exceed bank_size ({self.bank_size}): lower or enlarge it"
            )
        if self.reads_bottleneck and self.fusion == "concat":
            raise ValueError(
                "retriever_encoder=bottleneck cannot be combined with fusion=concat, which needs the guides before the "
                "encoder has run: use fusion=attention or retriever_encoder=conv"
            )
        if self.reads_bottleneck and self.retriever == "frozen":
            raise ValueError(
                "retriever_encoder=bottleneck cannot be combined with retriever=frozen: the segmentation network's "
                "encoder goes on learning, and the embeddings with it; use retriever_encoder=conv"
            )
        return self

    @property
    def has_retrieval(self) -> bool:
        """Whether there is a bank at all."""
        return self.retriever != "none"

    @property
    def reads_bottleneck(self) -> bool:
        """Whether the segmentation network's own encoder embeds the patches."""
        return self.retriever_encoder == "bottleneck"

    @property
    def trains_keys(self) -> bool:
        """Whether the segmentation loss teaches the guides' side as well."""
        return self.trains_retriever and not self.detach_keys and not self.reads_bottleneck

    @property
    def trains_retriever(self) -> bool:
        """Whether anything ever moves the retriever."""
        return self.retriever in ("joint", "frozen")
