"""The photo trainer: weights at the start only, rates, frozen epochs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("segmentation_models_pytorch", reason="needs the extra photo")

from nnunetv2_ext.photo.network import SMPNetwork
from nnunetv2_ext.trainers.nnUNetTrainerPhoto import nnUNetTrainerPhoto

SMALL = "tu-mobilenetv3_small_050"
SHORT = (
    f"photo.encoder={SMALL} num_epochs=2 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1 panel_every=0 seed=1"
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    file = tmp_path / "encoder.pth"
    torch.save(SMPNetwork(1, 2, encoder=SMALL).encoder.model.state_dict(), file)
    return file


@pytest.fixture
def build(make_trainer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda settings="", **options: make_trainer(
        nnUNetTrainerPhoto, f"{SHORT} {settings}", configuration="2d", **options
    )


def encoder_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.network.encoder.model.state_dict().items() if "num_batches" not in k}


def test_the_encoder_starts_from_the_file_and_continues_without_it(build, weights: Path) -> None:
    trainer = build(f"photo.weights={weights}")
    trainer.initialize()
    theirs = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, theirs[name]) for name, value in encoder_of(trainer).items())
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    learnt = encoder_of(trainer)
    assert any(not torch.equal(value, theirs[name]) for name, value in learnt.items())
    weights.unlink()
    again = build(f"photo.weights={weights}", continued=True)
    again.load_checkpoint(str(file))
    assert all(torch.equal(value, learnt[name]) for name, value in encoder_of(again).items())


def test_without_weights_it_warns(build) -> None:
    trainer = build()
    trainer.initialize()
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert "photo.weights is not set" in log


@pytest.mark.parametrize("key", ["encoder_lr_factor", "photo.encoder_lr"])  # the latter: its name before
def test_the_encoder_has_a_rate_of_its_own(build, key: str) -> None:
    trainer = build(f"{key}=0.1 initial_lr=0.002")
    trainer.initialize()
    rates = {group.get("name"): group["lr"] for group in trainer.optimizer.param_groups}
    assert type(trainer.optimizer).__name__ == "AdamW"
    assert rates["encoder"] == pytest.approx(0.0002) and rates[None] == pytest.approx(0.002)
    trainer.lr_scheduler.step(1)
    rates = {group.get("name"): group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["encoder"] == pytest.approx(0.1 * rates[None]) and rates[None] < 0.002


def test_a_frozen_encoder_keeps_weights_and_statistics_until_it_thaws(build) -> None:
    trainer = build("freeze_encoder_epochs=1")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    before = encoder_of(trainer)
    trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.equal(value, before[name]) for name, value in encoder_of(trainer).items())
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    assert any(not torch.equal(value, before[name]) for name, value in encoder_of(trainer).items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("photo.architecture=DeepLabV3Plus", "at least 64 x 64"),
        ("photo.architecture=Nothing", "there is no network"),
        ("photo.weights=gone.pth", "is not a file"),
    ],
)
def test_refusals_are_one_line(build, settings: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        build(settings).initialize()
    assert "\n" not in str(refusal.value)


def test_one_sample_is_refused_where_a_pooled_map_is_normalised(build, tiny) -> None:
    plans = tiny.plans()
    plans["configurations"]["2d"]["patch_size"] = [64, 64]
    with pytest.raises(ValueError, match="batch_size of at least 2"):
        build("photo.architecture=DeepLabV3Plus batch_size=1", plans=plans).initialize()


def test_the_panel_shows_patches_truth_and_prediction(build, tmp_path: Path) -> None:
    trainer = build()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    trainer.draw_panel(tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 10_000 and trainer.network.training
