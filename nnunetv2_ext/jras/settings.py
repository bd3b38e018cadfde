"""J-RAS's settings in one readable block: meaning, unit, default and where the default comes from.

Sources: "paper" is the abstract of arXiv 2510.09953, "measured" docs/results.md, "ours" this package's own choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from nnunetv2_ext.core.settings import STRUCTURAL, Settings

_structural: Any = partial(Field, json_schema_extra=STRUCTURAL)


class JRASSettings(Settings):
    """Settings of `nnUNetTrainerJRAS`, given as `jras.NAME`.

    total = L(decoder(encoder(x), read of the guides)) + `transport_weight` CE(transported mask)
    """

    RENAMED: ClassVar[dict[str, str]] = {"init_from": "init_from", "group_regex": "group_regex"}  # common keys

    # ---- what is part of the network
    retriever: Literal["joint", "random", "none"] = _structural(
        "joint",
        description="joint: the segmentation loss teaches which guides are retrieved; controls: random (any guides), "
        "none (no guides: plain nnU-Net). Source: paper (joint), ours (controls).",
    )
    key_dim: int = _structural(
        32, ge=2, description="Numbers in the key of a cell, and in the vector of a guide. Source: ours."
    )
    value_dim: int = _structural(
        16, ge=1, description="Feature channels that a query cell reads beside the guides' masks. Source: ours."
    )
    num_guides: int | None = _structural(
        None, ge=1, description="K, guides per patch. Unset: 4 in 2-D, 2 in 3-D. Source: ours (cost)."
    )
    # ---- the bank
    bank_size: int | None = Field(
        None,
        ge=1,
        description="N, patches in the bank over all training cases. Unset: 256 in 2-D, 48 in 3-D. Every checkpoint "
        "holds them, a byte a voxel for each channel and for the label. Source: ours (size).",
    )
    fg_share: float = Field(
        0.75, ge=0, le=1, description="Share of the guides whose patch is centred on a foreground voxel. Source: ours."
    )
    # ---- the training
    guides_with_gradient: int = Field(
        1,
        ge=1,
        description="Guides of a patch through which the loss reaches the encoder; the others are only read. "
        "Source: measured (each costs 0.4 of plain nnU-Net's saved tensors).",
    )
    transport_weight: float = Field(
        0.3, ge=0, description="Weight of the cross entropy of the mask that attention transports. Source: ours."
    )
    guide_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of training patches without guides, so that the network also works without. Source: ours.",
    )
    style_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of training patches whose intensities, with those of their guides, pass through a random "
        "increasing curve: more helps new scanners and costs the own domain. It also acts with retriever=none. "
        "Source: measured.",
    )

    @field_validator("retriever", mode="before")
    @classmethod
    def _none_is_a_name(cls, value: Any) -> Any:
        # "none" of a settings text arrives as None, like that of every key that may be unset
        return "none" if value is None else value

    @property
    def has_retrieval(self) -> bool:
        return self.retriever != "none"

    def guides_for(self, dim: int) -> int:
        """K for patches of `dim` axes."""
        return self.num_guides or (4 if dim == 2 else 2)

    def bank_size_for(self, dim: int) -> int:
        """N for patches of `dim` axes."""
        return self.bank_size or (256 if dim == 2 else 48)


def is_of_first_design(block: Mapping[str, Any]) -> bool:
    """Whether a model folder's settings are of the network that commit b200e0f was the last to have, with guides."""
    return "fusion" in block and block.get("retriever", "joint") != "none"


FIRST_DESIGN = (
    "this is a J-RAS model of the first design, whose guides this version does not compute: predict or continue with "
    "the code it was trained with (commit b200e0f or earlier), or write its plain nnU-Net, which no guide reaches, by "
    "`nnUNetv2_ext export MODEL OUT`"
)
