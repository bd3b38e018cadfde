"""nnUNetTrainerExt is plain nnU-Net where nothing is set; common settings of the parts reach every trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pydantic import Field

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.core.resolve import resolve
from nnunetv2_ext.core.settings import CommonSettings, fields_by_key
from nnunetv2_ext.data.store import CaseStore
from nnunetv2_ext.parts.settings import HouseSettings
from nnunetv2_ext.parts.trainer import MethodTrainer
from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext
from tests.conftest import TinyDataset


def train(trainer: nnUNetTrainer) -> nnUNetTrainer:
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 3, 1
    randomness.seed_everything(5)
    trainer.run_training()
    return trainer


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_with_nothing_set_it_is_nnunet_bit_for_bit(make_trainer, no_pictures, monkeypatch, configuration):
    upstream = nnUNetTrainer.get_training_transforms

    def by_no_clock(*args, **kwargs):
        transforms = upstream(*args, **kwargs)
        randomness.make_repeatable(transforms)
        return transforms

    monkeypatch.setattr(nnUNetTrainer, "get_training_transforms", staticmethod(by_no_clock))
    plain, ours = (train(make_trainer(cls, configuration=configuration)) for cls in (nnUNetTrainer, nnUNetTrainerExt))
    assert ours.settings.seed is None
    weights, same = plain.network.state_dict(), ours.network.state_dict()
    assert list(weights) == list(same)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    for key in ("train_losses", "val_losses", "mean_fg_dice", "dice_per_class_or_region", "ema_fg_dice", "lrs"):
        assert plain.logger.get_value(key, None) == ours.logger.get_value(key, None), key
    assert plain.plans_manager.plans.keys() | {"nnunetv2_ext"} == ours.plans_manager.plans.keys()
    saved = torch.load(Path(ours.output_folder) / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert list(saved) == list(weights)


def test_one_number_needs_no_class(make_trainer):
    trainer = make_trainer(nnUNetTrainerExt, "num_epochs=7 initial_lr=0.005 batch_size=3 mirroring=false")
    assert (trainer.num_epochs, trainer.initial_lr, trainer.configuration_manager.batch_size) == (7, 0.005, 3)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] is None


@pytest.mark.parametrize("name", sorted(installed_trainers()))
def test_every_trainer_takes_the_keys_of_the_house(name):
    cls = load_trainer(name)
    assert issubclass(cls, MethodTrainer)
    assert issubclass(cls.settings_model(), HouseSettings)
    assert [key for key in fields_by_key(cls.settings_model()) if "." not in key] == list(HouseSettings.model_fields)


class FewerSettings(CommonSettings):
    few: int = Field(1, ge=0, description="of a base without the house")


class MoreSettings(HouseSettings):
    more: int = Field(2, ge=0, description="of a method that offers a key of its own to all")


class More(MethodTrainer):
    common_settings: ClassVar = MoreSettings


class Few(MethodTrainer):
    common_settings: ClassVar = FewerSettings


def test_the_most_derived_common_settings_count_whatever_the_order_of_the_bases():
    class MoreFirst(More, nnUNetTrainerMedContext): ...

    class MoreLast(nnUNetTrainerMedContext, More): ...

    class Both(Few, More): ...

    for cls in (MoreFirst, MoreLast):
        assert resolve(cls.settings_model(), environment="more=5 medcontext.beta=0").settings.more == 5
    both = resolve(Both.settings_model(), environment="more=5 few=4").settings
    assert (both.more, both.few) == (5, 4)
    assert isinstance(both, HouseSettings)
    with pytest.raises(ValueError, match="more"):
        resolve(nnUNetTrainerMedContext.settings_model(), environment="more=5")


# ---- state per case


class Counting(MethodTrainer):
    """Counts how often each voxel of a case was in a step, and how often the case was."""

    dies_at: int | None = None

    def initialize(self) -> None:
        super().initialize()
        self.case_store = CaseStore(Path(self.output_folder) / "case_state", lambda case: (1, 4, 4, 4))

    def train_step(self, batch: dict) -> dict:
        if self.global_step == self.dies_at:
            raise KeyboardInterrupt  # as good as kill -9: nothing is saved
        return super().train_step(batch)

    def after_step(self) -> None:
        super().after_step()
        for case in map(str, self.last_batch["keys"]):
            box = np.array([[0, 4], [0, 4], [0, 1 + self.global_step % 4]])
            before = self.case_store.read(case, box)
            self.case_store.update(case, box, np.ones((1, 4, 4, box[2, 1])) + (0 if before is None else before))


def counted(trainer: Counting) -> dict[str, list[float]]:
    return {case: trainer.case_store.read(case).ravel().tolist() for case in trainer.case_store.cases()}


@pytest.mark.parametrize("dies_at", [4, 5, 7])
def test_a_killed_training_goes_on_with_the_state_that_its_checkpoint_knew(
    make_trainer, no_pictures, tmp_path, dies_at
):
    length = "seed=2 num_epochs=3 save_every=1 num_iterations_per_epoch=3"
    unbroken = make_trainer(Counting, length, configuration="2d", results=tmp_path / "unbroken")
    unbroken.run_training()
    trainer = make_trainer(Counting, length, configuration="2d")
    trainer.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    at_death = counted(trainer)
    again = make_trainer(Counting, length, configuration="2d", continued=True)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    again.run_training()
    assert counted(again) == counted(unbroken) != at_death
    files = [p.name for p in (Path(again.output_folder) / "case_state").iterdir()]
    assert len(files) == len(counted(again)) and all(name.endswith(".npy") for name in files)


def test_the_best_checkpoint_drops_no_state_that_the_latest_needs(make_trainer, no_pictures):
    settings = "num_epochs=9 num_iterations_per_epoch=1"
    trainer = make_trainer(Counting, settings, configuration="2d")
    trainer.on_train_start()
    folder = Path(trainer.output_folder)

    def step_and_save(name: str) -> dict[str, list[float]]:
        trainer.train_step(next(trainer.dataloader_train))
        trainer.save_checkpoint(str(folder / name))
        return counted(trainer)

    step_and_save("checkpoint_best.pth")
    latest = step_and_save("checkpoint_latest.pth")
    for _ in range(3):
        assert step_and_save("checkpoint_best.pth") != latest
    again = make_trainer(Counting, settings, configuration="2d", continued=True)
    again.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    again.on_train_start()
    assert counted(again) == latest


def test_a_new_training_starts_without_state_and_without_checkpoints_none_is_sealed(make_trainer, no_pictures):
    one = make_trainer(Counting, "num_epochs=1", configuration="2d")
    one.run_training()
    folder = Path(one.output_folder)
    other = make_trainer(Counting, "num_epochs=1", configuration="2d")
    other.disable_checkpointing = True
    other.on_train_start()
    assert counted(other) == {} and (folder / "previous_case_state").is_dir()
    other.train_step(next(other.dataloader_train))
    other.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert counted(other) and not list((folder / "case_state").glob("*.npy"))


def test_kept_checkpoints_drop_no_state_that_continuing_needs(make_trainer, no_pictures):
    settings = "seed=2 num_epochs=6 num_iterations_per_epoch=2 save_every=4 keep_every=1"
    trainer = make_trainer(Counting, settings, configuration="2d")
    trainer.dies_at = 11  # in the last epoch; checkpoint_latest is of epoch 4, kept ones are of each
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    again = make_trainer(Counting, settings, configuration="2d", continued=True)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert again.global_step == 8
    again.on_train_start()
    assert sum(value[0] for value in counted(again).values()) == 8 * 2, "two samples a step"


def test_the_weights_of_before_a_nan_find_the_state_of_their_epochs_start(make_trainer, no_pictures):
    settings = "seed=2 num_epochs=3 num_iterations_per_epoch=3 save_every=1"
    trainer = make_trainer(Counting, settings, configuration="2d")

    class Broken(torch.nn.Module):
        def forward(self, output, target):
            return output[0].sum() * float("nan")

    original = trainer.on_train_epoch_start

    def break_later() -> None:
        original()
        if trainer.current_epoch == 1:
            step = trainer.train_step
            trainer.train_step = lambda batch: (
                setattr(trainer, "loss", Broken()) if trainer.global_step == 4 else None,
                step(batch),
            )[1]

    trainer.on_train_epoch_start = break_later
    with pytest.raises(ValueError, match="not finite"):
        trainer.run_training()
    folder = Path(trainer.output_folder)
    (folder / "checkpoint_before_nan.pth").replace(folder / "checkpoint_latest.pth")
    again = make_trainer(Counting, settings, configuration="2d", continued=True)
    again.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert again.global_step == 3
    again.on_train_start()
    assert sum(value[0] for value in counted(again).values()) == 3 * 2


def test_the_store_reads_the_shape_of_a_case_once(make_trainer, monkeypatch):
    trainer = make_trainer(MethodTrainer, configuration="2d")
    trainer.initialize()
    store = trainer.new_case_store(channels=(2,))
    case = trainer.do_split()[0][0]
    reads = []
    original = trainer.dataset_class.load_case
    monkeypatch.setattr(trainer.dataset_class, "load_case", lambda self, c: reads.append(c) or original(self, c))
    box = np.array([[0, 1], [0, 4], [0, 4]])
    for _ in range(3):
        store.update(case, box, np.ones((2, 1, 4, 4)))
    assert reads == [case] and store.read(case).shape[0] == 2


# ---- subjects


def test_a_split_that_is_missing_keeps_subjects_whole(make_trainer, tiny, tmp_path, capsys):
    dataset = TinyDataset(tmp_path, tiny.dataset_id, tiny.name)
    for part in ("raw", "preprocessed"):
        shutil.copytree(getattr(tiny, part), getattr(dataset, part))
    splits = dataset.preprocessed / dataset.name / "splits_final.json"
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (dataset.raw / dataset.name / "labelsTr").iterdir())

    def folds(settings: str = "") -> tuple[list[str], list[str]]:
        trainer = make_trainer(nnUNetTrainerExt, settings, configuration="2d", dataset=dataset)
        trainer.initialize()
        return trainer.do_split()

    pair = {cases[0]: "a", cases[1]: "a"}
    plan = json.loads((dataset.preprocessed / dataset.name / "dataset.json").read_text())
    recorded = plan | {"nnunetv2_ext": {"subjects": {case: pair.get(case, case) for case in cases}}}
    (dataset.preprocessed / dataset.name / "dataset.json").write_text(json.dumps(recorded))
    folds()
    assert "cases in training and validation" not in capsys.readouterr().out, "fold 0 holds both of the subject"
    splits.write_text(json.dumps([{"train": cases[1:], "val": cases[:1]}]))
    folds()
    assert "WARNING: 1 subjects, e.g. a, have cases in training and validation: delete" in capsys.readouterr().out
    splits.unlink()
    train, validation = folds()
    assert splits.is_file() and sorted(train + validation) == cases
    assert (cases[0] in train) == (cases[1] in train)
    splits.unlink()
    (dataset.preprocessed / dataset.name / "dataset.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="group_regex"):
        folds("group_regex=nobody")
    assert not splits.exists()
