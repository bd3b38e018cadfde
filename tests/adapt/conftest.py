"""Finished models of nnU-Net's own trainer on the tiny datasets, and cases of a new site."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.adapt.adaptation import Request
from nnunetv2_ext.phantom import write_phantom_dataset
from tests.conftest import TinyDataset, make_tiny_dataset


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def pictureless(no_pictures: None) -> None:
    """A training's curves cost more than the training here."""


def train(
    dataset: TinyDataset,
    results: Path,
    configuration: str = "2d",
    folds: tuple[int, ...] = (0,),
    steps: int = 2,
    trainer: type[nnUNetTrainer] = nnUNetTrainer,
    plans: dict[str, Any] | None = None,
    prepare: Callable[[Any], None] = lambda trainer: None,
) -> Path:
    """A model folder as nnU-Net leaves it, after a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in dataset.environment(results).items():
            patch.setenv(key, value)
        for fold in folds:
            torch.manual_seed(fold)
            own = json.loads(json.dumps(plans or dataset.plans())) | {"continue_training": False}
            made = trainer(own, configuration, fold, dataset.dataset_json(), torch.device("cpu"))
            prepare(made)
            made.on_train_start()
            made.on_train_epoch_start()
            for _ in range(steps):
                made.train_step(next(made.dataloader_train))
            made.save_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    return Path(made.output_folder_base)


@pytest.fixture(scope="session")
def model(tiny: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folds 0 and 1 in 2d."""
    return train(tiny, tmp_path_factory.mktemp("models"), folds=(0, 1), steps=20)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw dataset of the same two organs: three cases of another contrast."""
    root = tmp_path_factory.mktemp("site")
    return write_phantom_dataset(root, 9, num_train=3, num_test=1, shape=(20, 28, 20), num_organs=2, seed=5)


@pytest.fixture
def own_site(site: Path, tmp_path: Path) -> Path:
    """The same in a folder that the test may change."""
    shutil.copytree(site, tmp_path / "own_site")
    return tmp_path / "own_site"


@pytest.fixture(scope="session")
def regions(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Regions and an ignore label."""
    return make_tiny_dataset(tmp_path_factory.mktemp("regions"), num_test=0, regions=True, ignore=True)


@pytest.fixture
def request_for(
    model: Path, site: Path, tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Request]:
    """``request_for(option=...)``: the model adapted to the site in four steps; the old data is at hand."""
    for key, value in tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)

    def make(site: Path = site, **options: Any) -> Request:
        defaults: dict[str, Any] = {
            "model": model,
            "images": site / "imagesTr",
            "labels": site / "labelsTr",
            "output": tmp_path / "adapted",
            "folds": ("0",),
            "steps": 4,
            "report": "none",
            "device": "cpu",
        }
        return Request(**defaults | options)

    return make
