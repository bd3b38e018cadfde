"""A step of each mode against a slow reference, where the teacher comes in, and what the checkpoint predicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.wtbcp.network import WaveletUNet

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = "seed=1 wtbcp.unlabelled=rest train_cases=2 wtbcp.unlabelled_start=0 wtbcp.unlabelled_ramp=0"
IGNORE = 9


def started(make_trainer: Any, settings: str = "", configuration: str = "2d") -> Any:
    keys = {pair.split("=")[0] for pair in settings.split()}
    base = " ".join(pair for pair in SMALL.split() if pair.split("=")[0] not in keys)
    trainer = make_trainer(load_trainer("nnUNetTrainerWTBCP"), f"{base} {settings}", configuration)
    trainer.enable_deep_supervision = False
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def terms(trainer: Any, batch: Batch) -> dict[str, tuple[float, float]]:
    """Value and weight of each term."""
    found = {n: (float(t.value), t.weight) for one in trainer.loss_passes(batch) for n, t in one.compute().items()}
    assert all(math.isfinite(value) for value, _ in found.values())
    return found


def nnunet_loss(trainer: Any, output: torch.Tensor, labels: torch.Tensor) -> float:
    """nnU-Net's own loss with an ignore label."""
    of_dice = {"batch_dice": trainer.configuration_manager.batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(of_dice, {}, ignore_label=IGNORE, dice_class=MemoryEfficientSoftDiceLoss)
    return float(loss(output, labels[:, None]))


def teacher_says(trainer: Any, data: torch.Tensor) -> torch.Tensor:
    return trainer.teacher(data).argmax(1)


def test_pseudo_labels_are_learnt_inside_of_the_scan(make_trainer) -> None:
    trainer = started(make_trainer, "wtbcp.largest_component=false")
    batch = trainer.on_device(next(trainer.dataloader_train))
    other = batch.stream()
    other.extra("inside")[:, :, :5] = False
    labels = torch.where(other.extra("inside")[:, 0], teacher_says(trainer, other.data), IGNORE)
    found = terms(trainer, batch)
    assert found["unlabelled"] == (
        pytest.approx(nnunet_loss(trainer, trainer.network(other.data), labels), abs=1e-5),
        0.5,
    )
    assert found["supervised"] == (float(trainer.loss(trainer.network(batch.data), batch.target)), 1)


def test_a_mean_teacher_sees_what_the_student_sees_without_its_noise(make_trainer) -> None:
    trainer = started(make_trainer, "wtbcp.mode=mean_teacher wtbcp.noise=0")
    for parameter in trainer.teacher.module.parameters():
        parameter.mul_(1.5)
    batch = trainer.on_device(next(trainer.dataloader_train))
    other, inside = batch.stream(), batch.stream().extra("inside")
    with torch.no_grad():
        squares = (trainer.network(other.data).softmax(1) - trainer.teacher(other.data).softmax(1)).square().sum(1)
    expected = float((squares * inside[:, 0]).sum() / inside.sum())
    assert expected > 1e-4 and terms(trainer, batch)["unlabelled"] == (pytest.approx(expected, rel=1e-4), 0.5)
    noisy = started(make_trainer, "wtbcp.mode=mean_teacher wtbcp.noise=0.1")
    assert terms(noisy, batch)["unlabelled"][0] > 1e-7  # student and teacher are still the same network


def slow_mix(trainer: Any, batch: Batch, data: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
    """Voxel by voxel: the box, and both halves of the batch; patch, labels of either part."""
    generator = torch.Generator().set_state(trainer.generator.get_state())
    size = batch.data.shape[2:]
    side = [round(2 / 3 * n) for n in size]
    first = [int(torch.randint(n - s + 1, (1,), generator=generator)) for n, s in zip(size, side)]
    mixed, mine, theirs = data.clone(), torch.full_like(labels, IGNORE), torch.full_like(labels, IGNORE)
    for sample in range(len(data)):
        for at in np.ndindex(*size):
            in_box = all(f <= a < f + s for a, f, s in zip(at, first, side))
            if in_box == (sample >= len(data) // 2):
                mixed[(sample, 0, *at)] = batch.data[(sample, 0, *at)]
                mine[(sample, *at)] = batch.target[(sample, 0, *at)]
            else:
                theirs[(sample, *at)] = labels[(sample, *at)]
    return mixed, mine, theirs


@pytest.mark.parametrize("mode", ["bcp", "bcp+"])
def test_copy_paste_against_a_slow_reference(make_trainer, mode: str) -> None:
    trainer = started(make_trainer, f"wtbcp.mode={mode} wtbcp.largest_component=false")
    batch = trainer.on_device(next(trainer.dataloader_train))
    other = batch.stream()
    labels = torch.where(other.extra("inside")[:, 0], teacher_says(trainer, other.data), IGNORE).to(batch.target.dtype)
    mixed, mine, theirs = slow_mix(trainer, batch, other.data, labels)
    found, output = terms(trainer, batch), trainer.network(mixed)
    name = "supervised" if mode == "bcp" else "mixed"
    assert found.pop(name) == (pytest.approx(nnunet_loss(trainer, output, mine), abs=1e-5), 1)
    assert found.pop("unlabelled") == (pytest.approx(nnunet_loss(trainer, output, theirs), abs=1e-5), 0.5)
    assert list(found) == ([] if mode == "bcp" else ["supervised"])


def test_before_the_start_labelled_patches_are_cut_into_each_other(make_trainer) -> None:
    trainer = started(make_trainer, "wtbcp.mode=bcp wtbcp.unlabelled_start=1")
    assert trainer.teacher is None
    batch = trainer.on_device(next(trainer.dataloader_train))
    other = batch.data.flip(0)
    mixed, mine, theirs = slow_mix(trainer, batch, other, batch.target[:, 0].flip(0))
    both = torch.where(mine == IGNORE, theirs, mine)
    assert terms(trainer, batch) == {
        "supervised": (pytest.approx(nnunet_loss(trainer, trainer.network(mixed), both), abs=1e-5), 1)
    }


@pytest.mark.parametrize("mode", ["pseudo", "mean_teacher", "bcp+"])
def test_before_the_start_other_modes_are_plain(make_trainer, mode: str) -> None:
    trainer = started(make_trainer, f"wtbcp.mode={mode} wtbcp.unlabelled_start=0.5")
    batch = trainer.on_device(next(trainer.dataloader_train))
    names = {step: (setattr(trainer, "global_step", step), trainer.loss_passes(batch).names)[1] for step in (2, 3)}
    assert names == {2: ("supervised",), 3: ("unlabelled", "supervised")}


@pytest.mark.parametrize("mode", ["pseudo", "bcp"])
def test_unlabelled_patches_move_the_student_and_no_gradient_the_teacher(make_trainer, mode: str) -> None:
    moved = []
    for change in (0.0, 1.0):
        trainer = started(make_trainer, f"wtbcp.mode={mode}")
        batch = next(trainer.dataloader_train)
        batch["unlabelled"]["data"] += change * torch.randn(
            batch["unlabelled"]["data"].shape, generator=trainer.generator
        )
        figures = trainer.train_step(batch)
        assert figures["unlabelled"] != 0 and all(p.grad is None for p in trainer.teacher.module.parameters())
        moved.append(torch.cat([p.detach().flatten() for p in trainer.network.parameters()]))
        shares = trainer.epoch_figures()
        assert shares["wtbcp/weight"] == 0.5 and 0 <= shares["wtbcp/foreground"] <= 1
        assert 0 <= shares.get("wtbcp/agreement", 0) <= 1
    assert not torch.equal(*moved)


def test_the_wavelet_form_trains_and_the_checkpoint_alone_predicts(make_trainer, tmp_path) -> None:
    trainer = started(make_trainer, "wtbcp.mode=wtbcp num_epochs=1")
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    figures = trainer.train_step(next(trainer.dataloader_train))
    assert set(figures) == {"loss", "supervised", "supervised_bands", "unlabelled", "consistency", "grad_norm"}
    still = {name for name, p in trainer.network.named_parameters() if torch.equal(p, before[name])}
    # nnU-Net has heads at lower resolutions, and here no deep supervision
    assert {name for name in still if ".seg_layers.0." not in name} == set()
    folder = Path(trainer.output_folder)
    trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), (0,), "checkpoint_final.pth")
    assert isinstance(predictor.network, WaveletUNet)
    image = torch.randn(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    logits = predictor.predict_logits_from_preprocessed_data(image)[:, 0]
    with torch.no_grad():
        expected = trainer.network.eval()(image)[0]
    assert torch.allclose(logits.float(), expected, atol=2e-2) and float(expected.std()) > 0.05
    with pytest.raises(ValueError, match="network"):
        export_model(folder.parent, tmp_path / "exported")


@pytest.mark.parametrize("mode", ["bcp", "wtbcp"])
def test_one_patch_cannot_be_cut_into_another(make_trainer, mode: str) -> None:
    with pytest.raises(ValueError, match=rf"wtbcp.mode={mode} cuts two patches .* set batch_size=2"):
        started(make_trainer, f"wtbcp.mode={mode} batch_size=1")
    started(make_trainer, "wtbcp.mode=pseudo batch_size=1")


def test_the_wavelet_form_without_unlabelled_weight_is_refused(make_trainer) -> None:
    with pytest.raises(ValueError, match="set another mode, or, for labelled patches alone, only"):
        started(make_trainer, "wtbcp.mode=wtbcp wtbcp.unlabelled_weight=0")
    started(make_trainer, "wtbcp.mode=wtbcp wtbcp.unlabelled_start=1")


def test_the_wavelet_form_is_not_mixed_with_other_folds(make_trainer) -> None:
    trainer = started(make_trainer, "num_epochs=1")
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    other = make_trainer(load_trainer("nnUNetTrainerWTBCP"), f"{SMALL} wtbcp.mode=wtbcp", "2d", fold=1)
    with pytest.raises(ValueError, match=r"were trained with wtbcp\.mode=pseudo"):
        other.on_train_start()


@pytest.mark.parametrize(("mode", "configuration"), [("pseudo", "2d"), ("bcp", "3d_fullres")])
def test_the_panel_shows_patches(make_trainer, tmp_path, mode: str, configuration: str) -> None:
    trainer = started(make_trainer, f"wtbcp.mode={mode}", configuration)
    trainer.train_step(next(trainer.dataloader_train))
    trainer.draw_panel(tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 10_000


def test_agreement_counts_what_either_calls_foreground(make_trainer) -> None:
    trainer = started(make_trainer)
    hot = torch.eye(3)
    labels, student = hot[[0, 1, 1, 2, 0, 2]].T[None, :, :, None], 5 * hot[[0, 1, 2, 2, 1, 2]].T[None, :, :, None]
    where = torch.tensor([True, True, True, True, True, False])[None, None, :, None]
    trainer._note_agreement(student, labels, where)
    assert trainer._figures.read() == {
        "wtbcp/foreground": pytest.approx(3 / 5),
        "wtbcp/agreement": pytest.approx(2 / 4),
    }
