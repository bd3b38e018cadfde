"""Settings of nnUNetTrainerAdapt, which `nnUNetv2_ext adapt` fills in."""

from pydantic import Field

from nnunetv2_ext.core.settings import LOCAL_PATH, Settings

REPLAY = 0.7


class AdaptSettings(Settings):
    """Old cases beside the new ones, and structures that the new site does not draw."""

    old_data: str | None = Field(
        None,
        min_length=1,
        description="folder of the preprocessed configuration that the model was trained on, whose cases are replayed; "
        "none: no replay. Source: ours",
        json_schema_extra=LOCAL_PATH,
    )
    old_cases: list[str] | None = Field(
        None,
        min_length=1,
        description="which cases of it are replayed; none: all. Source: ours",
        json_schema_extra=LOCAL_PATH,
    )
    old_previous_stage: str | None = Field(
        None,
        min_length=1,
        description="folder of the old cases' segmentations by the previous stage, for a cascade. Source: ours",
        json_schema_extra=LOCAL_PATH,
    )
    replay: float = Field(
        REPLAY,
        ge=0,
        lt=1,
        description="share of each batch that comes from old_data, no unit. Source: measured; 0.7 "
        "keeps the old site within half a point, 0.5 within one",
    )
    not_drawn: list[str] = Field(
        default_factory=list,
        description="classes or regions of the model that the new labels leave in the background. A class's "
        "probability and the background's are added in the loss of new cases; a region is left out of it. Source: "
        "marginal loss, Shi et al. 2021 (arXiv:2007.03868)",
    )
