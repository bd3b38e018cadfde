"""The look at one sample: right figures, and nothing of the training changed by it."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.medcontext.diagnosis import diagnose, diagnose_unlabelled
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

BATCH_NORM = "torch.nn.modules.batchnorm.BatchNorm3d"


def loaded(make_trainer, settings: str = "", steps: int = 3, **options):
    """A trainer after some steps on real batches, and one of these batches."""
    trainer = make_trainer(nnUNetTrainerMedContext, f"seed=1 num_epochs=10 {settings}", **options)
    trainer.on_train_start()
    for _ in range(steps):
        trainer.train_step(next(trainer.dataloader_train))
    return trainer, Batch.from_loader(trainer.last_batch, trainer.device)


def gradient_norm(loss: torch.Tensor, network: torch.nn.Module) -> float:
    network.zero_grad()
    loss.backward(retain_graph=True)
    return math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in network.parameters() if p.grad is not None))


def test_the_gradient_ratio_equals_an_independent_computation(make_trainer):
    trainer, batch = loaded(make_trainer, "medcontext.ramp_fraction=1 medcontext.supervised_weight=0.5")
    result = diagnose(trainer, batch)
    row = [np.array_equal(image[0], result.image) for image in batch.data.numpy()].index(True)
    assert batch.keys[row] == result.case
    x, target = batch.data[[row]], [t[[row]] for t in batch.target]
    masked = x.clone()
    masked[torch.from_numpy(result.hidden)[None, None]] = 0
    network = copy.deepcopy(trainer.network).eval()
    output = network(masked)
    teacher = copy.deepcopy(trainer.teacher.module)(x)
    consistency = (teacher.softmax(1) - output[0].softmax(1)).pow(2).sum(1).mean()
    ramp = math.exp(-5 * (1 - 2 / 30) ** 2)  # of the last step done, t = 2 of T = 30
    expected = 2 * ramp * gradient_norm(consistency, network)
    expected /= 0.5 * gradient_norm(trainer.loss(network(x), target), network)
    assert result.gradient_ratio == pytest.approx(expected, rel=1e-3)
    share = float((teacher.argmax(1) != output[0].argmax(1)).float().mean())
    assert 0 < share < 1 and result.disagreement == pytest.approx(share, abs=1e-6)
    assert np.array_equal(result.masked, output[0][0].argmax(0).numpy())
    assert np.array_equal(result.clean, network(x)[0][0].argmax(0).numpy())
    assert np.array_equal(result.teacher, teacher[0].argmax(0).numpy())
    assert np.array_equal(result.target, target[0][0, 0].numpy())


def test_of_unlabelled_patches_the_one_with_most_in_it_is_looked_at(make_trainer, tmp_path, no_pictures):
    settings = "medcontext.unlabelled=rest train_cases=2 medcontext.unlabelled_ramp=0"
    trainer, batch = loaded(make_trainer, settings, configuration="2d")
    stream = batch.stream()
    before = [t.clone() for t in (*trainer.network.state_dict().values(), trainer.generator.get_state())]
    result = diagnose_unlabelled(trainer, stream)
    after = (*trainer.network.state_dict().values(), trainer.generator.get_state())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and trainer.network.training
    teacher = trainer.teacher.module(stream.data).argmax(1)
    row = int((teacher > 0).flatten(1).sum(1).argmax())
    assert result.case == stream.keys[row] and result.target is None and math.isnan(result.gradient_ratio)
    assert np.array_equal(result.image, stream.data[row, 0]) and np.array_equal(result.teacher, teacher[row])
    masked = stream.data[[row]].clone()
    masked[torch.from_numpy(result.hidden)[None, None]] = 0
    network = copy.deepcopy(trainer.network).eval()
    assert np.array_equal(result.masked, network(masked)[0][0].argmax(0))
    assert np.array_equal(result.clean, network(stream.data[[row]])[0][0].argmax(0))
    assert result.disagreement == pytest.approx(float((result.teacher != result.masked).mean()), abs=1e-6)
    for fraction, rows in ((1, 2), (0, 1)):
        settings = trainer.medcontext.model_copy(update={"masked_fraction": fraction})
        with (
            mock.patch.object(type(trainer), "medcontext", settings),
            mock.patch("nnunetv2_ext.medcontext.training.draw_panel") as drawn,
        ):
            trainer.draw_panel(tmp_path / "panel.png")
        assert [one.target is None for one in drawn.call_args.args[0]] == [False, True][2 - rows :]


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_a_look_changes_nothing(make_trainer, tiny, fill):
    plans = tiny.plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["norm_op"] = BATCH_NORM
    trainer, batch = loaded(make_trainer, f"medcontext.fill={fill}", plans=plans)

    def everything() -> list[torch.Tensor]:
        random = randomness.get_random_state(trainer.generator)
        gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
        tensors = [*trainer.network.state_dict().values(), *trainer.teacher.state_dict().values(), *gradients]
        return [t.clone() for t in [*tensors, batch.data, *batch.target, random["torch"], random["method"][1]]]

    for training in (True, False):
        trainer.network.train(training)
        before, numbers = everything(), (np.random.get_state()[1].copy(), np.random.get_state()[2])
        generator = trainer.generator
        with torch.no_grad():  # as inside a validation loop
            diagnose(trainer, batch)
        assert trainer.generator is generator
        after = everything()
        assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert np.array_equal(numbers[0], np.random.get_state()[1]) and numbers[1] == np.random.get_state()[2]
        assert all(m.training is training for m in trainer.network.modules())
        assert not any(m.training for m in trainer.teacher.module.modules())


def test_a_training_with_looks_equals_one_without(make_trainer):
    weights = []
    for looks in (True, False):
        trainer, _ = loaded(make_trainer, "medcontext.fill=noise medcontext.masked_fraction=0.5")
        for _ in range(2):
            if looks:
                assert "medcontext/gradient_ratio" in trainer.epoch_figures()
            trainer.train_step(next(trainer.dataloader_train))
        weights.append(trainer.network.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_same_step_gives_the_same_mask_and_another_step_another(make_trainer):
    trainer, batch = loaded(make_trainer)
    first, again = diagnose(trainer, batch), diagnose(trainer, batch)
    trainer.global_step += 1
    assert np.array_equal(first.hidden, again.hidden)
    assert not np.array_equal(first.hidden, diagnose(trainer, batch).hidden)


def test_the_state_is_put_back_when_the_look_fails(make_trainer, monkeypatch):
    trainer, batch = loaded(make_trainer)
    generator = trainer.generator
    monkeypatch.setattr(trainer, "hide", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diagnose(trainer, batch)
    assert trainer.generator is generator and trainer.network.training


def test_without_a_teacher_there_is_no_figure_but_a_picture(make_trainer):
    trainer, batch = loaded(make_trainer, "medcontext.beta=0")
    assert trainer.epoch_figures() == {}
    result = diagnose(trainer, batch)
    assert result.teacher is None and math.isnan(result.gradient_ratio) and math.isnan(result.disagreement)


def test_the_card_names_the_ranges_that_the_plot_draws():
    card = (Path(__file__).parents[2] / "docs" / "methods" / "medcontext.md").read_text(encoding="utf-8")
    for figure, limits in nnUNetTrainerMedContext.healthy_figures.items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{figure.split('/')[1]}`")]
        healthy = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", row.split("|")[2])}
        assert set(limits) <= healthy, row


def test_figures_only_where_there_is_a_masked_pass(make_trainer):
    trainer, _ = loaded(make_trainer, "medcontext.masked_fraction=0")
    assert trainer.epoch_figures() == {}


@pytest.mark.parametrize("regions", [False, True])
def test_the_most_annotated_foreground_is_looked_at_and_ignored_voxels_do_not_count(make_trainer, regions):
    trainer, batch = loaded(make_trainer, steps=1)
    labels = {"background": 0, "organ_1": 1, "organ_2": 2, "ignore": 3}
    if regions:
        labels = {"background": 0, "whole": [1, 2], "organ_2": [2], "ignore": 3}
    trainer.label_manager = LabelManager(labels, (1, 2) if regions else None)
    empty = [torch.zeros_like(t) for t in batch.target]
    if regions:
        empty = [torch.zeros(2, 3, *t.shape[2:], dtype=torch.bool) for t in batch.target]
        empty[0][0, -1] = True  # unannotated throughout
        empty[0][1, 0, :2] = True
    else:
        empty[0][0] = 3
        empty[0][1, 0, :2] = 1
    batch = Batch(batch.data, empty, ("ignored", "organ"))
    trainer.loss = trainer._build_loss() if not regions else lambda output, target: output[0].sum()
    trainer.consistency = lambda teacher, student, sample: student.sum()
    assert diagnose(trainer, batch).case == "organ"


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [("medcontext.ramp_fraction=0.01", 1e-3, 1.0), ("medcontext.preset=paper_code", 0.0, 1e-3)],
)
def test_the_default_consistency_pulls_and_the_released_one_does_not(make_trainer, tiny, settings, low, high):
    """The released loss shrinks with the number of voxels, so the patch is that of the hippocampus plans."""
    plans = tiny.plans()
    plans["configurations"]["3d_fullres"]["patch_size"] = [40, 56, 40]
    trainer, batch = loaded(make_trainer, settings, steps=7, plans=plans)
    ratios = [diagnose(trainer, batch).gradient_ratio]
    for _ in range(3):
        trainer.train_step(next(trainer.dataloader_train))
        ratios.append(diagnose(trainer, Batch.from_loader(trainer.last_batch, trainer.device)).gradient_ratio)
    assert all(low < ratio < high for ratio in ratios), ratios
