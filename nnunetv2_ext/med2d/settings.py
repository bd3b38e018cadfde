"""Settings of the Med-2D trainer, ``med2d.*``."""

from typing import Literal

from pydantic import Field

from nnunetv2_ext.core.settings import STRUCTURAL, Settings


class Med2DSettings(Settings):
    """The network's; the optimiser's are common settings (``initial_lr``, ``weight_decay``)."""

    width: float = Field(
        1.0,
        gt=0,
        lt=100,
        json_schema_extra=STRUCTURAL,
        description="factor of all stages' widths; 1: 2.07 million parameters, as the paper says",
    )
    gap: Literal["gate", "add", "none"] = Field(
        "gate",
        json_schema_extra=STRUCTURAL,
        description="what a Med block does with the global average of its map. Source: ours",
    )
