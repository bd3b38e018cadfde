"""A sparsely labelled case, and how to get it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

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
