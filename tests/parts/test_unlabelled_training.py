"""Unlabelled patches in a training: whose they are, from when on, where they lie, and what --c takes up."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pydantic import BaseModel, ValidationError
from torch import nn

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term
from nnunetv2_ext.data.fill_pool import fill_pool
from nnunetv2_ext.data.pool import preprocessing_key
from nnunetv2_ext.data.unlabelled import UnlabelledStream
from nnunetv2_ext.parts.unlabelled_settings import UnlabelledSettings
from nnunetv2_ext.parts.unlabelled_training import UnlabelledTraining
from tests.conftest import TinyDataset
from tests.contract.data import CASCADE, cascade

pytestmark = pytest.mark.usefixtures("no_pictures")
REST = "mine.unlabelled=rest train_cases=2"


class Mine(UnlabelledTraining):
    """The mean of what the teacher says about unlabelled patches, which no weight of the network moves."""

    unlabelled_block: ClassVar[str] = "mine"
    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"mine": UnlabelledSettings}

    def loss_passes(self, batch: Batch) -> Passes:
        passes, weight = super().loss_passes(batch), self.unlabelled_weight(self.global_step)
        if weight == 0:
            return passes
        seen = self.forward(batch.stream(), self.teacher)
        return passes.first(LossPass("mine", lambda: {"mine": Term(seen.mean(), weight)}))


def started(make_trainer: Any, settings: str = "", cls: type = Mine, **options: Any) -> Any:
    trainer = make_trainer(cls, f"seed=1 {settings}", **{"configuration": "2d"} | options)
    trainer.on_train_start()
    return trainer


def test_the_rest_of_the_fold_is_the_stream(make_trainer) -> None:
    trainer = started(make_trainer, REST)
    stream, (train, validation) = trainer.dataloader_train.data_loader, trainer.do_split()
    assert isinstance(stream, UnlabelledStream)
    assert len(stream.unlabelled.of_cases.identifiers) == 2
    assert not set(stream.unlabelled.of_cases.identifiers) & {*train, *validation}
    assert next(trainer.dataloader_train)["unlabelled"]["data"].shape[0] == trainer.batch_size == 2


@pytest.mark.parametrize("off", ["mine.unlabelled=false", "mine.unlabelled_weight=0", "mine.unlabelled_start=1"])
def test_without_use_for_them_there_is_no_stream_and_no_pool_is_asked_for(make_trainer, off: str) -> None:
    trainer = started(make_trainer, off if "false" in off else f"mine.unlabelled=true {off}")
    assert type(trainer.dataloader_train.data_loader) is nnUNetDataLoader and not trainer.has_unlabelled
    assert trainer.unlabelled_weight(5) == 0


def test_true_and_false_name_the_pool_and_nothing() -> None:
    assert [UnlabelledSettings(unlabelled=value).unlabelled for value in (True, False, "rest")] == [
        "pool",
        None,
        "rest",
    ]
    with pytest.raises(ValidationError):
        UnlabelledSettings(unlabelled="some")
    with pytest.raises(ValidationError):
        UnlabelledSettings(unlabelled_weight=True)


def test_the_training_cases_without_their_labels_are_a_control(make_trainer) -> None:
    trainer = started(make_trainer, "mine.unlabelled=labelled")
    batch = next(trainer.dataloader_train)
    assert set(batch["unlabelled"]["keys"]) <= set(trainer.do_split()[0]) and "target" not in batch["unlabelled"]


def test_the_weight_rises_after_the_start(make_trainer) -> None:
    trainer = make_trainer(Mine, f"{REST} num_epochs=10 num_iterations_per_epoch=10", "2d")  # 100 steps
    weights = [trainer.unlabelled_weight(step) for step in (0, 29, 30, 35, 40, 99)]
    assert weights == pytest.approx([0, 0, 0.5 * math.exp(-5), 0.5 * math.exp(-1.25), 0.5, 0.5])
    trainer = make_trainer(Mine, f"{REST} mine.unlabelled_start=0 mine.unlabelled_ramp=0", "2d")
    assert trainer.unlabelled_weight(0) == 0.5


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ("mine.unlabelled=rest", {}, "no training case of fold 0 is left as unlabelled: let train_cases choose some"),
        ("mine.unlabelled=rest train_cases=3", {}, r"1 unlabelled cases, and a batch takes 2: .* or set batch_size=1"),
        (
            "mine.unlabelled=pool",
            {},
            "has no unlabelled cases for 2d: run nnUNetv2_ext unlabelled -d 001 -c 2d",
        ),
    ],
)
def test_too_few_unlabelled_cases_are_refused(make_trainer, settings: str, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        started(make_trainer, settings)


def test_the_batch_size_that_the_refusal_names_is_accepted(make_trainer) -> None:
    started(make_trainer, "mine.unlabelled=rest train_cases=3 batch_size=1")


def test_a_cascade_is_refused(make_trainer, tiny) -> None:
    trainer = make_trainer(Mine, REST, CASCADE, plans=cascade(tiny.plans()))
    with pytest.raises(ValueError, match="cannot train a cascade on unlabelled cases"):
        trainer.make_train_loader(None)


# ---- the pool


@pytest.fixture
def pooled(tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TinyDataset, Path]:
    """A copy of the tiny dataset with a pool of three images, and their folder."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(tiny, name), tmp_path / "own" / name)
    dataset = TinyDataset(tmp_path / "own", tiny.dataset_id, tiny.name)
    for key, value in dataset.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)
    for number in range(3):
        add(dataset, tmp_path / "scans", number)
    return dataset, tmp_path / "scans"


