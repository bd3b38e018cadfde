"""Settings of PEMMA."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nnunetv2_ext.core.settings import LOCAL_PATH, STRUCTURAL, Settings


class PEMMASettings(Settings):
    """Block ``pemma``."""

    base: str | None = Field(
        None,
        min_length=1,
        description="finished model of the old channels: its model folder, of which each fold adapts its own, or a "
        "checkpoint. It is read once, at the start; after that the checkpoints hold its weights",
        json_schema_extra=LOCAL_PATH,
    )
    base_channels: int | None = Field(
        None, ge=1, description="number of old channels; none: read from base", json_schema_extra=STRUCTURAL
    )
    rank: int = Field(
        4,
        ge=0,
        le=64,
        description="rank of the change of each convolution; 0: none is changed. Source: paper; 8 was no better",
        json_schema_extra=STRUCTURAL,
    )
    stem: Literal["all", "first", "none"] = Field(
        "all",
        description="where the encoder of the new channels joins the base's: all: behind each stage; first: behind the "
        "first one; none: nowhere, a control whose adapters know only that the channel is there. Source: ours",
        json_schema_extra=STRUCTURAL,
    )
    train_heads: bool = Field(
        True, description="add a change to the segmentation layers. Source: ours", json_schema_extra=STRUCTURAL
    )
    channel_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of samples whose new channels are taken away in a training step; such samples teach nothing",
    )
    start_from: str | None = Field(
        None,
        min_length=1,
        description="model folder or checkpoint of another training of these adapters on the same base, which this one "
        "goes on from; that one stays as it is",
        json_schema_extra=LOCAL_PATH,
    )

    @field_validator("stem", mode="before")
    @classmethod
    def _none_is_a_name_here(cls, value: Any) -> Any:
        return "none" if value is None else value  # elsewhere it is read as "not set"

    @model_validator(mode="after")
    def _something_learns(self) -> "PEMMASettings":
        if self.stem == "none" and self.rank == 0 and not self.train_heads:
            raise ValueError("stem=none, rank=0 and train_heads=false leave nothing to train; change one of them")
        return self
