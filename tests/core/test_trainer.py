"""ExtTrainer against plain nnUNetTrainer: identical with nothing added; what it refuses; what survives pickling."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, save_pickle
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pydantic import BaseModel, ConfigDict, Field

from nnunetv2_ext.core import files, randomness
from nnunetv2_ext.core import trainer as trainer_module
from nnunetv2_ext.core.outside import methods
from nnunetv2_ext.core.settings import STRUCTURAL
from nnunetv2_ext.core.step import LossPass, Term
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.core.trainer_settings import method_settings_in
from nnunetv2_ext.medcontext.settings import MedContextSettings
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

CPU = torch.device("cpu")


class PlainWithoutDeepSupervision(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=CPU) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False


class OursWithoutDeepSupervision(ExtTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=CPU) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False


class PlainSeeded(nnUNetTrainer):
    """nnU-Net at the tests' length, seeded where ours is, without the choice its augmentation makes by the clock."""

    def __init__(self, plans, configuration, fold, dataset_json, device=CPU) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1

    def initialize(self) -> None:
        randomness.seed_everything(11)
        super().initialize()

    @staticmethod
    def get_training_transforms(*args, **kwargs):
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        randomness.make_repeatable(transforms)
        return transforms


def same_weights(a: nnUNetTrainer, b: nnUNetTrainer) -> bool:
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---- identical to nnU-Net with nothing added


@pytest.mark.parametrize(
    ("configuration", "plain_class", "our_class"),
    [
        ("2d", nnUNetTrainer, ExtTrainer),
        ("3d_fullres", nnUNetTrainer, ExtTrainer),
        ("3d_fullres", PlainWithoutDeepSupervision, OursWithoutDeepSupervision),
    ],
)
def test_a_single_pass_gives_the_weights_of_plain_nnunet_bit_for_bit(
    make_trainer, fixed_batches, configuration, plain_class, our_class
):
    trainers, losses = [], []
    for cls in (plain_class, our_class):
        trainer = make_trainer(cls, configuration=configuration)
        randomness.seed_everything(3)
        trainer.initialize()
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        losses.append([trainer.train_step(batch)["loss"] for batch in fixed_batches(trainer, 5)])
        trainers.append(trainer)
    assert losses[0] == losses[1]
    assert same_weights(*trainers)


def test_a_whole_training_through_the_loader_equals_plain_nnunet_bit_for_bit(make_trainer, no_pictures):
    plain = make_trainer(PlainSeeded, configuration="2d")
    plain.run_training()
    ours = make_trainer(ExtTrainer, "num_epochs=2 num_iterations_per_epoch=3 seed=11", configuration="2d")
    ours.run_training()
    assert same_weights(plain, ours)
    for key in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs"):
        assert plain.logger.get_value(key, None) == ours.logger.get_value(key, None), key
    assert len(ours.logger.get_value("lrs", None)) == 2
    assert sorted(p.name for p in Path(ours.output_folder).glob("*.pth")) == [
        "checkpoint_best.pth",
        "checkpoint_final.pth",
    ]


def test_nnunet_s_progress_png_and_our_files_are_written(make_trainer):
    trainer = make_trainer(ExtTrainer, "num_epochs=1 num_iterations_per_epoch=1", configuration="2d")
    trainer.run_training()
    folder = Path(trainer.output_folder)
    for name in ("progress.png", "progress_ext.png", "epochs.csv", "nnunetv2_ext_settings.yaml"):
        assert (folder / name).stat().st_size > 0, name
    block = json.loads((folder.parent / "plans.json").read_text())["nnunetv2_ext"]
    assert block["num_epochs"] == 1


def test_settings_reach_what_nnunet_uses(make_trainer):
    text = "initial_lr=0.02 weight_decay=1e-4 batch_size=3 oversample_foreground_percent=1.0 save_every=7"
    trainer = make_trainer(ExtTrainer, text, configuration="2d")
    trainer.initialize()
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.02, 1e-4)
    assert (trainer.batch_size, trainer.oversample_foreground_percent, trainer.save_every) == (3, 1.0, 7)
    loader = trainer.get_dataloaders()[0]
    assert next(loader)["data"].shape[0] == 3