def add(dataset: TinyDataset, folder: Path, number: int, **options: Any) -> None:
    """Another image into the folder, and the pool filled from it."""
    folder.mkdir(exist_ok=True)
    image = sitk.ReadImage(str(sorted(dataset.images_ts.glob("*_0000.nii.gz"))[0]))
    sitk.WriteImage(image * (1.5 + number), str(folder / f"new_{number}_0000.nii.gz"))
    fill_pool(dataset.dataset_id, "2d", "tiny", folder, say=lambda line: None, **options)


def stop_after(trainer: Any, steps: int) -> Path:
    """The latest checkpoint of a training that is stopped."""
    step, done = trainer.train_step, []

    def train_step(batch: dict) -> dict:
        done.append(step(batch))
        if len(done) == steps:
            Path(trainer.output_folder, "stop").touch()
        return done[-1]

    trainer.train_step = train_step
    with pytest.raises(SystemExit):
        trainer.run_training()
    return Path(trainer.output_folder, "checkpoint_latest.pth")


def test_a_continued_training_keeps_its_cases_and_misses_those_that_are_gone(make_trainer, pooled) -> None:
    dataset, folder = pooled
    settings = "mine.unlabelled=true mine.unlabelled_refresh=1 mine.unlabelled_start=0"
    latest = stop_after(make_trainer(Mine, f"seed=1 {settings}", "2d", dataset=dataset), 4)
    state = read(latest)[EXTENSION_KEY]["methods"]["unlabelled"]
    assert state["cases"] == ["new_0", "new_1", "new_2"] == list(state["places"]) and state["found_in"] == 1

    def again() -> Any:
        trainer = make_trainer(Mine, settings, "2d", dataset=dataset, continued=True)
        trainer.load_checkpoint(str(latest))
        trainer.on_train_start()
        return trainer

    add(dataset, folder, 3)
    trainer = again()
    assert trainer.dataloader_train.data_loader.unlabelled.of_cases.identifiers == ["new_0", "new_1", "new_2"]
    assert trainer._found_file.is_file() and trainer._found_in == 1
    cases = next((dataset.preprocessed / dataset.name).rglob("unlabelled/*/manifest.json"))
    cases.write_text(cases.read_text().replace("new_1", "old_1"))
    for file in (cases.parent / "cases").glob("new_1*"):
        file.rename(file.with_name(file.name.replace("new", "old")))
    with pytest.raises(ValueError, match="started with 3 unlabelled cases, of which new_1 is gone: put it back into"):
        again()


