"""Small masks and folders of label maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk


def write_label(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None) -> None:
    """``array`` in (Z, Y, X); spacing and origin as SimpleITK has them, X first."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[: array.ndim])
    image.SetOrigin(origin[: array.ndim])
    if direction is not None:
        image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="session")
def label_file() -> Callable[..., None]:
    return write_label


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """``folders({case: (prediction, truth)})``: PRED, TRUTH; dataset.json (classes a, b; ignore 3) beside it."""

    def make(cases: Mapping[str, tuple[np.ndarray, np.ndarray]], **geometry) -> tuple[Path, Path]:
        predictions, truth = tmp_path / "data" / "predictions", tmp_path / "data" / "labels"
        for case, (ours, theirs) in cases.items():
            write_label(predictions / f"{case}.nii.gz", ours, **geometry)
            write_label(truth / f"{case}.nii.gz", theirs, **geometry)
        (tmp_path / "data" / "dataset.json").write_text(
            '{"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}, "file_ending": ".nii.gz"}'
        )
        return predictions, truth

    return make


@pytest.fixture
def two_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """x: a box of class a, predicted one voxel off, and b missed; y: a perfect, b in neither."""
    truth = np.zeros((8, 8, 8), dtype=np.uint8)
    truth[1:5, 1:5, 1:5] = 1
    perfect = truth.copy()
    shifted = np.roll(truth, 1, axis=2)
    with_b = truth.copy()
    with_b[6, 6, 6] = 2
    return {"x": (shifted, with_b), "y": (perfect, truth)}