@pytest.mark.parametrize("mirroring", [True, False])
def test_without_mirroring_no_patch_and_no_prediction_is_mirrored(make_trainer, monkeypatch, mirroring):
    trainer = make_trainer(ExtTrainer, f"mirroring={str(mirroring).lower()}", configuration="2d")
    trainer.initialize()
    seen = []
    original = trainer.get_training_transforms

    def spied(patch_size, rotation, scales, mirror_axes, *args, **kwargs):
        seen.append(mirror_axes)
        return original(patch_size, rotation, scales, mirror_axes, *args, **kwargs)

    monkeypatch.setattr(trainer, "get_training_transforms", spied)
    trainer.on_train_start()
    assert seen == [(0, 1) if mirroring else None]
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    stored = torch.load(path, weights_only=False)["inference_allowed_mirroring_axes"]
    assert stored == ((0, 1) if mirroring else None)


def test_the_methods_generator_leaves_the_augmentation_stream_alone(make_trainer, no_pictures):
    seen = {}
    for name, settings in (("all", ""), ("half", "medcontext.masked_fraction=0.5 medcontext.fill=noise")):
        trainer = make_trainer(nnUNetTrainerMedContext, f"seed=4 {settings}", configuration="2d")
        step, seen[name] = trainer.train_step, []
        trainer.train_step = lambda batch, s=step, n=name: (seen[n].append(batch["data"].clone()), s(batch))[1]
        trainer.run_training()
    assert len(seen["all"]) == 6 and all(torch.equal(a, b) for a, b in zip(seen["all"], seen["half"]))


@pytest.mark.parametrize(("settings", "by_the_clock"), [("seed=1", False), ("", True)])
def test_a_seed_takes_the_clock_out_of_the_augmentation_and_nothing_else_does(make_trainer, settings, by_the_clock):
    trainer = make_trainer(ExtTrainer, settings, configuration="2d")
    trainer.initialize()
    chain = trainer.get_dataloaders()[0].data_loader.transforms.transforms
    inner = [getattr(transform, "transform", transform) for transform in chain]  # applied with a probability
    blurs = [transform for transform in inner if isinstance(transform, GaussianBlurTransform)]
    assert [blur.benchmark for blur in blurs] == [by_the_clock]


# ---- a method that fails where only its log or picture is concerned


class BrokenPicture(ExtTrainer):
    def draw_panel(self, path: Path) -> None:
        np.random.rand(), torch.rand(1), random.random(), torch.rand(1, generator=self.generator)
        raise RuntimeError("out of memory")


def test_a_picture_that_fails_ends_no_training_and_changes_no_random_number(make_trainer, no_pictures, tmp_path):
    quiet = make_trainer(ExtTrainer, "seed=1", configuration="2d", results=tmp_path / "quiet")
    quiet.run_training()
    trainer = make_trainer(BrokenPicture, "seed=1 panel_every=1", configuration="2d")
    trainer.run_training()
    log = Path(trainer.log_file).read_text()
    for epoch in (0, 1):
        assert f"WARNING: the picture of epoch {epoch} could not be drawn: RuntimeError: out of memory" in log
    assert same_weights(trainer, quiet)
    assert torch.equal(trainer.generator.get_state(), quiet.generator.get_state())


class BrokenFigures(ExtTrainer):
    def epoch_figures(self) -> dict[str, float]:
        raise RuntimeError("out of memory")


def test_figures_that_fail_end_no_training_and_cost_no_other_column(make_trainer, no_pictures):
    trainer = make_trainer(BrokenFigures, "seed=1", configuration="2d")
    trainer.run_training()
    warning = "WARNING: the method's figures could not be taken: RuntimeError: out of memory"
    assert Path(trainer.log_file).read_text().count(warning) == 2
    with open(Path(trainer.output_folder) / "epochs.csv", newline="") as lines:
        losses = [float(row["loss/supervised"]) for row in csv.DictReader(lines)]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()