def test_a_pool_that_cannot_be_used_is_refused_before_the_training(make_trainer, pooled) -> None:
    dataset, folder = pooled
    with pytest.raises(ValueError, match=r"there are 3 unlabelled cases, and a batch takes 4: add cases to the pool"):
        started(make_trainer, "mine.unlabelled=pool batch_size=4", dataset=dataset)
    file = next((dataset.preprocessed / dataset.name).rglob("unlabelled/*/manifest.json"))
    good = json.loads(file.read_text())

    def refused(words: str, **changes: Any) -> None:
        file.write_text(json.dumps(good | changes))
        with pytest.raises(ValueError, match=words) as refusal:
            started(make_trainer, "mine.unlabelled=pool", dataset=dataset)
        assert "\n" not in str(refusal.value)

    # of a dataset with other intensities, whose pool was copied here
    plans = dataset.plans()
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1.0
    manager = PlansManager(plans)
    other = preprocessing_key(manager, manager.get_configuration("2d"))
    refused("was preprocessed with other plans than tiny are now: remove that folder", key=other)
    refused("was interrupted after 3 of 5 cases: run nnUNetv2_ext unlabelled -d 001 -c 2d -p tiny", wanted=5)
    refused("manifest.json is damaged .*: remove", cases=[])
    refused("has no unlabelled cases for 2d: run nnUNetv2_ext unlabelled", cases={})
    file.write_text(json.dumps(good))
    next(file.parent.glob("cases/new_1.pkl")).unlink()
    refused("lacks files of case new_1: run nnUNetv2_ext unlabelled")
    add(dataset, folder, 3)  # the remedy passes
    started(make_trainer, "mine.unlabelled=pool", dataset=dataset)


def test_other_scans_of_a_patient_who_validates_are_left_out(make_trainer, pooled) -> None:
    dataset, folder = pooled
    add(dataset, folder, 3)
    # new_1 and phantom_001, which validates, end in the same digit
    trainer = started(make_trainer, r"mine.unlabelled=true group_regex=(\d)$", dataset=dataset)
    assert trainer.held_out == ("phantom_000", "phantom_001")
    assert trainer.dataloader_train.data_loader.unlabelled.of_cases.identifiers == ["new_2", "new_3"]


# ---- where their foreground is


class Box(nn.Module):
    """Says foreground in a corner of two by three voxels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 3, *x.shape[2:])
        logits[:, 1, :2, :3] = 1
        return logits


def test_the_teacher_says_where_patches_lie_from_the_start_on(make_trainer) -> None:
    settings = "mine.unlabelled_refresh=2 mine.unlabelled_start=0.4 num_epochs=5 oversample_foreground_percent=1"
    trainer = started(make_trainer, f"{REST} {settings}")
    trainer.teacher.module = Box()
    looked = []
    for epoch in range(5):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        looked.append(trainer._found_in)
    assert looked == [None, None, 2, 2, 4]
    shape = trainer._unlabelled_dataset.load_case(trainer._unlabelled[0])[0].shape[1:]
    for voxels in trainer._places.values():
        # each slice is one tile of 24 x 24 or more; its corner repeats with the tiles
        assert len(voxels) >= 6 * shape[0] and voxels.dtype == np.int32
        assert {(y, z) for _, y, z in voxels.tolist()} >= {(y, z) for y in range(2) for z in range(3)}
    asked = trainer.dataloader_train.data_loader.unlabelled._data.load_case(trainer._unlabelled[0])[3]
    assert len(asked["class_locations"][1]) == len(trainer._places[trainer._unlabelled[0]])


def test_patches_that_cover_the_image_need_no_look(make_trainer) -> None:
    trainer = make_trainer(Mine, f"{REST} num_epochs=40", "2d")
    for median, wanted in (([24, 40], 0), ([48, 48], 4)):
        trainer.configuration_manager.configuration["median_image_size_in_voxels"] = median
        assert trainer.unlabelled_refresh == wanted
