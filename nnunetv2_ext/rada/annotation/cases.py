"""The labelled cases of nnU-Net's preprocessed folder, as embedding and propagation want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.data.preprocessed import Preprocessed
from nnunetv2_ext.rada.annotation.planes import Planes

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SparseCase:
    """A case with annotated planes.

    Attributes:
        image: ``(X, Y, Z)`` of the channel that CLIP sees.
        label: ``(X, Y, Z)`` with the ignore label; negative: outside the body.
        spacing: mm along X, Y, Z.
    """

    image: Array
    label: Array
    spacing: Sequence[float]


@dataclass(frozen=True)
class CaseSource:
    """How to get a case.

    Attributes:
        name: case id.
        planes: indices of annotated planes for each axis.
        state: whatever changes when the case changes, such as sizes and times of its files; JSON-serialisable.
        load: reads it; called only if the case's vectors are not on disk.
    """

    name: str
    planes: Sequence[Sequence[int]]
    state: Any
    load: Callable[[], SparseCase]


def cache_root(preprocessed_dataset_folder: str | Path) -> Path:
    """Where RADA keeps what it computes offline: beside nnU-Net's configuration folders, never in them."""
    return Path(preprocessed_dataset_folder) / "nnunetv2_ext" / "rada"


def case_sources(
    data: Preprocessed, planes: Mapping[str, Planes], spacing: Sequence[float], channel: int = 0
) -> list[CaseSource]:
    """The cases of `planes` that have any, in the order of their names.

    Args:
        data: the configuration.
        planes: found planes by case name.
        spacing: mm along the axes of the preprocessed arrays (the configuration's spacing).
        channel: image channel to read.
    """
    return [
        CaseSource(
            name=name,
            planes=planes[name].indices,
            state=data.file_state(name),
            load=lambda name=name: read_case(data, name, spacing, channel),  # type: ignore[misc]
        )
        for name in sorted(planes)
        if planes[name]
    ]


def read_case(data: Preprocessed, name: str, spacing: Sequence[float], channel: int = 0) -> SparseCase:
    """One channel and the label of a preprocessed case.

    Raises:
        ValueError: no such channel, or the case cannot be read.
    """
    image, label, _ = data.read_case(name)
    if channel >= image.shape[0]:
        raise ValueError(
            f"rada.image_channel={channel}: case {name} has {image.shape[0]} image channels, counted from 0"
        )
    return SparseCase(np.asarray(image[channel]), np.asarray(label[0]), spacing)
