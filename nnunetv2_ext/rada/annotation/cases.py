"""The labelled cases of nnU-Net's preprocessed folder, as embedding and propagation want them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnunetv2_ext.data.preprocessed import Preprocessed
from nnunetv2_ext.rada.annotation.planes import Array, Planes


class SparseCase(NamedTuple):
    """A case with annotated planes."""

    image: Array  # (X, Y, Z) of the channel that CLIP sees
    label: Array  # (X, Y, Z) with the ignore label; negative: outside the body
    spacing: Sequence[float]  # mm along X, Y, Z


@dataclass(frozen=True)
class CaseSource:
    """How to get a case."""

    name: str
    planes: Sequence[Sequence[int]]  # indices of annotated planes for each axis
    state: Any  # changes when the case changes, such as sizes and times of its files; JSON-serialisable
    load: Callable[[], SparseCase]  # reads it; called only if what is made of it is not on disk


def cache_root(preprocessed_dataset_folder: str | Path) -> Path:
    """Where RADA keeps what it computes offline: beside nnU-Net's configuration folders, never in them."""
    return Path(preprocessed_dataset_folder) / "nnunetv2_ext" / "rada"


def case_sources(
    data: Preprocessed, planes: Mapping[str, Planes], spacing: Sequence[float], channel: int = 0
) -> list[CaseSource]:
    """The cases of `planes` that have any, in the order of their names.

    Loading one raises ValueError: no such image channel, or the case cannot be read. `spacing` is the configuration's,
    in mm along the axes of the preprocessed arrays.
    """

    def load(name: str) -> SparseCase:
        image, label, _ = data.read_case(name)
        if channel >= image.shape[0]:
            raise ValueError(
                f"rada.image_channel={channel}: case {name} has {image.shape[0]} image channels, counted from 0"
            )
        return SparseCase(np.asarray(image[channel]), np.asarray(label[0]), spacing)

    names = [name for name in sorted(planes) if planes[name]]
    return [CaseSource(name, planes[name].indices, data.file_state(name), partial(load, name)) for name in names]
