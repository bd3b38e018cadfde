"""WT-BCP's settings: meaning, unit, default and where the default comes from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nnunetv2_ext.core.settings import STRUCTURAL
from nnunetv2_ext.parts.unlabelled_settings import Source, UnlabelledSettings

Mode = Literal["mean_teacher", "pseudo", "bcp", "bcp+", "wtbcp"]


class WTBCPSettings(UnlabelledSettings):
    """Settings of `nnUNetTrainerWTBCP`, given as `wtbcp.NAME`."""

    unlabelled: Source | None = Field("pool", description=UnlabelledSettings.model_fields["unlabelled"].description)
    mode: Mode = Field(
        "pseudo",
        json_schema_extra=STRUCTURAL,  # wtbcp is another network
        description="mean_teacher: student and teacher agree on unlabelled patches. pseudo: the teacher's labels are "
        "learnt there. bcp: labelled and unlabelled patches are cut into each other. bcp+: bcp and plain patches. "
        "wtbcp: bcp with two further networks for the Haar bands. Source: ours; no mode is known to win.",
    )
    box: float = Field(
        2 / 3,
        gt=0,
        lt=1,
        description="Side of the box that is cut into another patch, in sides of the patch. Source: BCP's code.",
    )
    ema: float = Field(0.99, ge=0, lt=1, description="Momentum of the teacher; 0: the student. Source: BCP's code.")
    noise: float = Field(
        0.1,
        ge=0,
        description="mean_teacher: standard deviation of the noise that the student's patch gets, in units of the "
        "normalised image; cut at twice of it. Source: common practice (UA-MT).",
    )
    largest_component: bool | None = Field(
        None,
        description="Keep only the largest component of each structure in the teacher's labels; none: of those "
        "structures that are one piece in the labelled cases. Source: BCP's code (always); ours.",
    )
    alpha: float = Field(
        0.2, ge=0, le=1, description="wtbcp: share of the high band that the low network sees. Source: ours."
    )
    beta: float = Field(
        0.65, ge=0, le=1, description="wtbcp: share of the low band that the high network sees. Source: ours."
    )
    consistency: float = Field(
        1.0, ge=0, description="wtbcp: weight of the Dice loss between the three networks. Source: ours."
    )

    @model_validator(mode="after")
    def _consistent(self) -> WTBCPSettings:
        if self.mode == "wtbcp" and (self.unlabelled is None or self.unlabelled_weight == 0):
            raise ValueError(
                "without unlabelled cases or their weight this trainer is plain nnU-Net, and wtbcp.mode=wtbcp is "
                "another network: set another mode, or, for labelled patches alone, only wtbcp.unlabelled_start=1"
            )
        return self
