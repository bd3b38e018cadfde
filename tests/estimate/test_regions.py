"""fit and apply of a 3-D model with regions and an ignore label."""

import json

import numpy as np
import pytest

from nnunetv2_ext.cli import main
from tests.conftest import make_tiny_dataset
from tests.contract.commands import Commands, segmentations


@pytest.mark.slow
def test_regions_in_3d_are_estimated_by_their_names(tmp_path, monkeypatch) -> None:
    dataset = make_tiny_dataset(tmp_path / "data", num_test=2, regions=True, ignore=True)
    results = tmp_path / "results"
    results.mkdir()
    settings = "num_epochs=3 num_iterations_per_epoch=20 num_val_iterations_per_epoch=1 panel_every=0 seed=1"
    settings = f"{settings} initial_lr=0.05 mirroring=false"
    commands = Commands(dataset, results, "nnUNetTrainerExt", "3d_fullres", settings)
    commands.there(commands.train_command(0))
    base = dataset.preprocessed / dataset.name
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (base / "gt_segmentations").glob("*.nii.gz"))
    (base / "splits_final.json").write_text(json.dumps([{"train": cases, "val": cases}]))
    for key, value in dataset.environment(results).items():
        monkeypatch.setenv(key, value)

    model, output = str(commands.model), tmp_path / "out"
    assert main(["estimate", "fit", model, "-device", "cpu"]) == 0
    assert main(["estimate", "apply", model, "-i", str(dataset.images_ts), "-o", str(output), "-device", "cpu"]) == 0
    regions = {name for name, value in dataset.dataset_json()["labels"].items() if name not in ("background", "ignore")}
    table = json.loads((output / "estimate.json").read_text())
    assert {e["structure"] for e in table["estimates"]} == regions and "whole" in table["sets"]
    assert len(table["estimates"]) == 2 * len(regions)
    found = segmentations(output)
    ignore = dataset.dataset_json()["labels"]["ignore"]
    assert len(found) == 2 and all(ignore not in np.unique(array) for array in found.values())
