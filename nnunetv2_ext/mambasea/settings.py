"""Settings of Mamba-Sea, ``mambasea.*``."""

from typing import Literal

from pydantic import Field

from nnunetv2_ext.core.settings import LOCAL_PATH, Settings


class MambaSeaSettings(Settings):
    """Local sequence augmentation (LSA), global visual augmentation (GVA), and what holds both branches together."""

    lsa: float = Field(0.9, ge=0, le=1, description="probability of LSA in a step; 0: off. Source: paper")
    lsa_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="share of a sequence that gets other statistics, in one piece. Source: paper",
    )
    gva: float = Field(
        0.8, ge=0, le=1, description="probability that a dark sample is brightened; 0: no second branch. Source: paper"
    )
    tau: float = Field(
        0.4,
        ge=0,
        le=1,
        description="mean brightness, on a sample's own scale 0..1, below which it is dark. Source: paper",
    )
    branch: Literal["own", "shared"] = Field(
        "own",
        description="own: the second branch has a network of its own, which is not needed to predict (paper); shared: "
        "the trained network, with half the memory for weights",
    )
    consistency: float = Field(
        0.1, ge=0, description="weight of the mean squared difference of both branches' logits. Source: paper"
    )
    weights: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=LOCAL_PATH,
        description="for the network vmunet: file with VMamba's ImageNet weights, read once at the start of the "
        "training; none: random weights, with which results will not match the paper",
    )
