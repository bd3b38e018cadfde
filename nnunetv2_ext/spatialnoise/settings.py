"""SpatialNoise's settings: meaning, unit, default and where the default comes from.

"paper" is Tadokoro et al., arXiv 2504.14795; "prototype" is ours on hippocampus (docs/methods/spatialnoise.md).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nnunetv2_ext.core.settings import Settings
from nnunetv2_ext.spatialnoise.loss import RobustLoss
from nnunetv2_ext.spatialnoise.posterior import Form


class SpatialNoiseSettings(Settings):
    """Settings of `nnUNetTrainerSpatialNoise`, given as `spatialnoise.NAME`."""

    mode: Literal["robust", "relabel", "posterior", "spatial"] = Field(
        "robust",
        description="robust: a cross-entropy that impossible labels pull at less, from the first step. "
        "relabel, posterior, spatial: a moving-average teacher corrects labels late in the training; harmful where "
        "errors have one direction. Source: prototype.",
    )
    loss: RobustLoss = Field(
        "gce",
        description="robust: what stands in the place of the cross-entropy. gce = generalised; controls: sce = "
        "symmetric (Wang et al., arXiv 1908.06112), smoothing = label smoothing of 0.1.",
    )
    q: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Exponent of gce, no unit: (1 - p^q) / q; towards 0 it is the cross-entropy, 1 is the absolute "
        "error. Source: Zhang & Sabuncu, arXiv 1805.07836, not tuned.",
    )
    warmup: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Share of the steps before labels are corrected. Source: prototype; .3 with the student as teacher "
        "destroyed a class.",
    )
    ramp: float = Field(
        0.1, ge=0, le=1, description="Share of the steps over which the correction grows from 0 to all. Source: ours."
    )
    ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Momentum of the teacher; none: 1 - 1 / steps of an epoch, a window of one epoch. Source: ours.",
    )
    tau: float = Field(
        0.9, ge=0.5, lt=1, description="relabel: the teacher's probability above which it corrects. Source: prototype."
    )
    form: Form = Field(
        "exact",
        description="What an error looks like: exact = evenly any other class, best = the likeliest other class, "
        "paper = as the paper writes it, which fails with three classes and more. Source: ours.",
    )
    rho: float = Field(
        0.5,
        ge=0,
        le=0.95,
        description="spatial: correlation of errors between neighbours along the finest axis; 0 is mode posterior. "
        "Source: prototype; the paper's .75 does not converge in 3-D.",
    )
    mu: float = Field(
        -2.0, description="Mean of the error logit's prior: 12 % of the labels wrong. Source: paper's code."
    )
    s: float = Field(1.313, gt=0, lt=2, description="Its standard deviation, logits. Source: paper's code.")
    esteps: int = Field(30, ge=1, description="spatial: steps to the most probable field. Source: measured on a toy.")
    elr: float = Field(0.5, gt=0, description="spatial: their rate. Source: measured on a toy.")
    guard: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of a class that may be corrected; above, it is not learnt yet; 1: no guard. Source: ours.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SpatialNoiseSettings:
        if self.mode in ("posterior", "spatial") and self.warmup == 1:
            raise ValueError(
                f"spatialnoise.warmup=1 with spatialnoise.mode={self.mode} never starts to correct: set "
                "spatialnoise.warmup below 1, or spatialnoise.mode=robust"
            )
        if self.ema is not None and self.mode == "robust":
            raise ValueError(
                "spatialnoise.ema is the momentum of a teacher, and spatialnoise.mode=robust has none: leave it out, "
                "or set another mode"
            )
        if self.loss != "gce" and self.mode != "robust":
            raise ValueError(
                f"spatialnoise.loss={self.loss} is of spatialnoise.mode=robust, and mode {self.mode} keeps nnU-Net's "
                "loss: leave one of them out"
            )
        # by its value: a finished training's settings file names every key
        if self.loss != "gce" and self.q != type(self).model_fields["q"].default:
            raise ValueError(f"spatialnoise.q is of spatialnoise.loss=gce, not of {self.loss}: leave one of them out")
        return self
