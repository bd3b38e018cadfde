"""nnUNetTrainerMedContext: one step by hand, the teacher's life, resuming, and every kind of plan and target."""

from __future__ import annotations

import copy
import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.step import Batch, backward_passes
from nnunetv2_ext.medcontext import training as medcontext_training
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext
from tests.contract.data import cascade

PLAIN_STEP = "medcontext.masked_fraction=0 medcontext.beta=0 medcontext.supervised_weight=1"


def ready(make_trainer, settings: str = "", cls: type = nnUNetTrainerMedContext, seed: int = 3, **options: Any):
    """An initialised trainer whose weights depend on the seed only."""
    trainer = make_trainer(cls, settings, **options)
    randomness.seed_everything(seed)
    trainer.initialize()
    return trainer


def make_batches(trainer: nnUNetTrainer, number: int, size: int = 2, seed: int = 0) -> list[dict]:
    """Random batches with the targets that nnU-Net's transforms would hand over: classes, or regions and ignore map."""
    generator = torch.Generator().manual_seed(seed)
    patch, labels = trainer.configuration_manager.patch_size, trainer.label_manager
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch)]
    batches = []
    for _ in range(number):
        targets = []
        for scale in scales:
            shape = [round(p * s) for p, s in zip(patch, scale)]
            if labels.has_regions:
                channels = len(labels.foreground_regions) + labels.has_ignore_label
                targets.append(torch.rand(size, channels, *shape, generator=generator) > 0.7)
            else:
                values = len(labels.all_labels) + labels.has_ignore_label
                targets.append(torch.randint(0, values, (size, 1, *shape), generator=generator).to(torch.int16))
        data = torch.randn(size, trainer.num_input_channels, *patch, generator=generator)
        target = targets if trainer.enable_deep_supervision else targets[0]
        batches.append({"data": data, "target": target, "keys": np.array([f"case_{i}" for i in range(size)])})
    return batches


def train(trainer: nnUNetTrainer, batches: list[dict]) -> list[dict]:
    return [trainer.train_step(batch) for batch in batches]


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different, different


@dataclass(frozen=True)
class Relabelled:
    """The tiny dataset under another label table. For made-up batches only: its preprocessed data do not change."""

    dataset: Any
    labels: dict[str, Any]
    order: tuple[int, ...] | None = None

    def environment(self, *args: Any) -> dict[str, str]:
        return self.dataset.environment(*args)

    def plans(self) -> dict[str, Any]:
        return self.dataset.plans()

    def dataset_json(self) -> dict[str, Any]:
        content = {**self.dataset.dataset_json(), "labels": self.labels}
        return content if self.order is None else {**content, "regions_class_order": self.order}


@pytest.fixture
def regions(tiny):
    return Relabelled(tiny, {"background": 0, "whole": [1, 2], "organ_2": [2]}, (1, 2))


@pytest.fixture
def regions_ignore(tiny):
    return Relabelled(tiny, {"background": 0, "whole": [1, 2], "organ_2": [2], "ignore": 3}, (1, 2))


@pytest.fixture
def ignore(tiny):
    return Relabelled(tiny, {"background": 0, "organ_1": 1, "organ_2": 2, "ignore": 3})


class Calls:
    """Which network saw which input, in order."""

    def __init__(self, trainer: nnUNetTrainerMedContext) -> None:
        self.seen: list[tuple[str, torch.Tensor]] = []
        trainer.network.register_forward_pre_hook(lambda _, x: self.seen.append(("student", x[0].clone())))
        if trainer.teacher is not None:
            hook = trainer.teacher.module.register_forward_pre_hook
            hook(lambda _, x: self.seen.append(("teacher", x[0].clone())))

    def pop(self) -> list[tuple[str, torch.Tensor]]:
        seen, self.seen = self.seen, []
        return seen


# ---- one step ----


