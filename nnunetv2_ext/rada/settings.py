"""RADA's settings in one readable block: meaning, unit, default and where the default comes from.

Sources: "paper" is arXiv 2604.11164, of which only the opening was read; "SGTC" is the public code of its ancestor
(xmeimeimei/SGTC); "measured" is measured by us; "ours" is this package's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from nnunetv2_ext.core.settings import LOCAL_PATH, RESUMABLE, STRUCTURAL
from nnunetv2_ext.parts.unlabelled_settings import UnlabelledSource


class RADASettings(UnlabelledSource):
    """Settings of `nnUNetTrainerRADA`, given as `rada.NAME`.

    For network k: total = (1 - n lambda) L_sup + lambda (sum of L_u over the n other networks) + `mu_align` L_align.
    With t the finished share of the training, lambda(t) = `lambda_max` exp(-5 (1 - t)^2).
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"clip_norm": "clip_norm"}  # the common key

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # what a digest by others says of the paper; the paper itself could not be read in full
        "paper-digest": {"registration": "on"}
    }

    preset: Literal["paper-digest"] | None = Field(
        None, description="Defaults beneath the keys you give: paper-digest = with registration. Source: second-hand."
    )
    # ---- what is part of the network
    num_networks: Literal[1, 3] = Field(
        3,
        description="3: each network learns from two of the three plane axes; 1, a control: from all planes, without "
        "co-training. Source: SGTC (3), ours (1).",
        json_schema_extra=STRUCTURAL,
    )
    semantics: Literal["clip", "learned", "off"] = Field(
        "clip",
        description="Vectors that condition the networks: clip (image regions and prompts, through open_clip), "
        "learned (trainable class tokens, no files), off (no semantic head). Source: paper (clip), ours (controls).",
        json_schema_extra=STRUCTURAL,
    )
    infer: str = Field(
        "mean",
        pattern=r"^(mean|single:[1-3])$",
        description="Prediction: mean of the networks' logits, or one network alone (single:1 to single:3). "
        "Source: ours (mean), SGTC (single:2).",
        json_schema_extra={**STRUCTURAL, **RESUMABLE},
    )
    clip_model: str = Field(
        "ViT-B-16-quickgelu",
        min_length=1,
        description="open_clip's name; OpenAI's and Alpha-CLIP's weights need a -quickgelu one. Source: ours.",
        json_schema_extra=STRUCTURAL,
    )
    # ---- batches and supervision
    unlabelled: Literal["pool"] | None = Field(
        None,
        description="pool (or true): each batch has as many further patches, of `nnUNetv2_ext unlabelled`'s pool, not "
        "of cases without annotation; none (or false): no pool. Source: ours.",
    )
    labelled_share: float = Field(
        0.5, gt=0, le=1, description="Share of each batch drawn from labelled cases, rounded up. Source: SGTC (2 + 2)."
    )
    min_labelled: int = Field(
        2,
        ge=1,
        description="Labelled patches a batch has at least; a batch of that size or less is all labelled. "
        "Source: measured (one labelled patch a step loses more than unlabelled ones bring).",
    )
    deep_supervision: Literal["pool", "off"] = Field(
        "pool",
        description="Targets of the lower resolutions: pool (a block is annotated if any of its voxels is, with their "
        "majority label), or off (full resolution only). Source: measured.",
    )
    # ---- co-training
    lambda_max: float = Field(
        0.1, ge=0, le=0.5, description="Weight of each teacher at the end; 0: no co-training. Source: SGTC."
    )
    passes: int = Field(
        0,
        ge=0,
        le=32,
        description="Noisy passes per teacher for the entropy; 0: the clean pass alone, whose gate is the same within "
        "0.11 % of voxels. Source: measured (SGTC: 8).",
    )
    noise_std: float = Field(
        0.1, ge=0, description="Standard deviation of that noise, in units of z-scored intensity. Source: SGTC."
    )
    noise_clip: float = Field(
        0.2, ge=0, description="Largest absolute value of that noise, in units of z-scored intensity. Source: SGTC."
    )
    gate_base: Literal["C", "2"] = Field(
        "C",
        description="A teacher's voxel is kept below the entropy (0.75 + 0.25 r(t)) ln C, C classes with background, "
        "or ln 2, which is strict for several classes. Source: SGTC (both are 2 there).",
    )
    # ---- semantics
    clip_weights: str | None = Field(
        "openai",
        min_length=1,
        description="open_clip's tag (downloaded on first use), hf-hub: name, or a local file. Source: ours.",
        json_schema_extra={**RESUMABLE, **LOCAL_PATH},  # where they are may change, what they are may not
    )
    alpha_weights: str | None = Field(
        None,
        min_length=1,
        description="Local file with Alpha-CLIP's visual weights. Source: paper (which file: ours).",
        json_schema_extra={**RESUMABLE, **LOCAL_PATH},
    )
    region: Literal["auto", "alpha", "crop", "pool"] = Field(
        "auto",
        description="How CLIP sees a class's region: alpha (mask as fourth channel), crop (box around the mask), pool "
        "(mask-weighted patch tokens); auto: alpha with alpha_weights, else crop. Source: ours.",
    )
    image_channel: int = Field(0, ge=0, description="Image channel CLIP sees, counted from 0. Source: ours.")
    prompts: dict[str, str] | None = Field(
        None, description="Sentence per class name that replaces the built-in prompt. Source: ours."
    )
    mu_align: float = Field(
        0.1, ge=0, description="Weight of the alignment of voxel features with the region's vector. Source: ours."
    )
    tau: float = Field(0.07, gt=0, description="Temperature of that alignment's InfoNCE, no unit. Source: ours.")
    min_voxels: int = Field(
        32, ge=1, description="Voxels a class needs on a patch's planes of one axis to be aligned. Source: ours."
    )
    own_embedding_p: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Probability that a labelled sample has its own vectors, not the bank's. Source: ours.",
    )
    # ---- propagated pseudo-labels
    registration: Literal["on", "off"] = Field(
        "off",
        description="Spread the planes a network does not hold, by registration of neighbouring slices. "
        "Source: measured (off), second-hand reading of the paper (on).",
    )
    max_distance: int = Field(6, ge=1, le=64, description="How far a plane is spread, in slices. Source: measured.")

    @field_validator("deep_supervision", "semantics", "registration", "gate_base", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        # other programs write the words on and off as true and false: YAML 1.1 knows no difference
        if isinstance(value, bool):
            return "on" if value else "off"
        return "2" if value == 2 else value

    @model_validator(mode="after")
    def _consistent(self) -> RADASettings:
        if (self.single_network or 0) >= self.num_networks:
            raise ValueError(f"infer ({self.infer}) names a network that num_networks ({self.num_networks}) lacks")
        if self.region == "alpha" and self.alpha_weights is None:
            raise ValueError(
                "rada.region=alpha needs Alpha-CLIP's weights, without which the mask is invisible: "
                "give rada.alpha_weights=/path/to/file, or use rada.region=crop or pool"
            )
        if self.semantics == "clip" and self.clip_weights is None:
            raise ValueError(
                "semantics=clip needs clip_weights (a tag such as openai, or a file); else use semantics=learned or off"
            )
        return self

    @property
    def single_network(self) -> int | None:
        """Index from 0 of the only network that predicts; None for the mean."""
        return None if self.infer == "mean" else int(self.infer.partition(":")[2]) - 1

    @property
    def region_shown(self) -> Any:
        """`region`, of which ``auto`` is ``alpha`` with Alpha-CLIP's weights and ``crop`` without."""
        return self.region if self.region != "auto" else "crop" if self.alpha_weights is None else "alpha"
