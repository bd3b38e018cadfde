"""The labelled cases of nnU-Net's preprocessed folder, as embedding and propagation want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.rada.annotation.planes import Planes

Array = npt.NDArray[Any]
# what of a configuration decides how the preprocessed files look
_PREPROCESSING = (
    "data_identifier",
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    "spacing",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
_ENDINGS = (".b2nd", "_seg.b2nd", ".npz", ".npy", "_seg.npy")


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


def plans_key(plans_name: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the plans that preprocessed data depend on; JSON-serialisable."""
    return {"plans": plans_name, **{name: configuration[name] for name in _PREPROCESSING if name in configuration}}


def case_sources(
    dataset: Any, planes: Mapping[str, Planes], spacing: Sequence[float], channel: int = 0
) -> list[CaseSource]:
    """The cases of `planes` that have any, in the order of their names.

    Args:
        dataset: nnU-Net's dataset: ``source_folder`` and ``load_case``.
        planes: found planes by case name.
        spacing: mm along the axes of the preprocessed arrays (the configuration's spacing).
        channel: image channel to read.
    """
    return [
        CaseSource(
            name=name,
            planes=planes[name].indices,
            state=file_state(dataset.source_folder, name),
            load=lambda name=name: read_case(dataset, name, spacing, channel),  # type: ignore[misc]
        )
        for name in sorted(planes)
        if planes[name]
    ]


def read_case(dataset: Any, name: str, spacing: Sequence[float], channel: int = 0) -> SparseCase:
    """One channel and the label of a preprocessed case.

    Raises:
        ValueError: no such channel.
    """
    data, seg, _, _ = dataset.load_case(name)
    if channel >= data.shape[0]:
        raise ValueError(
            f"rada.image_channel={channel}: case {name} has {data.shape[0]} image channels, counted from 0"
        )
    return SparseCase(np.asarray(data[channel]), np.asarray(seg[0]), spacing)


def file_state(folder: str | Path, name: str) -> list[list[Any]]:
    """Name, size and time of a case's files, which tell whether it was preprocessed again."""
    files = [Path(folder) / f"{name}{ending}" for ending in _ENDINGS]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()]