# ---- not a number


def test_a_nan_loss_stops_with_term_cases_and_the_weights_before(make_trainer, fixed_batches):
    trainer = make_trainer(nnUNetTrainerMedContext, "seed=1", configuration="2d")
    trainer.initialize()
    good, bad = fixed_batches(trainer, 2)
    trainer.train_step(good)
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    bad["data"][1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError) as caught:
        trainer.train_step(bad)
    text = str(caught.value)
    assert "\n" not in text and "supervised=nan" in text and "step 1" in text
    assert "cases case_a, case_b (NaN or infinite intensities in case_b)" in text
    path = Path(trainer.output_folder) / "checkpoint_before_nan.pth"
    assert str(path) in text and text in Path(trainer.log_file).read_text()
    again = make_trainer(nnUNetTrainerMedContext, "seed=1", configuration="2d", continued=True)
    again.load_checkpoint(str(path))
    for loaded in (trainer.network.state_dict(), again.network.state_dict()):
        assert all(torch.equal(before[key], loaded[key]) for key in before)
    assert again.global_step == again.current_epoch == 0  # the epoch starts again


def test_the_weights_before_a_nan_belong_to_the_beginning_of_its_epoch(make_trainer):
    """Steps are not epochs times steps per epoch: that number may change on ``--c``."""
    trainer = make_trainer(ExtTrainer, "seed=1 num_epochs=2 num_iterations_per_epoch=3", configuration="2d")
    trainer.global_step, step = 10, trainer.train_step

    def break_the_fifth(batch):
        if trainer.global_step == 14:
            batch["data"][:] = float("nan")
        return step(batch)

    trainer.train_step = break_the_fifth
    with pytest.raises(ValueError, match="at epoch 1, step 14"):
        trainer.run_training()
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_before_nan.pth", weights_only=False)
    assert (checkpoint["current_epoch"], checkpoint["nnunetv2_ext"]["global_step"]) == (1, 13)


class WatchesBroken(ExtTrainer):
    """Logs a term that is not a number and learns nothing from it."""

    def loss_passes(self, batch):
        watched = LossPass("watched", lambda: {"watched": Term(torch.tensor(float("nan")), 0)})
        return [watched, *super().loss_passes(batch)]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_nan_that_nothing_learns_from_stops_no_training(make_trainer, fixed_batches, scaled):
    trainer = make_trainer(WatchesBroken, "seed=1", configuration="2d")
    trainer.initialize()
    if scaled:
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1)
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    for batch in fixed_batches(trainer, trainer_module.MAX_NONFINITE_UNDER_AMP + 2):
        assert np.isnan(trainer.train_step(batch)["watched"])
    assert any(not torch.equal(before[key], value) for key, value in trainer.network.state_dict().items())
    assert "WARNING" not in Path(trainer.log_file).read_text()


class BrokenGradient(ExtTrainer):
    def loss_passes(self, batch):
        def pathological() -> dict[str, Term]:
            weight = next(self.network.parameters())
            return {"pathological": Term((weight * 0).sum().sqrt())}  # value 0, gradient 0 * inf

        return [LossPass("pathological", pathological), *super().loss_passes(batch)]


def test_a_nan_gradient_of_a_finite_loss_stops_before_the_weights_are_lost(make_trainer, fixed_batches):
    trainer = make_trainer(BrokenGradient, "seed=1", configuration="2d")
    trainer.initialize()
    before = [p.detach().clone() for p in trainer.network.parameters()]
    with pytest.raises(ValueError, match="not finite: grad_norm=nan"):
        trainer.train_step(fixed_batches(trainer, 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))


def break_loss(trainer: ExtTrainer) -> dict[str, float]:
    """Lets a test multiply the loss by what it puts under ``is``."""
    factor, stock = {"is": 1.0}, trainer.loss
    trainer.loss = lambda output, target: stock(output, target) * factor["is"]
    return factor


