"""Common settings that need more than core: every trainer offers them, whatever its method."""

from typing import Literal

from pydantic import Field

from nnunetv2_ext.core.settings import LOCAL_PATH, CommonSettings


class HouseSettings(CommonSettings):
    """Settings every trainer of this package understands: core's, and those of the parts."""

    init_from: str | None = Field(
        None,
        min_length=1,
        description="checkpoint of an nnU-Net training whose weights this one starts from; what fits the network of "
        "the plans is loaded, the rest stays random, and the log has a table of both. It is read once, at the start",
        json_schema_extra=LOCAL_PATH,
    )
    optimizer: Literal["sgd", "adamw"] | None = Field(
        None,
        description="sgd: nnU-Net's, momentum 0.99; adamw: torch.optim.AdamW, which wants an initial_lr near 1e-3 and "
        "a weight_decay near 1e-2; none: the base trainer's",
    )
