"""The robust loss by hand, corrections and their guard, and the trainer's modes on a tiny dataset."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.loss.robust_ce_loss import RobustCrossEntropyLoss
from torch import Tensor, nn

from nnunetv2_ext.parts.soft_loss import soft_loss
from nnunetv2_ext.spatialnoise.advice import advice
from nnunetv2_ext.spatialnoise.correction import Guard, correct
from nnunetv2_ext.spatialnoise.loss import GeneralisedCrossEntropy, SymmetricCrossEntropy, robust_loss
from nnunetv2_ext.spatialnoise.settings import SpatialNoiseSettings
from nnunetv2_ext.trainers.nnUNetTrainerSpatialNoise import nnUNetTrainerSpatialNoise

CPU = torch.device("cpu")


# ---- the robust loss -------------------------------------------------------------------------------------------------
def test_the_robust_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0]], [[0.0, 0.0, 0.0]]]).movedim(-1, 1)[..., None]  # (2, 3, 1, 1)
    target = torch.tensor([0.0, 2.0]).view(2, 1, 1)
    p = [1 / (1 + math.e**2 + math.e), 1 / 3]
    loss = GeneralisedCrossEntropy(RobustCrossEntropyLoss(), 0.7)
    assert loss(logits, target).item() == pytest.approx(sum((1 - x**0.7) / 0.7 for x in p) / 2, abs=1e-6)
    ignoring = GeneralisedCrossEntropy(RobustCrossEntropyLoss(ignore_index=2), 0.7)
    assert ignoring(logits, target).item() == pytest.approx((1 - p[0] ** 0.7) / 0.7, abs=1e-6)
    binary = GeneralisedCrossEntropy(nn.BCEWithLogitsLoss(), 0.7)
    assert binary(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item() == pytest.approx((1 - 0.5**0.7) / 0.7)
    far = torch.tensor([-30.0, 30.0]).view(1, 2, 1, 1).requires_grad_()
    loss(far, torch.zeros(1, 1, 1)).backward()
    assert far.grad.abs().max() < 1e-6  # the plain cross-entropy pulls with 1


def test_the_controls_of_the_robust_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0]], [[0.0, 0.0, 0.0]]]).movedim(-1, 1)[..., None]  # (2, 3, 1, 1)
    target = torch.tensor([0.0, 2.0]).view(2, 1, 1)
    p = [1 / (1 + math.e**2 + math.e), 1 / 3]
    symmetric = [-0.1 * math.log(x) + 4 * (1 - x) for x in p]
    ln = math.log(1 + math.e**2 + math.e)  # log p = logit - ln
    smooth = [0.9 * ln + 0.1 * (3 * ln - 3) / 3, math.log(3)]
    for name, values in (("sce", symmetric), ("smoothing", smooth)):
        assert robust_loss(RobustCrossEntropyLoss(), name, 0.7)(logits, target).item() == pytest.approx(sum(values) / 2)
        ignoring = robust_loss(RobustCrossEntropyLoss(ignore_index=2), name, 0.7)
        assert ignoring(logits, target).item() == pytest.approx(values[0])
    answers = torch.tensor([2.0, 2.0]).view(1, 2, 1, 1), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]
    expected = {
        "sce": [-0.1 * math.log(x) + 4 * (1 - x) for x in p],
        "smoothing": [-0.95 * math.log(x) - 0.05 * math.log(1 - x) for x in p],
    }
    for name, values in expected.items():
        found = robust_loss(nn.BCEWithLogitsLoss(reduction="none"), name, 0.7)(*answers)  # of an ignore label
        assert found.flatten().tolist() == pytest.approx(values)
        assert robust_loss(nn.BCEWithLogitsLoss(), name, 0.7)(*answers).item() == pytest.approx(sum(values) / 2)


@pytest.mark.parametrize("name", ["gce", "sce", "smoothing"])
@pytest.mark.parametrize("regions", [False, True])
def test_no_robust_loss_pulls_at_ignored_voxels(name, regions) -> None:
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    logits = torch.randn(2, 2, 6, 6, requires_grad=True)
    if regions:
        loss = DC_and_BCE_loss({}, options, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
        target = torch.randint(0, 2, (2, 3, 6, 6)).float()
        target[:, 2] = torch.arange(6) < 3
    else:
        loss = DC_and_CE_loss(options, {}, ignore_label=2, dice_class=MemoryEfficientSoftDiceLoss)
        target = torch.randint(0, 2, (2, 1, 6, 6))
        target[..., :3] = 2
    loss.ce = robust_loss(loss.ce, name, 0.7)
    loss(logits, target).backward()
    assert (logits.grad[..., :3] == 0).all() and (logits.grad[..., 3:] != 0).all()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_a_tiny_exponent_is_nnunets_loss(regions, ignore) -> None:
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        loss = DC_and_BCE_loss({}, options, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
        target = torch.randint(0, 2, (2, 3 + ignore, 6, 6)).float()
    else:
        label = 3 if ignore else None
        loss = DC_and_CE_loss(options, {}, ignore_label=label, dice_class=MemoryEfficientSoftDiceLoss)
        target = torch.randint(0, 3 + ignore, (2, 1, 6, 6))
    logits = torch.randn(2, 3, 6, 6)
    robust = copy.deepcopy(loss)
    robust.ce = GeneralisedCrossEntropy(robust.ce, 1e-4)
    assert robust(logits, target).item() == pytest.approx(loss(logits, target).item(), abs=1e-3)
    robust.ce.q = 0.7
    assert robust(logits, target).item() < loss(logits, target).item() - 0.01


# ---- corrections -----------------------------------------------------------------------------------------------------
def logits_of(label: Tensor, classes: int = 3, confidence: float = 6.0) -> Tensor:
    return confidence * nn.functional.one_hot(label[:, 0], classes).movedim(-1, 1).float()


def halves() -> tuple[Tensor, Tensor]:
    """What a teacher is sure of: class 1 left, class 2 right; a label with two voxels of 1 where 2 should be."""
    truth = torch.ones(1, 1, 6, 8, dtype=torch.long)
    truth[..., 4:] = 2
    label = truth.clone()
    label[..., 2:4, 5] = 1
    return truth, label


@pytest.mark.parametrize("mode", ["relabel", "posterior", "spatial"])
def test_a_sure_teacher_corrects_and_an_unsure_one_does_not(mode) -> None:
    truth, label = halves()
    settings = SpatialNoiseSettings(mode=mode, warmup=0.5)
    found = correct(logits_of(truth), label, settings, None, False, (1.0, 1.0))
    corrected = found.target().argmax(1, keepdim=True)
    assert torch.equal(corrected, truth)
    torch.testing.assert_close(found.target().sum(1), torch.ones(1, 6, 8))
    assert torch.equal(found.target(0.0), found.observed)
    assert found.given_up()[label == truth].max() < 0.1 and found.given_up()[label != truth].min() > 0.5
    pointwise = SpatialNoiseSettings(mode="posterior", warmup=0.5)
    if mode == "spatial":  # a field without correlation is the pointwise posterior
        without = correct(logits_of(truth), label, settings.model_copy(update={"rho": 0.0}), None, False, (1.0, 1.0))
        assert torch.equal(without.moved, correct(logits_of(truth), label, pointwise, None, False, (1.0, 1.0)).moved)
        assert not torch.equal(without.moved, found.moved)
    unsure = correct(0.01 * logits_of(truth), label, settings, None, False, (1.0, 1.0))
    assert torch.equal(unsure.target().argmax(1, keepdim=True), label)


@pytest.mark.parametrize("mode", ["relabel", "posterior", "spatial"])
def test_an_ignored_voxel_is_not_corrected_and_does_not_count(mode) -> None:
    truth, label = halves()
    ignored = torch.where(label != truth, 3, label)
    settings = SpatialNoiseSettings(mode=mode, warmup=0.5)
    found = correct(logits_of(truth), ignored, settings, 3, False, (1.0, 3.0))
    assert torch.equal(found.valid, ignored != 3) and found.moved[:, :, 2:4, 5].abs().max() == 0
    everything = correct(logits_of(truth), torch.full_like(label, 3), settings, 3, False, (1.0, 1.0))
    held = Guard(3, 0.5, CPU).apply(everything, all_ranks=False)
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(options, {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)
    logits = torch.randn(1, 3, 6, 8, requires_grad=True)
    value = soft_loss(logits, held.target(), held.valid, loss)
    value.backward()
    assert value.isfinite() and (logits.grad == 0).all()


@pytest.mark.parametrize("mode", ["relabel", "posterior", "spatial"])
def test_of_regions_each_is_corrected_by_itself(mode) -> None:
    label = torch.zeros(1, 3, 6, 8)  # two regions and the ignore map
    label[:, 0, :, :4] = 1
    teacher = torch.where(label[:, :2] > 0, 6.0, -6.0)
    teacher[:, 1, :, 6:] = 6.0  # the second region was forgotten
    label[:, 2, 0] = 1
    found = correct(teacher, label, SpatialNoiseSettings(mode=mode, warmup=0.5), 3, True, (1.0, 1.0))
    target = found.target() > 0.5
    assert torch.equal(target[:, 0], label[:, 0] > 0)
    assert target[:, 1, 1:, 6:].all() and not target[:, 1, 0].any() and not target[:, 1, :, :6].any()


def test_a_class_that_the_teacher_never_says_keeps_its_labels() -> None:
    truth, label = halves()
    never = logits_of(torch.ones_like(truth))  # sure that everything is class 1
    guard = Guard(3, 0.5, CPU)
    found = guard.apply(correct(never, label, SpatialNoiseSettings(mode="relabel"), None, False, (1, 1)), False)
    assert torch.equal(found.target().argmax(1, keepdim=True), label)
    assert guard.shares[0, 2] == 1 and guard.shares[1, 1] > 0.5 and guard.shares[:, 0].isnan().all()
    # learnt later: the averages follow, and the few wrong voxels are corrected
    for _ in range(60):
        found = guard.apply(
            correct(logits_of(truth), label, SpatialNoiseSettings(mode="relabel"), None, False, (1, 1)), False
        )
    assert torch.equal(found.target().argmax(1, keepdim=True), truth)
    other = Guard(3, 0.5, CPU)
    other.load_state_dict(guard.state_dict())
    torch.testing.assert_close(other.shares, guard.shares, equal_nan=True)


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mode": "magic"}, "robust"),
        ({"mode": "spatial", "rho": 0.99}, "less than or equal to 0.95"),
        ({"mode": "spatial", "rho": -0.1}, "greater than or equal to 0"),
        ({"mode": "spatial", "warmup": 1}, "never starts"),
        ({"q": 0}, "greater than 0"),
        ({"ema": 0.9}, "has none"),
        ({"loss": "huber"}, "smoothing"),
        ({"loss": "sce", "mode": "relabel"}, "leave one of them out"),
        ({"loss": "smoothing", "q": 0.5}, "leave one of them out"),
    ],
)
def test_wrong_settings_are_refused_with_their_remedy(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        SpatialNoiseSettings(**wrong)
    assert SpatialNoiseSettings(mode="relabel", warmup=1).q == 0.7  # the control that equals plain nnU-Net
    smoothing = SpatialNoiseSettings(loss="smoothing")
    assert SpatialNoiseSettings(**smoothing.model_dump()) == smoothing  # as a settings file names every key


def test_a_dataset_with_two_folds_is_advised_to_audit() -> None:
    trained = SimpleNamespace(trainer="T", plans="P", configuration="2d", finished=("0", "1"))
    facts = SimpleNamespace(name="Dataset004_X", trained=(trained,))
    [found] = advice(facts)
    assert found.commands == ("nnUNetv2_ext audit $nnUNet_results/Dataset004_X/T__P__2d -o REPORT",)
    assert not advice(SimpleNamespace(name="", trained=(SimpleNamespace(finished=("0", "all")),)))


# ---- the trainer -----------------------------------------------------------------------------------------------------
def test_the_default_changes_the_cross_entropy_and_nothing_else(make_trainer, fixed_batches) -> None:
    trainer = make_trainer(nnUNetTrainerSpatialNoise)
    trainer.initialize()
    assert trainer.teacher is None and isinstance(trainer.loss.loss.ce, GeneralisedCrossEntropy)
    [batch] = fixed_batches(trainer, 1)
    batch = trainer.on_device(batch)
    robust = trainer.loss(trainer.forward(batch), batch.target)
    trainer.loss.loss.ce.q = 1e-4
    assert trainer.loss(trainer.forward(batch), batch.target) != robust
    assert trainer.loss_passes(batch).names == ("supervised",)
    control = make_trainer(nnUNetTrainerSpatialNoise, "spatialnoise.loss=sce")
    control.initialize()
    assert isinstance(control.loss.loss.ce, SymmetricCrossEntropy)


def test_the_correction_starts_after_the_warmup_and_grows(make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerSpatialNoise, "spatialnoise.mode=posterior num_iterations_per_epoch=50")
    trainer.initialize()
    steps = (0, 59, 60, 65, 70, 99)
    assert [trainer.correction_share(step) for step in steps] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert trainer.teacher_momentum(99) == pytest.approx(1 - 1 / 50)


@pytest.mark.parametrize(
    ("mode", "configuration"), [("relabel", "3d_fullres"), ("posterior", "2d"), ("spatial", "3d_fullres")]
)
def test_a_step_learns_from_the_corrected_target(make_trainer, fixed_batches, mode, configuration, tmp_path) -> None:
    trainer = make_trainer(
        nnUNetTrainerSpatialNoise,
        f"spatialnoise.mode={mode} spatialnoise.warmup=0 spatialnoise.ramp=0 spatialnoise.guard=1",
        configuration,
    )
    trainer.initialize()
    assert trainer.guard is not None
    [raw] = fixed_batches(trainer, 1)
    batch = trainer.on_device(raw)
    sure = logits_of(torch.full(batch.top_target.shape, 1))
    trainer.teacher = lambda data: sure  # says class 1 everywhere
    [only] = trainer.loss_passes(batch)
    target = trainer._correction(batch).target()
    assert (target.argmax(1) == 1).float().mean() > 0.9
    expected = soft_loss(trainer.forward(batch), target, None, trainer.loss)
    assert only.compute()["supervised"].value.item() == pytest.approx(expected.item(), abs=1e-5)
    figures = trainer.epoch_figures()
    assert figures["spatialnoise/trust"] < 0.6 and figures["spatialnoise/corrected_background"] > 0.9
    trainer.last_batch = raw
    trainer.draw_panel(tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 10_000


def test_the_guard_continues(make_trainer, fixed_batches, tmp_path: Path) -> None:
    text = "spatialnoise.mode=posterior spatialnoise.warmup=0"
    trainer, other = (make_trainer(nnUNetTrainerSpatialNoise, text) for _ in range(2))
    trainer.initialize()
    other.initialize()
    [batch] = fixed_batches(trainer, 1)
    trainer._corrected_terms(trainer.on_device(batch), 1.0)
    other.load_method_state(trainer.method_state())
    assert torch.equal(other.guard.shares, trainer.guard.shares)
    assert other._figures.read() == trainer._figures.read() != {}