@pytest.mark.parametrize(("preset", "weights"), [("none", (2, 0, 2)), ("paper", (1, 1, 0.5))])
def test_two_steps_equal_a_slow_reimplementation(make_trainer, preset, weights):
    """Three forwards, one summed loss, one backward, clipping, SGD with Nesterov momentum and the EMA, all by hand."""
    trainer = ready(make_trainer, f"medcontext.ramp_fraction=0.5 medcontext.preset={preset}")
    batches = make_batches(trainer, 2)
    student, teacher = copy.deepcopy(trainer.network), copy.deepcopy(trainer.network)
    momenta = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    total_steps = 2 * 3
    for step, batch in enumerate(batches):
        hidden = trainer.draw_mask(batch["data"].shape)  # advances the trainer's own generator ...
        trainer.draw_mask = lambda shape, hidden=hidden: hidden  # ... so the step is handed this very mask
        result = trainer.train_step(batch)
        del trainer.draw_mask

        x = batch["data"]
        masked = x.clone()
        masked[hidden] = 0  # one channel: the mask has the batch's shape
        clean_logits, masked_logits = student(x), student(masked)
        with torch.no_grad():
            target_probability = teacher(x)[0].softmax(1)
        per_voxel = (target_probability - masked_logits[0].softmax(1)).pow(2).sum(1)
        consistency = per_voxel.mean()
        ramp = math.exp(-5 * (1 - min(1, step / (0.5 * total_steps))) ** 2)
        supervised = trainer.loss(clean_logits, batch["target"])
        masked_supervised = trainer.loss(masked_logits, batch["target"])
        student.zero_grad()
        (weights[0] * supervised + weights[1] * masked_supervised + weights[2] * ramp * consistency).backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        norm = torch.sqrt(sum(g.double().pow(2).sum() for g in gradients.values()))
        with torch.no_grad():
            for name, p in student.named_parameters():
                if name not in gradients:
                    continue
                g = gradients[name] * min(1.0, 12 / float(norm)) + 3e-5 * p
                momenta[name] = 0.99 * momenta[name] + g if step else g
                p -= 0.01 * (g + 0.99 * momenta[name])
            m = min(0.996 + 0.004 * (1 - math.cos(math.pi * step / total_steps)) / 2, 1 - 1 / (step + 1))
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(m * t + (1 - m) * s)

        assert float(result["consistency"]) == pytest.approx(consistency.item(), rel=1e-5)
        assert float(result["masked_supervised"]) == pytest.approx(masked_supervised.item(), rel=1e-5)
        assert float(result["supervised"]) == pytest.approx(supervised.item(), rel=1e-5)
        assert float(result["loss"]) == pytest.approx(supervised.item(), rel=1e-5), "the log's loss is the plain run's"
        assert float(result["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    for mine, theirs in ((trainer.network, student), (trainer.teacher.module, teacher)):
        for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("weight", "factor"), [(0.5, 1.0), (1.0, 2.0)])
def test_two_clean_passes_give_the_plain_gradient_times_twice_their_weight(make_trainer, weight, factor):
    settings = (
        f"medcontext.preset=paper medcontext.beta=0 medcontext.mask_ratio=0 medcontext.supervised_weight={weight}"
    )
    ours, plain = ready(make_trainer, settings), ready(make_trainer, PLAIN_STEP)
    for trainer in (ours, plain):
        batch = Batch.from_loader(make_batches(trainer, 1)[0], trainer.device)
        backward_passes(trainer.loss_passes(batch), trainer.network, trainer.device, None)
    for (name, mine), theirs in zip(ours.network.named_parameters(), plain.network.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
        else:
            torch.testing.assert_close(mine.grad, factor * theirs.grad, rtol=1e-6, atol=1e-8, msg=name)


def test_a_masked_pass_that_teaches_nothing_is_not_run(make_trainer):
    """Neither supervised nor with a teacher: the step is plain nnU-Net's, bit for bit and at its cost."""
    settings = "medcontext.masked_supervised_weight=0 medcontext.beta=0 medcontext.supervised_weight=1"
    ours, plain = ready(make_trainer, settings), ready(make_trainer, cls=nnUNetTrainer)
    batches = make_batches(ours, 2)
    assert all("masked_supervised" not in figures for figures in train(ours, batches))
    train(plain, batches)
    assert_same(state(plain.network), state(ours.network))


def test_supervision_of_weight_0_in_the_masked_pass_is_logged_and_teaches_nothing(make_trainer, monkeypatch):
    trainer = ready(make_trainer, "medcontext.masked_supervised_weight=0 medcontext.ramp_fraction=0")
    monkeypatch.setattr(trainer, "consistency", lambda teacher, student, batch: 0 * student.sum())
    plain = ready(make_trainer, cls=nnUNetTrainer)
    batch = make_batches(trainer, 1)[0]
    figures = train(trainer, [batch])[0]
    train(plain, [batch])
    assert np.isfinite(figures["masked_supervised"])
    assert trainer._term_weights == {"masked_supervised": 0, "consistency": 2, "supervised": 2}
    for ours, theirs in zip(trainer.network.parameters(), plain.network.parameters()):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, 2 * theirs.grad, rtol=1e-5, atol=1e-7)


def test_masked_supervised_weight_replaces_supervised_weight_in_the_masked_pass(make_trainer):
    """Two clean passes of weights 0.5 and 1.5 pull as strongly as two of weight 1."""
    norms = []
    for clean, masked in ((1.5, 0.5), (1, "none")):
        weights = f"medcontext.supervised_weight={clean} medcontext.masked_supervised_weight={masked}"
        trainer = ready(make_trainer, f"medcontext.mask_ratio=0 medcontext.beta=0 {weights}")
        norms.append(float(train(trainer, make_batches(trainer, 1))[0]["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_mask_warmup_grows_the_hidden_share_on_a_line(make_trainer):
    trainer = ready(make_trainer, "medcontext.mask_warmup=0.5 num_epochs=2 num_iterations_per_epoch=8")  # 16 steps
    assert [trainer.mask_ratio(t) for t in (0, 2, 4, 8, 15)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert not trainer.draw_mask((1, 1, *trainer.configuration_manager.patch_size)).any()
    trainer.global_step = 8
    share = trainer.draw_mask((50, 1, *trainer.configuration_manager.patch_size)).float().mean()
    assert float(share) == pytest.approx(0.4, abs=0.03)
    assert ready(make_trainer, "medcontext.mask_warmup=0").mask_ratio(0) == 0.4


def test_the_teacher_sees_the_clean_patch_the_masked_pass_comes_first_the_clean_one_last(make_trainer):
    trainer = ready(make_trainer)
    calls = Calls(trainer)
    batch = make_batches(trainer, 1)[0]
    trainer.train_step(batch)
    (first, x_teacher), (second, x_masked), (third, x_clean) = calls.pop()
    assert (first, second, third) == ("teacher", "student", "student")
    assert torch.equal(x_teacher, batch["data"]) and torch.equal(x_clean, batch["data"])
    hidden = (x_masked == 0) & (batch["data"] != 0)
    assert hidden.float().mean() == pytest.approx(38 / 96), "round(0.4 * 96) of 4x4x4 blocks"
    assert torch.equal(x_masked[~hidden], batch["data"][~hidden])


@pytest.mark.parametrize("fill", ["zero", "noise", "minimum"])
def test_the_loaders_batch_is_left_alone(make_trainer, fill):
    trainer = ready(make_trainer, f"medcontext.fill={fill}")
    batch = make_batches(trainer, 1)[0]
    data, target = batch["data"].clone(), [t.clone() for t in batch["target"]]
    trainer.train_step(batch)
    assert torch.equal(batch["data"], data)
    assert all(torch.equal(a, b) for a, b in zip(batch["target"], target, strict=True))


@pytest.mark.parametrize(("fraction", "size", "expected"), [(0.5, 1, 1), (0.5, 2, 1), (0.5, 3, 2), (0.1, 3, 1)])
def test_masked_fraction_gives_that_many_samples_to_teacher_and_masked_pass(make_trainer, fraction, size, expected):
    trainer = ready(make_trainer, f"medcontext.masked_fraction={fraction} medcontext.mask_ratio=0")
    calls = Calls(trainer)
    chosen = set()
    for batch in make_batches(trainer, 6, size=size):
        trainer.train_step(batch)
        seen = calls.pop()
        assert [(who, len(x)) for who, x in seen] == [("teacher", expected), ("student", expected), ("student", size)]
        assert torch.equal(seen[0][1], seen[1][1]), "teacher and student look at the same samples"
        rows = [[torch.equal(x, y) for y in batch["data"]].index(True) for x in seen[0][1]]
        assert len(set(rows)) == expected, "drawn without replacement"
        chosen.update(rows)
    assert size == expected or len(chosen) > expected, "not always the same samples"


def test_the_chosen_samples_keep_their_own_targets(make_trainer):
    trainer = ready(
        make_trainer, "medcontext.preset=paper medcontext.masked_fraction=0.5 medcontext.mask_ratio=0 medcontext.beta=0"
    )
    calls = Calls(trainer)
    batch = make_batches(trainer, 1, size=2)[0]
    before = copy.deepcopy(trainer.network)
    result = trainer.train_step(batch)
    row = int(torch.equal(calls.pop()[0][1][0], batch["data"][1]))
    alone = trainer.loss(before(batch["data"][[row]]), [t[[row]] for t in batch["target"]])
    assert float(result["masked_supervised"]) == pytest.approx(alone.item(), rel=1e-5)


def test_masked_every_third_step_while_the_teacher_follows_at_every_step(make_trainer):
    trainer = ready(make_trainer, "medcontext.masked_every=3")
    calls = Calls(trainer)
    with_mask = []
    for step, batch in enumerate(make_batches(trainer, 7)):
        teacher = state(trainer.teacher.module)
        result = trainer.train_step(batch)
        seen = [who for who, _ in calls.pop()]
        if seen == ["teacher", "student", "student"]:
            with_mask.append(step)
            assert "consistency" in result and "masked_supervised" in result
        else:
            assert seen == ["student"] and set(result) == {"loss", "supervised", "grad_norm"}
        assert any(not torch.equal(teacher[k], v) for k, v in trainer.teacher.module.state_dict().items())
    assert with_mask == [0, 3, 6]


def test_supervised_weight_zero_leaves_only_the_consistency(make_trainer):
    trainer = ready(make_trainer, "medcontext.supervised_weight=0 medcontext.ramp_fraction=0 weight_decay=0")
    batch = Batch.from_loader(make_batches(trainer, 1)[0], trainer.device)
    mask = trainer.draw_mask(batch.data.shape)
    trainer.draw_mask = lambda shape: mask
    backward_passes(trainer.loss_passes(batch), trainer.network, trainer.device, None)
    network = copy.deepcopy(trainer.network)
    network.zero_grad()
    student = network(trainer.hide(batch.data, mask))[0].softmax(1)
    (2 * (trainer.teacher(batch.data).softmax(1) - student).pow(2).sum(1).mean()).backward()
    for a, b in zip(trainer.network.parameters(), network.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-8)


# ---- unlabelled patches ----
REST = "medcontext.unlabelled=rest train_cases=2"


def with_stream(batch: dict, seed: int = 9) -> dict:
    """The batch with two unlabelled patches, of which a corner lies outside of the scan."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.ones((len(batch["data"]), 1, *batch["data"].shape[2:]), dtype=torch.bool)
    inside[..., :5] = False
    data = torch.randn(batch["data"].shape, generator=generator)
    return batch | {"unlabelled": {"data": data, "keys": np.array(["u", "v"]), "inside": inside}}


def test_unlabelled_patches_teach_what_lies_inside_of_the_scan(make_trainer):
    trainer = ready(make_trainer, f"{REST} medcontext.beta=0 medcontext.unlabelled_ramp=0 medcontext.mask_ratio=0.25")
    batch = with_stream(make_batches(trainer, 1)[0])
    calls, before = Calls(trainer), copy.deepcopy(trainer.network)
    mask = trainer.draw_mask(batch["data"].shape)
    trainer.draw_mask = lambda shape: mask
    figures = trainer.train_step(batch)
    u, inside = batch["unlabelled"]["data"], batch["unlabelled"]["inside"]
    seen = calls.pop()
    assert [who for who, _ in seen] == ["teacher", "student", "student"]
    assert torch.equal(seen[0][1], u) and torch.equal(seen[1][1], u.masked_fill(mask, 0))
    assert torch.equal(seen[2][1], batch["data"])
    teacher, student = before(u)[0].softmax(1), before(u.masked_fill(mask, 0))[0].softmax(1)
    expected = ((teacher - student).pow(2).sum(1, keepdim=True) * inside).sum() / inside.sum()
    assert float(figures["unlabelled_consistency"]) == pytest.approx(expected.item(), rel=1e-5)
    assert trainer._term_weights == {"unlabelled_consistency": 2, "supervised": 2}
    # what lies outside says nothing, what lies inside does
    for change, same in ((~inside, True), (inside, False)):
        again = ready(make_trainer, f"{REST} medcontext.beta=0 medcontext.unlabelled_ramp=0 medcontext.mask_ratio=0.25")
        again.draw_mask = lambda shape: mask
        logits = again.teacher.module.forward
        again.teacher.module.forward = lambda x, logits=logits, change=change: (
            logits(x) + 9 * change * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1, 1)
        )
        assert (float(again.train_step(with_stream(batch))["unlabelled_consistency"]) == pytest.approx(
            expected.item(), rel=1e-5
        )) is same  # fmt: skip


@pytest.mark.parametrize("off", ["", "medcontext.unlabelled=true medcontext.unlabelled_weight=0"])
def test_without_a_pool_a_step_is_as_it_was(make_trainer, off):
    """The passes, the draws and the teacher of a training that never heard of unlabelled patches."""
    trainer = ready(make_trainer, off)
    batch = make_batches(trainer, 1)[0]
    passes = trainer.loss_passes(Batch.from_loader(batch, trainer.device))
    assert passes.names == ("masked", "supervised") and not trainer.has_unlabelled
    with_pool = ready(make_trainer, f"{REST} medcontext.unlabelled_start=0.9")  # not yet
    for one in (trainer, with_pool):
        train(one, [batch])
    assert_same(state(trainer.network), state(with_pool.network))


def test_a_training_on_the_rest_of_the_fold_logs_the_teachers_dice(make_trainer, no_pictures):
    trainer = make_trainer(nnUNetTrainerMedContext, f"seed=1 {REST} num_epochs=1 num_val_iterations_per_epoch=2")
    trainer.run_training()
    with (Path(trainer.output_folder) / "epochs.csv").open() as stream:
        [row] = list(csv.DictReader(stream))
    assert float(row["loss/unlabelled_consistency"]) >= 0 and 0 <= float(row["teacher/pseudo_dice"]) <= 1


def test_with_guides_unlabelled_patches_are_refused(make_trainer):
    from nnunetv2_ext.trainers.nnUNetTrainerMedContextJRAS import nnUNetTrainerMedContextJRAS

    with pytest.raises(ValueError, match="draws guides for labelled patches only"):
        make_trainer(nnUNetTrainerMedContextJRAS, REST).initialize()


@pytest.mark.parametrize("labels", ["tiny", "ignore", "regions", "regions_ignore"])
def test_the_teachers_counts_are_nnunets_and_the_students_stay(make_trainer, request, labels):
    dataset = request.getfixturevalue(labels)
    trainer, plain = ready(make_trainer, dataset=dataset), ready(make_trainer, dataset=dataset, cls=nnUNetTrainer)
    batch = make_batches(trainer, 1)[0]
    with torch.no_grad():
        for parameter in trainer.teacher.module.parameters():
            parameter.add_(0.05)
        for seen, network in ((trainer, trainer.network), (plain, trainer.teacher.module)):
            plain.network.load_state_dict(network.state_dict())
            wanted = plain.validation_step(copy.deepcopy(batch))
            trainer.on_validation_epoch_start()
            found = trainer.validation_step(copy.deepcopy(batch))
            if seen is plain:
                found = dict(zip(("tp_hard", "fp_hard", "fn_hard"), trainer._teacher_counts))
            for name in ("tp_hard", "fp_hard", "fn_hard"):
                assert np.array_equal(found[name], wanted[name]), name
    assert trainer._teacher_counts.sum() > 0 and not np.array_equal(trainer._teacher_counts[0], trainer.validation_step(
        copy.deepcopy(batch))["tp_hard"])  # fmt: skip


# ---- the teacher ----


def test_beta_zero_builds_no_teacher_and_stores_none(make_trainer, tmp_path):
    trainer = ready(make_trainer, "medcontext.beta=0")
    train(trainer, make_batches(trainer, 2))
    assert trainer.teacher is None
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    stored = torch.load(tmp_path / "c.pth", weights_only=False)
    assert stored["nnunetv2_ext"]["methods"] == {}
    again = make_trainer(nnUNetTrainerMedContext, "medcontext.beta=0", continued=True)
    again.load_checkpoint(str(tmp_path / "c.pth"))
    assert again.teacher is None and again.global_step == 2


def test_the_teacher_is_trained_by_nothing_but_its_update(make_trainer):
    trainer = ready(make_trainer)
    in_optimiser = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not in_optimiser & {id(p) for p in trainer.teacher.module.parameters()}
    assert not {id(p) for p in trainer.network.parameters()} & {id(p) for p in trainer.teacher.module.parameters()}
    before = state(trainer.teacher.module)
    batch = Batch.from_loader(make_batches(trainer, 1)[0], trainer.device)
    backward_passes(trainer.loss_passes(batch), trainer.network, trainer.device, None)
    trainer.optimizer.step()
    assert_same(before, state(trainer.teacher.module))
    assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.module.parameters())
    trainer.network.train()
    assert not any(m.training for m in trainer.teacher.module.modules())
    assert trainer.teacher.module.decoder.deep_supervision is False
    assert trainer.network.decoder.deep_supervision is True
    trainer.after_step()
    assert any(not torch.equal(before[k], v) for k, v in trainer.teacher.module.state_dict().items())


def test_batch_norm_statistics_reach_the_teacher(make_trainer, tiny):
    plans = tiny.plans()
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"
    trainer = ready(make_trainer, plans=plans)
    fresh = state(trainer.network)
    train(trainer, make_batches(trainer, 2))
    student, teacher = dict(trainer.network.named_buffers()), dict(trainer.teacher.module.named_buffers())
    assert any("running_mean" in key for key in student)
    assert_same(student, teacher)
    assert not torch.equal(fresh["encoder.stages.0.0.convs.0.norm.running_mean"], next(iter(teacher.values())))
    assert int(next(v for k, v in student.items() if "num_batches_tracked" in k)) == 4, "two passes a step"


def test_pretrained_weights_reach_the_teacher_before_the_first_step(make_trainer, tmp_path):
    source = ready(make_trainer, cls=nnUNetTrainer, seed=11)
    source.save_checkpoint(str(tmp_path / "plain.pth"))
    trainer = ready(make_trainer, seed=3)
    load_pretrained_weights(trainer.network, str(tmp_path / "plain.pth"))
    assert not torch.equal(next(trainer.network.parameters()), next(trainer.teacher.module.parameters()))
    trainer.on_train_start()
    assert_same(state(trainer.network), state(trainer.teacher.module))
    assert torch.equal(next(trainer.network.parameters()), next(source.network.parameters()))


def test_a_checkpoint_of_plain_nnunet_starts_the_teacher_as_a_copy(make_trainer, tmp_path):
    plain = ready(make_trainer, cls=nnUNetTrainer, seed=11)
    train(plain, make_batches(plain, 2))
    plain.save_checkpoint(str(tmp_path / "plain.pth"))
    trainer = make_trainer(nnUNetTrainerMedContext, continued=True)
    trainer.load_checkpoint(str(tmp_path / "plain.pth"))
    assert_same(state(plain.network), state(trainer.network))
    assert_same(state(plain.network), state(trainer.teacher.module))
    assert trainer.global_step == trainer.current_epoch * 3 == 3
    log = Path(trainer.log_file).read_text()
    assert "has no teacher" in log
    trainer.on_train_start()
    assert_same(state(plain.network), state(trainer.teacher.module))


def test_a_loaded_teacher_is_not_overwritten_when_training_starts(make_trainer, tmp_path):
    first = ready(make_trainer)
    train(first, make_batches(first, 3))
    first.save_checkpoint(str(tmp_path / "c.pth"))
    resumed = make_trainer(nnUNetTrainerMedContext, continued=True)
    resumed.load_checkpoint(str(tmp_path / "c.pth"))
    resumed.on_train_start()
    assert_same(first.teacher.state_dict(), resumed.teacher.state_dict())
    assert not torch.equal(next(resumed.network.parameters()), next(resumed.teacher.module.parameters()))


def test_another_training_length_on_resume_is_said_and_used(make_trainer, tmp_path):
    first = ready(make_trainer)
    train(first, make_batches(first, 2))
    first.save_checkpoint(str(tmp_path / "c.pth"))
    resumed = make_trainer(nnUNetTrainerMedContext, "num_epochs=50", continued=True)
    resumed.load_checkpoint(str(tmp_path / "c.pth"))
    assert resumed.total_steps == 150
    assert "from 6 to 150 steps" in Path(resumed.log_file).read_text()


def test_stock_nnunet_loads_the_checkpoint_strictly_and_finds_all_its_keys(make_trainer, tmp_path):
    ours, plain = ready(make_trainer), ready(make_trainer, cls=nnUNetTrainer, seed=5)
    train(ours, make_batches(ours, 2))
    ours.save_checkpoint(str(tmp_path / "ours.pth"))
    plain.save_checkpoint(str(tmp_path / "plain.pth"))
    stored = [torch.load(tmp_path / name, weights_only=False) for name in ("ours.pth", "plain.pth")]
    assert set(stored[1]) < set(stored[0]) and set(stored[0]) - set(stored[1]) == {"nnunetv2_ext"}
    assert list(stored[1]["network_weights"]) == list(stored[0]["network_weights"])
    plain.load_checkpoint(str(tmp_path / "ours.pth"))
    assert_same(state(ours.network), state(plain.network))


@pytest.fixture
def compiling(monkeypatch):
    """nnU-Net and our teacher compile on the CPU too, by dynamo alone: generating code would take a minute."""
    real = torch.compile
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, **{**options, "backend": "eager"}))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_networks_learn_the_same_and_their_checkpoint_has_plain_keys(make_trainer, tmp_path, request):
    plain = ready(make_trainer, configuration="2d")
    batches = make_batches(plain, 4)
    train(plain, batches)

    request.getfixturevalue("compiling")
    first = ready(make_trainer, configuration="2d")
    assert isinstance(first.network, OptimizedModule) and first.teacher.module._compiled_call_impl is not None
    train(first, batches[:2])
    assert np.isfinite(first.epoch_figures()["medcontext/gradient_ratio"])
    first.save_checkpoint(str(tmp_path / "c.pth"))
    stored = torch.load(tmp_path / "c.pth", weights_only=False)
    for weights in (stored["network_weights"], stored["nnunetv2_ext"]["methods"]["medcontext"]["teacher"]):
        assert list(weights) == list(plain.network.state_dict())

    second = make_trainer(nnUNetTrainerMedContext, configuration="2d", continued=True)
    second.load_checkpoint(str(tmp_path / "c.pth"))
    assert isinstance(second.network, OptimizedModule)
    randomness.set_random_state(second._random_states[0], second.generator)  # run_training does this
    train(second, batches[2:])
    assert_same(state(plain.network), state(unwrap(second.network)))
    assert_same(state(plain.teacher.module), dict(second.teacher.state_dict()))


# ---- targets, plans, architectures ----


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("kind", ["tiny", "regions", "regions_ignore", "ignore"])
def test_every_kind_of_target_trains_with_and_without_deep_supervision(make_trainer, request, kind, configuration):
    for deep in (True, False):
        trainer = make_trainer(
            nnUNetTrainerMedContext, configuration=configuration, dataset=request.getfixturevalue(kind)
        )
        trainer.enable_deep_supervision = deep
        trainer.initialize()
        results = train(trainer, make_batches(trainer, 2))
        assert all(np.isfinite(value) for result in results for value in result.values())
        assert all(float(result["consistency"]) > 0 for result in results)


@pytest.mark.parametrize("kind", ["ignore", "regions_ignore"])
def test_a_batch_of_ignored_voxels_is_finite_and_has_no_consistency(make_trainer, request, kind):
    settings = "medcontext.ramp_fraction=0 medcontext.supervised_weight=0 weight_decay=0"
    trainer = ready(make_trainer, settings, dataset=request.getfixturevalue(kind))
    batch = make_batches(trainer, 1)[0]
    for target in batch["target"]:
        if trainer.label_manager.has_regions:
            target[:, :-1], target[:, -1] = False, True
        else:
            target[:] = trainer.label_manager.ignore_label
    before = state(trainer.network)
    result = trainer.train_step(batch)
    assert all(np.isfinite(value) for value in result.values())
    assert float(result["consistency"]) == 0
    assert_same(before, state(trainer.network))

    counting = ready(make_trainer, f"{settings} medcontext.cons_on_ignored=true", dataset=request.getfixturevalue(kind))
    assert float(counting.train_step(batch)["consistency"]) > 0


@pytest.mark.parametrize("kind", ["ignore", "regions_ignore"])
def test_the_consistency_counts_annotated_voxels_only(make_trainer, request, kind):
    trainer = ready(make_trainer, dataset=request.getfixturevalue(kind))
    batch = Batch.from_loader(make_batches(trainer, 1)[0], trainer.device)
    top = batch.target[0]
    valid = ~top[:, -1] if trainer.label_manager.has_regions else top[:, 0] != 3
    heads = trainer.label_manager.num_segmentation_heads
    teacher, student = torch.randn(2, 2, heads, *batch.data.shape[2:])
    activate = torch.sigmoid if trainer.label_manager.has_regions else lambda z: z.softmax(1)
    per_voxel = (activate(teacher) - activate(student)).pow(2).sum(1)
    expected = float(per_voxel[valid].mean())
    assert 0 < valid.float().mean() < 1
    assert float(trainer.consistency(teacher, student, trainer.valid_voxels(batch))) == pytest.approx(
        expected, rel=1e-5
    )


def test_without_deep_supervision_every_sample_enters_the_consistency(make_trainer, monkeypatch):
    """The released code indexed the tensor and so took the first sample for the first resolution."""
    trainer = make_trainer(nnUNetTrainerMedContext)
    trainer.enable_deep_supervision = False
    trainer.initialize()
    given = []
    real = medcontext_training.consistency_loss
    monkeypatch.setattr(
        medcontext_training, "consistency_loss", lambda *args: given.append([*args[:2], real(*args)]) or given[-1][2]
    )
    batch = make_batches(trainer, 1, size=3)[0]
    trainer.train_step(batch)
    ((teacher, student, value),) = given
    assert teacher.shape == student.shape == (3, 3, 16, 24, 16)
    shares = (teacher.softmax(1) - student.softmax(1)).pow(2).sum(1).flatten(1).mean(1)
    assert (shares > 0).all()
    assert value.item() == pytest.approx(shares.mean().item(), rel=1e-5)


@pytest.mark.parametrize("fill", ["zero", "noise", "minimum"])
def test_cascade_channels_are_hidden_with_the_image_and_always_zero(make_trainer, tiny, fill):
    plans = cascade(tiny.plans())
    trainer = ready(make_trainer, f"medcontext.fill={fill}", configuration="3d_cascade_fullres", plans=plans)
    assert trainer.num_input_channels == 3 and trainer.num_image_channels == 1
    calls = Calls(trainer)
    batch = make_batches(trainer, 1)[0]
    batch["data"][:, 1:] = 1.0
    trainer.train_step(batch)
    masked = calls.pop()[1][1]
    hidden = masked[:, 1] == 0
    assert torch.equal(hidden, masked[:, 2] == 0) and hidden.float().mean() == pytest.approx(38 / 96)
    image = masked[:, 0]
    assert torch.equal(image[~hidden], batch["data"][:, 0][~hidden])
    assert not (image[hidden] == batch["data"][:, 0][hidden]).float().mean() > 0.01


# ---- presets and settings ----


def test_paper_code_warns_and_gives_the_documented_values(make_trainer):
    trainer = ready(make_trainer, "medcontext.preset=paper_code")
    s = trainer.medcontext
    assert (s.beta, s.consistency, s.ramp_fraction, s.fill) == (0.4, "logits_over_norm", 0.0, "zero")
    assert (s.mask_ratio, s.mask_rounding, s.tube, s.mask_per_sample) == (0.4, "floor", True, False)
    assert trainer.mask_block == (16, 4, 4)
    log = Path(trainer.log_file).read_text()
    assert "WARNING: medcontext.preset=paper_code" in log and "close to zero" in log
    trainer.num_iterations_per_epoch = 250
    assert [trainer.teacher_momentum(t) for t in (0, 249, 250)] == [0, pytest.approx(0.996 * 249 / 4999), 0]
    mask = trainer.draw_mask((2, 1, 16, 24, 16))
    assert torch.equal(mask[0], mask[1]) and torch.equal(mask[:, :, 0], mask[:, :, 9])
    assert mask[0, 0, 0].float().mean() == pytest.approx(int(0.4 * 24) / 24)


def test_keys_given_explicitly_win_over_the_preset(make_trainer):
    trainer = ready(make_trainer, "medcontext.beta=0.7 medcontext.preset=paper_code medcontext.tube=false "
                    "medcontext.mask_block=8")  # fmt: skip
    assert trainer.medcontext.beta == 0.7 and trainer.mask_block == (8, 8, 8)
    assert trainer.medcontext.consistency == "logits_over_norm", "the rest of the preset stays"


def test_no_warning_and_the_designs_mask_by_default(make_trainer):
    trainer = ready(make_trainer)
    log = Path(trainer.log_file).read_text()
    assert "WARNING" not in log
    assert "hides 38 of 96 blocks of (4, 4, 4) voxels in a patch of (16, 24, 16)" in log


def test_a_mask_that_hides_nothing_is_warned_about(make_trainer):
    trainer = ready(make_trainer, "medcontext.mask_block=[16,24,16]")
    assert "hides 0 of 1" in Path(trainer.log_file).read_text() and "WARNING" in Path(trainer.log_file).read_text()


def test_a_network_without_strides_is_refused_with_the_reason(make_trainer, tiny):
    plans = tiny.plans()
    del plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"]
    with pytest.raises(NotImplementedError, match="PlainConvUNet has none: use plans of a U-Net"):
        make_trainer(nnUNetTrainerMedContext, plans=plans).initialize()


def test_a_block_with_the_wrong_number_of_edges_is_one_clear_line(make_trainer):
    with pytest.raises(ValueError, match=r"mask_block \[4, 4\] has 2 edges but the patch .* has 3 axes"):
        ready(make_trainer, "medcontext.mask_block=[4,4]")


def test_few_shot_draws_are_nested_stored_and_compared(make_trainer, tmp_path):
    chosen = [make_trainer(nnUNetTrainerMedContext, f"train_cases={n}").do_split() for n in (1, 2, 3, 4)]
    for (small, validation), (large, same_validation) in itertools.pairwise(chosen):
        assert set(small) < set(large) and validation == same_validation
    with pytest.raises(ValueError, match="train_cases=5, but this fold has 4 training cases"):
        make_trainer(nnUNetTrainerMedContext, "train_cases=5").do_split()
    with pytest.raises(ValueError, match="nobody"):
        make_trainer(nnUNetTrainerMedContext, "train_cases=[nobody]").do_split()

    trainer = ready(make_trainer, "train_cases=2")
    trainer.do_split()
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    assert torch.load(tmp_path / "c.pth", weights_only=False)["nnunetv2_ext"]["train_cases"] == chosen[1][0]
    with pytest.raises(ValueError, match=r"train_cases=2.*train_cases=3"):
        make_trainer(nnUNetTrainerMedContext, "train_cases=3", continued=True).load_checkpoint(str(tmp_path / "c.pth"))
    other_fold = make_trainer(nnUNetTrainerMedContext, "train_cases=2", continued=True, fold=1)
    other_fold.load_checkpoint(str(tmp_path / "c.pth"))
    with pytest.raises(ValueError, match="started on"):
        other_fold.do_split()


def test_method_settings_may_not_change_on_continue(make_trainer, tmp_path):
    trainer = ready(make_trainer, "medcontext.beta=0.5")
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    other = make_trainer(nnUNetTrainerMedContext, "medcontext.mask_ratio=0.6", continued=True)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.4.*mask_ratio=0\.6"):
        other.load_checkpoint(str(tmp_path / "c.pth"))


# ---- a whole run ----


def test_a_run_frees_the_teacher_logs_every_figure_and_can_load_the_best_checkpoint(make_trainer, no_pictures):
    trainer = make_trainer(nnUNetTrainerMedContext, "panel_every=1 seed=1 medcontext.masked_every=2")
    trainer.run_training()
    assert trainer.teacher is None
    folder = Path(trainer.output_folder)
    with open(folder / "epochs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for name in (
        "loss/supervised",
        "loss/masked_supervised",
        "loss/consistency",
        "medcontext/momentum",
        "medcontext/ramp",
        "medcontext/disagreement",
        "medcontext/gradient_ratio",
    ):
        assert all(np.isfinite(float(row[name])) for row in rows), name
    assert set(trainer.epoch_log.healthy) == set(trainer.healthy_figures) < set(rows[0])
    assert trainer.epoch_log.without_weight == {"loss/masked_supervised"}
    assert trainer.epoch_log.class_names == list(trainer.dataset_json["labels"])[1:]
    assert float(rows[1]["medcontext/momentum"]) == pytest.approx(1 - 1 / 6), "of the update after step 5"
    assert sorted(p.name for p in folder.glob("panel_*.png")) == ["panel_epoch_0000.png", "panel_epoch_0001.png"]

    stored = torch.load(folder / "checkpoint_best.pth", weights_only=False)
    trainer.load_checkpoint(str(folder / "checkpoint_best.pth"))  # nnUNetv2_train --val_best
    assert_same(stored["network_weights"], state(trainer.network))
    assert "teacher" in stored["nnunetv2_ext"]["methods"]["medcontext"] and trainer.teacher is None, (
        "validation needs none"
    )