def test_under_amp_single_bad_steps_pass_and_a_series_does_not(make_trainer, fixed_batches, monkeypatch):
    monkeypatch.setattr(trainer_module, "MAX_NONFINITE_UNDER_AMP", 2)
    trainer = make_trainer(ExtTrainer, "seed=1", configuration="2d")
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    (batch,) = fixed_batches(trainer, 1)
    factor = break_loss(trainer)
    for factor["is"] in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        trainer.train_step(batch)
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())
    assert "WARNING: step skipped, not finite: supervised=nan" in Path(trainer.log_file).read_text()
    with pytest.raises(ValueError, match="supervised=nan, grad_norm=nan at epoch 0, step 5"):
        trainer.train_step(batch)


def test_under_amp_nan_in_the_image_stops_at_once(make_trainer, fixed_batches):
    """Skipping it would halve the scale each time the case is drawn, until the scale is 0 and lets a NaN through."""
    trainer = make_trainer(ExtTrainer, "seed=1", configuration="2d")
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    (bad,) = fixed_batches(trainer, 1)
    bad["data"][0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"infinite intensities in case_a\)"):
        trainer.train_step(bad)


def test_under_amp_a_collapsed_scale_stops_before_it_is_zero(make_trainer, fixed_batches):
    trainer = make_trainer(ExtTrainer, "seed=1", configuration="2d")
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=trainer_module.MIN_SCALE)
    (batch,) = fixed_batches(trainer, 1)
    factor = break_loss(trainer)
    trainer.train_step(batch)
    factor["is"] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        trainer.train_step(batch)
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_without_checkpoints_the_message_promises_none(make_trainer, fixed_batches):
    trainer = make_trainer(ExtTrainer, "seed=1", configuration="2d")
    trainer.initialize()
    trainer.disable_checkpointing = True
    (bad,) = fixed_batches(trainer, 1)
    bad["data"][:] = float("nan")
    with pytest.raises(ValueError, match="no checkpoint was written"):
        trainer.train_step(bad)
    assert not list(Path(trainer.output_folder).glob("*.pth"))


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """The tiny dataset with other entries in dataset.json."""

    original: object
    changes: dict

    def __getattr__(self, name: str):
        return getattr(self.original, name)

    def dataset_json(self) -> dict:
        return self.original.dataset_json() | self.changes


def test_a_batch_of_ignored_voxels_has_a_finite_loss_and_leaves_finite_weights(tiny, make_trainer, fixed_batches):
    labels = tiny.dataset_json()["labels"]
    dataset = Relabelled(tiny, {"labels": labels | {"ignore": len(labels)}})
    trainer = make_trainer(nnUNetTrainerMedContext, "seed=1 medcontext.ramp_fraction=0", dataset=dataset)
    trainer.initialize()
    assert trainer.label_manager.ignore_label == 3
    ignored, mixed = fixed_batches(trainer, 2, labels=4)
    for target in ignored["target"]:
        target.fill_(3)
    for batch in (ignored, mixed, ignored):
        figures = trainer.train_step(batch)
        assert all(np.isfinite(value) for value in figures.values()), figures
    assert figures["consistency"] == 0  # nothing to agree on
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


@pytest.mark.parametrize(
    ("losses", "diverges"),
    [([1.5, 0.3, -0.6], False), ([1.5, 14.9], False), ([1.5, 15.1], True), ([-0.8, 9.9], False), ([-0.8, 5e4], True)],
)
def test_a_loss_that_explodes_and_stays_finite_is_warned_of(make_trainer, losses, diverges):
    trainer = make_trainer(ExtTrainer, "seed=1", configuration="2d")
    for trainer.current_epoch, loss in enumerate(losses):
        step = {"loss": np.float32(loss), "supervised": np.float32(loss), "grad_norm": np.float32(1)}
        trainer.on_train_epoch_end([step, step])
    text = Path(trainer.log_file).read_text()
    assert ("diverges; stop it and start again with a lower initial_lr" in text) == diverges


