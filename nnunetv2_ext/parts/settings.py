"""Common settings that need more than core: every trainer offers them, whatever its method."""

from typing import Any, Literal

from pydantic import Field, field_validator

from nnunetv2_ext.core.settings import LOCAL_PATH, CommonSettings


class HouseSettings(CommonSettings):
    """Settings every trainer of this package understands: core's, and those of the parts."""

    init_from: str | None = Field(
        None,
        min_length=1,
        description="checkpoint, or folder of a fold, whose weights this training starts from; what fits the network "
        "of the plans is loaded, the rest stays random, and the log has a table of both. It is read once, at the start",
        json_schema_extra=LOCAL_PATH,
    )
    init_parts: Literal["all", "encoder"] = Field("all", description="which part of the network starts from init_from")
    init_min_share: float = Field(
        0.5, ge=0, le=1, description="share of the encoder's convolutions; if fewer fit, init_from is an error"
    )
    init_heads: bool | None = Field(
        None,
        description="segmentation layers of init_from too; none: where its labels have the names and values of ours",
    )
    init_channels: Literal["repeat", "mean", "first"] = Field(
        "repeat",
        description="how input channels of init_from become ours. repeat: a multiple repeats them, else mean; mean: "
        "their mean; first: the first ones, further ones start with weight 0 (a cascade always does so)",
    )
    init_trust: bool = Field(
        False, description="read init_from although it holds more than tensors and plain values, and may run a program"
    )
    warmup_epochs: int = Field(
        0, ge=0, description="epochs in which the learning rate rises linearly to initial_lr, before it decays"
    )
    encoder_lr_factor: float = Field(1.0, gt=0, le=10, description="the encoder learns at this times the rate")
    freeze_encoder_epochs: int = Field(0, ge=0, description="epochs at the start in which the encoder does not change")
    optimizer: Literal["sgd", "adamw"] | None = Field(
        None,
        description="sgd: nnU-Net's, momentum 0.99; adamw: torch.optim.AdamW, which wants an initial_lr near 1e-3 and "
        "a weight_decay near 1e-2; none: the base trainer's",
    )
    augmentation: Literal["base", "nnunet", "da5", "da5_ord0", "none"] = Field(
        "base",
        description="nnunet: nnUNetTrainer's; da5, da5_ord0: as nnUNetTrainerDA5 and ...DA5ord0; none: as "
        "nnUNetTrainerNoDA; base: the base trainer's",
    )
    gin: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of training samples that go through a random convolution (GIN, arXiv 2111.12525); for "
        "unseen contrasts, at a price at home",
    )
    gin_until: float = Field(
        1.0, gt=0, le=1, description="share of the training's epochs in which gin is on. Source: ours"
    )
    gin_channels: Literal["auto", "separate", "joint"] = Field(
        "auto",
        description="separate: each channel has a random network of its own; joint: one for all; auto: joint for RGB "
        "channels (rgb_to_0_1), else separate",
    )
    gin_on: Literal["workers", "device"] = Field(
        "workers",
        description="where the random convolutions are computed: in the processes that load batches, or in the step; "
        "device is for few processes and a fast GPU",
    )
    gin_layers: int = Field(4, ge=1, le=16, description="convolutions of the random network. Source: paper")
    gin_hidden: int = Field(2, ge=1, le=64, description="channels between them. Source: paper")

    @field_validator("augmentation", mode="before")
    @classmethod
    def _none_is_a_name_here(cls, value: Any) -> Any:
        return "none" if value is None else value  # elsewhere it is read as "not set"
