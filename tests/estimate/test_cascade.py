"""The last stage of a cascade: what the network sees, and refusals where the previous stage is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.estimate.apply import _stages
from nnunetv2_ext.parts.prediction import FoldPredictor


class OfCascade(nnUNetPredictor):
    """A predictor whose model folder is the last stage of a cascade with two classes."""

    def initialize_from_trained_model_folder(self, *_: Any) -> None:
        self.list_of_parameters = [{}]
        self.configuration_manager = SimpleNamespace(previous_stage_name="3d_lowres")
        self.label_manager = SimpleNamespace(foreground_labels=[1, 2])
        self.plans_manager, self.dataset_json = None, {}


def test_a_cascade_is_refused_by_callers_without_its_previous_stage() -> None:
    with pytest.raises(ValueError, match="last stage of a cascade"):
        FoldPredictor(Path("model"), [0], "checkpoint_final.pth", "cpu", kind=OfCascade)
    predictor = FoldPredictor(Path("model"), [0], "checkpoint_final.pth", "cpu", True, OfCascade)
    assert predictor.previous_stage == "3d_lowres"
    image, stage = np.full((1, 1, 1, 3), 7, np.float32), np.array([[[0, 1, 2]]])
    seen = predictor.with_stage(image, stage)
    assert seen[:, 0, 0].tolist() == [[7, 7, 7], [0, 1, 0], [0, 0, 1]] and predictor.with_stage(image, None) is image


def test_every_image_needs_its_previous_segmentation(tmp_path: Path) -> None:
    files = {"a": [], "b": []}
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(ValueError, match="predict the images with 3d_lowres, and give that folder"):
        _stages(None, ".nii.gz", files, "3d_lowres")
    with pytest.raises(ValueError, match=r"b\.nii\.gz is missing: predict every image with 3d_lowres"):
        _stages(tmp_path, ".nii.gz", files, "3d_lowres")
    with pytest.raises(ValueError, match="leave --previous-stage away"):
        _stages(tmp_path, ".nii.gz", files, None)
    (tmp_path / "b.nii.gz").touch()
    assert _stages(tmp_path, ".nii.gz", files, "3d_lowres") == {c: tmp_path / f"{c}.nii.gz" for c in "ab"}
    assert _stages(None, ".nii.gz", files, None) == {}
