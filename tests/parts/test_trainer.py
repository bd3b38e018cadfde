"""nnUNetTrainerExt is plain nnU-Net where nothing is set; common settings of the parts reach every trainer."""

from __future__ import annotations

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