# ---- what is refused


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_results_folder_the_variable_is_named(make_trainer, monkeypatch, value):
    trainer = make_trainer(ExtTrainer, configuration="2d")
    monkeypatch.setenv("nnUNet_results", "") if value == "" else monkeypatch.delenv("nnUNet_results")
    with pytest.raises(ValueError, match=r"nnUNet_results is not set.*export nnUNet_results=FOLDER"):
        ExtTrainer(trainer.plans_manager.plans, "2d", 0, trainer.dataset_json, CPU)


def test_a_file_in_the_place_of_the_output_folder(make_trainer, tiny, tmp_path):
    name = tmp_path / "results" / tiny.name / "ExtTrainer__tiny__2d"
    name.mkdir(parents=True)
    (name / "fold_0").write_text("")
    with pytest.raises(ValueError, match="results folder cannot be written") as caught:
        make_trainer(ExtTrainer, configuration="2d")
    assert "fold_0" in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(name)
    name.write_text("")
    with pytest.raises(ValueError, match="results folder cannot be written"):
        make_trainer(ExtTrainer, configuration="2d")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ((os, "fsync"), OSError(errno.ENOSPC, "No space left on device"), "no space is left or the quota is used up"),
        ((files, "open"), OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
    ],
)
def test_a_disk_that_takes_no_file_stops_before_the_training(make_trainer, monkeypatch, call, error, said):
    """The folder itself is there, from an earlier training."""
    folder = make_trainer(ExtTrainer, configuration="2d").output_folder

    def refuse(*args):
        raise error

    monkeypatch.setattr(*call, refuse, raising=False)
    with pytest.raises(ValueError, match=said) as caught:
        make_trainer(ExtTrainer, configuration="2d")
    assert folder in str(caught.value) and "\n" not in str(caught.value)


def test_a_dataset_without_foreground_label(make_trainer, tiny):
    with pytest.raises(ValueError, match="declares no foreground label"):
        make_trainer(ExtTrainer, dataset=Relabelled(tiny, {"labels": {"background": 0}}))


def test_training_cases_without_a_foreground_voxel(make_trainer, tiny, tmp_path):
    copy = dataclasses.replace(tiny, root=tmp_path / "copy")
    folder = copy.preprocessed / tiny.name
    shutil.copytree(tiny.preprocessed / tiny.name, folder)
    identifier = tiny.plans()["configurations"]["2d"]["data_identifier"]
    train = json.loads((folder / "splits_final.json").read_text())[0]["train"]
    for number, case in enumerate(train):
        properties = load_pickle(str(folder / identifier / f"{case}.pkl"))
        locations = properties["class_locations"]
        for label in locations:
            if number or label != 2:  # the first case keeps one organ for now
                locations[label] = []
        save_pickle(properties, str(folder / identifier / f"{case}.pkl"))
    trainer = make_trainer(ExtTrainer, configuration="2d", dataset=copy)
    trainer.get_tr_and_val_datasets()
    locations = load_pickle(path := str(folder / identifier / f"{train[0]}.pkl"))
    locations["class_locations"][2] = []
    save_pickle(locations, path)
    with pytest.raises(ValueError, match="none of the 4 training cases of fold 0 has a foreground voxel"):
        trainer.get_tr_and_val_datasets()


@pytest.mark.parametrize(("found", "said"), [("2.7.1", "nnunetv2 2.7.1 is not supported"), (None, "is not installed")])
def test_an_unsupported_nnunet(make_trainer, monkeypatch, found, said):
    monkeypatch.setattr("nnunetv2_ext.core.compat.nnunet_version", lambda: found)
    with pytest.raises(ValueError, match=said):
        make_trainer(ExtTrainer)


