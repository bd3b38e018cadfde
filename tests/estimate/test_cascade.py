"""The last stage of a cascade: what the network sees, and refusals where the previous stage is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.cli import main
from nnunetv2_ext.estimate.apply import _stages
from nnunetv2_ext.parts.prediction import FoldPredictor
from tests.conftest import make_tiny_dataset
from tests.contract.commands import Commands, same, segmentations


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


@pytest.mark.slow
def test_a_trained_cascade_is_estimated_and_segments_as_nnunet_does(tmp_path: Path, monkeypatch) -> None:
    dataset = make_tiny_dataset(tmp_path / "data", num_test=2)
    results = tmp_path / "results"
    results.mkdir()
    base = dataset.preprocessed / dataset.name
    plans = dataset.plans()
    lowres = json.loads(json.dumps(plans["configurations"]["3d_fullres"]))
    lowres |= {"data_identifier": "tiny_3d_lowres", "spacing": [1.4] * 3, "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_lowres"] = lowres
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (base / "tiny.json").write_text(json.dumps(plans))
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (base / "gt_segmentations").glob("*.nii.gz"))
    (base / "splits_final.json").write_text(json.dumps([{"train": cases, "val": cases}]))
    for key, value in dataset.environment(results).items():
        monkeypatch.setenv(key, value)
    preprocess_dataset(dataset.dataset_id, "tiny", ("3d_lowres",), (1,))

    settings = "num_epochs=1 num_iterations_per_epoch=3 num_val_iterations_per_epoch=1 panel_every=0 mirroring=false"
    low, last = (
        Commands(dataset, results, "nnUNetTrainerExt", configuration, settings)
        for configuration in ("3d_lowres", "3d_cascade_fullres")
    )
    for stage in (low, last):
        stage.there(stage.train_command(0))
    low.there(low.predict_command(tmp_path / "low", [0]))
    given = ["-prev_stage_predictions", str(tmp_path / "low")]
    last.there(last.predict_command(tmp_path / "stock", [0], *given))

    assert main(["estimate", "fit", str(last.model), "-device", "cpu"]) == 0
    run = ["estimate", "apply", str(last.model), "-i", str(dataset.images_ts), "-o", str(tmp_path / "out")]
    assert main([*run, "-device", "cpu", "--previous-stage", str(tmp_path / "low")]) == 0
    assert same(segmentations(tmp_path / "stock"), segmentations(tmp_path / "out"))
    assert len(json.loads((tmp_path / "out" / "estimate.json").read_text())["estimates"]) == 4
