"""The settings of methods that train on unlabelled patches, in the method's own block."""

from typing import Any, Literal

from pydantic import Field, field_validator

from nnunetv2_ext.core.settings import Settings

Source = Literal["pool", "rest", "labelled"]


class UnlabelledSource(Settings):
    """Base of a method's block; a method overrides a field to give it another default."""

    unlabelled: Source | None = Field(
        None,
        description="Where unlabelled patches come from. pool (or true): `nnUNetv2_ext unlabelled`'s; rest: training "
        "cases that train_cases leaves, without their labels (for studies); labelled: the training cases (a control); "
        "none (or false): there are none. Source: ours.",
    )

    @field_validator("unlabelled", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: "pool", False: None}[value] if isinstance(value, bool) else value


class UnlabelledSettings(UnlabelledSource):
    """With what a method needs whose teacher labels the patches."""

    unlabelled_weight: float = Field(
        0.5, ge=0, description="Weight of the loss on unlabelled voxels; 0: off. Source: BCP's released code."
    )
    unlabelled_start: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Share of the steps before unlabelled patches count; 1: never. Source: ours (BCP: a quarter).",
    )
    unlabelled_ramp: float = Field(
        0.1, ge=0, le=1, description="Share of the steps over which their weight then grows. Source: ours."
    )
    unlabelled_refresh: int | None = Field(
        None,
        ge=0,
        description="Epochs between two looks of the teacher at all unlabelled cases; patches are then drawn on the "
        "foreground it found. 0: never; none: ten looks if a patch covers less than half of the median image, else "
        "never. Source: ours.",
    )
