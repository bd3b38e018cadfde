"""MedContext's settings in one readable block: meaning, unit, default and where the default comes from.

Sources: "released code" is https://github.com/hananshafi/MedContext; the paper is Gani et al., "MedContext: Learning
Contextual Cues for Efficient Volumetric Medical Segmentation", MICCAI 2024. "ours" is this package's own choice.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from nnunetv2_ext.parts.unlabelled_settings import UnlabelledSettings

Edge = Annotated[int, Field(ge=1)]


class MedContextSettings(UnlabelledSettings):
    """Settings of `nnUNetTrainerMedContext`, given as `medcontext.NAME`.

    total = a L(s(x)) + a' L(s(m(x))) + beta ramp(t) L_cons(teacher(x), s(m(x))), a = `supervised_weight`,
    a' = `masked_supervised_weight`; with unlabelled patches u also gamma ramp_u(t) L_cons(teacher(u), s(m(u))),
    gamma = `unlabelled_weight`.

    A `preset` stands for some of the keys below (`PRESETS`): whoever reads a source of settings puts it beneath the
    keys that the same source gives itself; the model does not merge.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        # the released sum with its errors corrected: both passes are supervised alike
        "paper": {"supervised_weight": 1.0, "masked_supervised_weight": None, "beta": 0.5},
        # the released nnFormer-Synapse numbers where a convolutional network allows; its consistency is near zero
        "paper_code": {
            "supervised_weight": 1.0,
            "masked_supervised_weight": None,
            "beta": 0.4,
            "consistency": "logits_over_norm",
            "ramp_fraction": 0.0,
            "mask_ratio": 0.4,
            "mask_rounding": "floor",
            "mask_block": [4, 4],
            "mask_per_sample": False,
            "tube": True,
            "fill": "zero",
            "ema_base": 0.996,
            "ema_schedule": "released",
        },
    }

    preset: Literal["paper", "paper_code"] | None = Field(
        None,
        description="Named set of defaults beneath the keys you give: paper = both passes supervised alike, as in the "
        "released sum; paper_code = the released code's numbers, for ablation only (its consistency is near zero). "
        "Source: ours.",
    )
    supervised_weight: float = Field(
        2.0,
        ge=0,
        description="Weight a of the segmentation loss in the clean pass, no unit; a plain run has 1. Source: measured "
        "(the released code's total of 2 over both passes, all of it on the clean one; docs/results.md).",
    )
    masked_supervised_weight: float | None = Field(
        0.0,
        ge=0,
        description="Weight of the segmentation loss in the masked pass, no unit; none = supervised_weight. At 0 what "
        "is hidden is learnt from the teacher only. Source: measured (docs/results.md); released code: as "
        "supervised_weight.",
    )
    beta: float = Field(
        2.0,
        ge=0,
        description="Weight of the consistency between teacher and masked student, no unit; 0 builds no teacher. "
        "Source: measured (docs/results.md); released code's argument: 0.5.",
    )
    consistency: Literal["prob_mse", "kl", "relative_logits", "logits_over_norm"] = Field(
        "prob_mse",
        description="Form of the consistency: squared difference of probabilities, Kullback-Leibler divergence, "
        "squared difference of logits relative to the teacher's, or the released code's (ablation only). Source: ours.",
    )
    ramp_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of all training steps over which the consistency grows to its full weight; 0 = at once. "
        "Source: ours (10 of 1000 epochs).",
    )
    cons_on_ignored: bool = Field(
        False,
        description="Count the consistency also on voxels with the ignore label (learning from unlabelled voxels). "
        "What nnU-Net's rotation and padding bring in from outside the image counts as annotated background. "
        "Source: ours.",
    )
    mask_ratio: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of blocks hidden from the student in the masked pass, 0..1. "
        "Source: released code (argument default).",
    )
    mask_warmup: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of all training steps over which mask_ratio grows from 0 on a straight line; 0 = at once. "
        "Source: ours.",
    )
    mask_rounding: Literal["nearest", "floor"] = Field(
        "nearest",
        description="How mask_ratio times the number of blocks becomes a whole number. "
        "Source: ours (floor: released code).",
    )
    mask_block: Annotated[list[Edge], Field(min_length=2, max_length=3)] | Edge | None = Field(
        None,
        description="Edge of a hidden block in voxels: one number, one per axis, or with tube the two in-plane ones. "
        "None = the network's total stride, at most a quarter of the patch. Source: ours ([4, 4]: released code).",
    )
    mask_per_sample: bool = Field(
        True,
        description="Draw one mask for each sample; False = one pattern for the batch. "
        "Source: ours (False: released code).",
    )
    tube: bool = Field(
        False,
        description="Repeat one in-plane pattern along the first axis of a 3-D patch; no effect in 2-D. "
        "Source: ours (True: released code).",
    )
    fill: Literal["zero", "noise", "minimum"] = Field(
        "zero",
        description="What replaces hidden voxels: 0 (the mean after z-scoring), normal noise of standard deviation 1, "
        "or the channel's minimum in the patch. Source: ours (the released learned token starts at zero).",
    )
    ema_base: float = Field(
        0.996,
        ge=0,
        le=1,
        description="Momentum of the teacher's moving average from which its cosine starts; the window is "
        "1/(1 - momentum) steps, and until it is full the teacher is the plain mean of all students so far. "
        "Source: released code (argument default).",
    )
    ema_final: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Momentum at the last step, reached on a cosine; set ema_base and ema_final to 0 for a teacher "
        "that equals the student. Source: released code (argument default).",
    )
    ema_schedule: Literal["global", "released"] = Field(
        "global",
        description="Step that drives the momentum: global = over the whole training, released = ema_base * i / 4999 "
        "with i the step within the epoch, at most 0.05 (ablation only; ignores ema_final). Source: ours.",
    )
    masked_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the batch's samples that get the masked pass (at least one, drawn at random); 0 = no "
        "masked pass. Lower is cheaper. Source: ours.",
    )
    masked_every: int = Field(
        1,
        ge=1,
        description="Masked pass on every n-th step; the teacher follows at every step. The average weight of the "
        "masked terms becomes 1/n. Source: ours.",
    )

    unlabelled_weight: float = Field(
        2.0, ge=0, description="Weight gamma of the consistency on unlabelled patches; 0: off. Source: ours (as beta)."
    )
    unlabelled_start: float = Field(
        0.0, ge=0, le=1, description="Share of the steps before unlabelled patches count; 1: never. Source: ours."
    )

    @model_validator(mode="after")
    def _consistent(self) -> MedContextSettings:
        if self.supervised_weight == 0 and not self.masked_supervised_weight and self.beta == 0:
            raise ValueError(
                "with supervised_weight, masked_supervised_weight and beta at 0 nothing is learned: raise one of them"
            )
        if self.ema_final < self.ema_base:
            raise ValueError(
                f"ema_final ({self.ema_final}) must not be below ema_base ({self.ema_base}): lower ema_base as well"
            )
        return self