def test_wrong_settings_stop_before_anything_is_written(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'num_epoch'"):
        make_trainer(ExtTrainer, "num_epoch=3")
    assert not (tmp_path / "results").exists()


class ShapeSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    width: float = Field(1e-05, description="changes the network", json_schema_extra=STRUCTURAL)
    speed: int = Field(1, description="does not")


class ShapeTrainer(ExtTrainer):
    method_settings: ClassVar = {"shape": ShapeSettings}


def test_folds_of_one_model_folder_agree_on_the_network(make_trainer, no_pictures):
    length = "num_epochs=1 num_iterations_per_epoch=1"
    make_trainer(ShapeTrainer, length, configuration="2d").run_training()
    with pytest.raises(ValueError) as caught:
        make_trainer(ShapeTrainer, f"{length} shape.width=0.5", configuration="2d", fold=1).run_training()
    text = str(caught.value)
    assert "fold_0" in text and "shape.width=1e-05" in text and "shape.width=0.5" in text and "\n" not in text
    # the same fold may start anew with another network, and another fold with another speed
    make_trainer(ShapeTrainer, f"{length} shape.speed=3", configuration="2d", fold=1).run_training()


def test_a_method_finds_its_settings_in_the_plans_of_a_model_folder_only() -> None:
    plans = {"nnunetv2_ext": {"num_epochs": 3, "medcontext": {"mask_ratio": 0.25}}}
    assert method_settings_in(plans, "medcontext", MedContextSettings).mask_ratio == 0.25
    for without in ({}, {"nnunetv2_ext": {"num_epochs": 3}}):
        with pytest.raises(ValueError, match=r"no block 'nnunetv2_ext' with the settings of 'medcontext'.*plans\.json"):
            method_settings_in(without, "medcontext", MedContextSettings)


class Wandb:
    """As much of the wandb module as nnU-Net uses."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.step, self.logged, self.fails = 0, {}, False

    def init(self, **options: Any) -> Wandb:
        return self

    def log(self, figures: dict[str, Any], step: int) -> None:
        if self.fails and "loss/supervised" in figures:
            raise ConnectionError("no route to host")
        self.logged.setdefault(step, {}).update(figures)


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.wandb", fake)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    return fake


def test_weights_and_biases_gets_every_named_figure_that_the_table_has(make_trainer, no_pictures, wandb):
    trainer = make_trainer(nnUNetTrainerMedContext, "num_iterations_per_epoch=1", configuration="2d")
    trainer.run_training()
    with (Path(trainer.output_folder) / "epochs.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = {name for name in rows[0] if name.partition("/")[0] in ("loss", "medcontext")} | {"grad_norm"}
    assert {"loss/supervised", "loss/consistency", "medcontext/momentum"} <= ours and len(rows) == 2
    for epoch, row in enumerate(rows):
        told = wandb.logged[epoch]
        assert {name: told[name] for name in ours} == {name: float(row[name]) for name in ours}
        assert "train_losses" in told, "nnU-Net's own are there as before"


def test_weights_and_biases_that_fails_with_our_figures_stops_no_training(make_trainer, no_pictures, wandb, capsys):
    wandb.fails = True
    trainer = make_trainer(ExtTrainer, "num_iterations_per_epoch=1", configuration="2d")
    trainer.run_training()
    assert trainer.current_epoch == 2
    assert capsys.readouterr().out.count("not logged elsewhere any more (ConnectionError: no route to host)") == 1


def test_a_new_training_asks_once_to_cite_the_papers_of_its_methods(make_trainer, no_pictures, capsys, tmp_path):
    asked = "Please cite, besides nnU-Net, when using nnUNetTrainerMedContext:\n"
    asked += f"{methods()['medcontext'].citation}\n####"
    trainer = make_trainer(nnUNetTrainerMedContext, "num_epochs=1 num_iterations_per_epoch=1", configuration="2d")
    trainer.run_training()
    assert capsys.readouterr().out.count(asked) == 1
    assert Path(trainer.log_file).read_text().count(asked) == 1
    again = make_trainer(nnUNetTrainerMedContext, "num_epochs=2 num_iterations_per_epoch=1", "2d", continued=True)
    again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    again.run_training()
    assert again.current_epoch == 2 and "besides nnU-Net" not in capsys.readouterr().out
    second = make_trainer(nnUNetTrainerMedContext, configuration="2d", results=tmp_path / "second")
    second.local_rank = 1
    second.on_train_start()
    plain = make_trainer(ExtTrainer, configuration="2d", results=tmp_path / "plain")
    plain.on_train_start()
    assert "besides nnU-Net" not in capsys.readouterr().out
