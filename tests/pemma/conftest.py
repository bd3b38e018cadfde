"""A dataset of two channels, a model of its first one, and the plans that add-channel writes, preprocessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_ext.cli import main
from tests.conftest import TinyDataset, in_this_process, make_tiny_dataset
from tests.contract.data import with_model

PLANS = "nnUNetPlans_pemma"


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Two of six training cases lack the second channel; there is one test case."""
    root = tmp_path_factory.mktemp("extended")
    dataset = make_tiny_dataset(root, 7, ("2d",), channels=2, num_test=1)
    dataset = with_model(dataset, root / "model", "2d", steps=6)
    for case in ("phantom_003", "phantom_004"):
        (dataset.raw / dataset.name / "imagesTr" / f"{case}_0001.nii.gz").unlink()
    with in_this_process(dataset) as (api, _):
        assert main(["add-channel", "zeros", "-i", str(dataset.raw / dataset.name / "imagesTr")]) == 0
        assert main(["add-channel", "prepare", "-d", "7", "-base", str(dataset.model)]) == 0
        api.preprocess([7], plans_identifier=PLANS, configurations=("2d",), num_processes=(1,))
    return dataset


@pytest.fixture
def new(extended: TinyDataset, make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    """``new("key=value ...", **make_trainer's options)``: a trainer with the prepared plans."""
    from nnunetv2_ext.trainers.nnUNetTrainerPEMMA import nnUNetTrainerPEMMA

    def make(settings: str = "pemma.base={model}", **options: Any) -> Any:
        known = {"plans": plans_of(extended), "configuration": "2d", "dataset": extended}
        return make_trainer(nnUNetTrainerPEMMA, f"pemma.rank=2 {settings}", **known | options)

    return make


def plans_of(dataset: TinyDataset) -> dict[str, Any]:
    return json.loads((dataset.preprocessed / dataset.name / f"{PLANS}.json").read_text())


def base_file(dataset: TinyDataset, fold: int = 0) -> Path:
    assert dataset.model is not None
    return dataset.model / f"fold_{fold}" / "checkpoint_final.pth"
