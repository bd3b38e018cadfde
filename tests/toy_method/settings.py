"""Settings of the toy."""

from __future__ import annotations

from pydantic import Field

from nnunetv2_ext.core.settings import Settings


class ToySettings(Settings):
    """Keys below ``toy_method``."""

    weight: float = Field(
        0.1, ge=0, description="weight of the consistency on unlabelled patches, no unit; 0: no teacher. Source: ours"
    )
    noise: float = Field(
        0.1, ge=0, description="standard deviation of the noise that the student sees, in intensities. Source: ours"
    )
    momentum: float = Field(0.99, ge=0, le=1, description="of the teacher's moving average, no unit. Source: ours")
    head_weight: float = Field(
        0.1, ge=0, description="weight of the head's loss, no unit; 0: no head and no state of cases. Source: ours"
    )
    rate: float = Field(
        0.5, gt=0, le=1, description="share of the newest value in the mean of a place, no unit. Source: ours"
    )
