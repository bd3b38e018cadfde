"""The step: what reaches which network, what does not, and that it is plain nnU-Net where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.parts.pseudo_labels import entropy_ceiling, teacher_weight
from nnunetv2_ext.rada.views import AXES, INSIDE
from tests.rada.trainers import IGNORE, mixed_keys, sparse_batch

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def started(make_rada) -> Callable[..., Any]:
    """``started(settings)``: a trainer after on_train_start, in train mode."""

    def start(settings: str = "", **options: Any) -> Any:
        trainer = make_rada(settings, **options)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer

    return start


def gradients(trainer: Any) -> list[list[torch.Tensor]]:
    return [[p.grad.clone() for p in m.parameters() if p.grad is not None] for m in trainer.rada_network.members]


def backward(trainer: Any, batch: dict[str, Any], number: int | None = None) -> None:
    """Gradients of the passes of a step, or of network ``number``'s pass alone."""
    trainer.optimizer.zero_grad()
    for loss_pass in trainer.loss_passes(Batch.from_loader(batch, trainer.device)):
        terms = loss_pass.compute().values()  # of every pass: the first network teaches from its own
        if terms and (number is None or loss_pass.name == f"network {number}"):
            sum(value * weight for value, weight in terms).backward()


@pytest.mark.parametrize("deep_supervision", ["pool", "off"])
def test_dice_is_taken_over_the_batch_whatever_the_plans_say(started, sparse_tiny, deep_supervision):
    losses = []
    for batch_dice in (False, True):
        plans = sparse_tiny.plans()
        plans["configurations"]["3d_fullres"]["batch_dice"] = batch_dice
        trainer = started(f"rada.lambda_max=0 rada.deep_supervision={deep_supervision}", plans=plans)
        labelled = mixed_keys(trainer)[0]
        losses.append(trainer.train_step(sparse_batch(trainer, [labelled] * 2))["loss"])
    assert losses[0] == losses[1]


def without_bits(target: torch.Tensor) -> torch.Tensor:
    return torch.where((target[:, 1:] & AXES) != 0, target[:, :1], IGNORE)


def test_one_network_without_co_training_is_plain_nnunet_bit_for_bit(make_trainer, make_rada, sparse_tiny):
    plans = sparse_tiny.plans()
    plans["configurations"]["3d_fullres"]["batch_dice"] = True
    plain = make_trainer(nnUNetTrainer, dataset=sparse_tiny, plans=plans)
    plain.enable_deep_supervision = False
    ours = make_rada("rada.num_networks=1 rada.lambda_max=0 rada.deep_supervision=off", plans=plans)
    ours.labelled_cases, ours.masks = frozenset({"a"}), (AXES,)
    batches = [sparse_batch(ours, ["a", "b"], seed) for seed in range(5)]
    assert all((without_bits(batch["target"]) != IGNORE).any() for batch in batches)
    for trainer in (plain, ours):
        randomness.seed_everything(3)
        trainer.initialize()
    for batch in batches:
        one = plain.train_step(batch | {"target": without_bits(batch["target"])})
        other = ours.train_step(batch)
        assert one["loss"] == other["loss"]
    expected = {f"members.0.network.{name}": value for name, value in plain.network.state_dict().items()}
    found = {name: v for name, v in ours.network.state_dict().items() if name.startswith("members.")}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_one_network_with_pooled_supervision_is_plain_nnunet_where_each_block_has_one_label(
    make_trainer, make_rada, sparse_tiny
):
    # there nearest neighbour and majority are the same, at every resolution
    plans = sparse_tiny.plans()
    configuration = plans["configurations"]["3d_fullres"]
    configuration["batch_dice"] = True
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 1]]
    configuration["architecture"]["arch_kwargs"] |= {
        "strides": strides,
        "n_stages": 4,
        "features_per_stage": [4] * 4,
        "kernel_sizes": [[3, 3, 3]] * 4,
        "n_conv_per_stage": [1] * 4,
        "n_conv_per_stage_decoder": [1] * 3,
    }
    plain = make_trainer(nnUNetTrainer, dataset=sparse_tiny, plans=plans)
    ours = make_rada("rada.num_networks=1 rada.lambda_max=0", plans=plans)
    ours.labelled_cases, ours.masks = frozenset({"a", "b"}), (AXES,)
    batches = [sparse_batch(ours, ["a", "b"], seed, bits=AXES) for seed in range(3)]
    for trainer in (plain, ours):
        randomness.seed_everything(3)
        trainer.initialize()
        trainer.set_deep_supervision_enabled(True)
    for batch in batches:
        target = batch["target"]
        blocks = target[:, :1, ::4, ::4, ::4]
        blocks[:, :, :2] = IGNORE  # and blocks without any annotation
        target[:, :1] = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
        label = target[:, :1].clone()
        one = plain.train_step(batch | {"target": [label, label[..., ::2, ::2, ::2], label[..., ::4, ::4, ::4]]})
        other = ours.train_step(batch)
        assert one["loss"] == other["loss"]
    assert len(ours.pooled_loss.weight_factors) == 2
    expected = {f"members.0.network.{name}": value for name, value in plain.network.state_dict().items()}
    found = ours.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_plane_outside_a_networks_view_gives_it_no_gradient(started):
    trainer = started("rada.lambda_max=0")
    assert trainer.masks == (0b011, 0b101, 0b110)
    labelled = mixed_keys(trainer)[0]
    for axis, blind in ((2, 1), (1, 2), (0, 3)):
        batch = sparse_batch(trainer, [labelled] * 2, bits=1 << axis)
        for number in (1, 2, 3):
            backward(trainer, batch, number)
            total = sum(float(g.abs().sum()) for g in gradients(trainer)[number - 1])
            assert (total == 0) == (number == blind)


def test_what_is_not_annotated_and_what_is_outside_changes_no_loss_and_no_gradient(started):
    trainer = started()
    batch = sparse_batch(trainer, mixed_keys(trainer))
    batch["target"][:, :, :3] = 0  # padding: label 0 and no bit
    other = {**batch, "target": batch["target"].clone()}
    hidden = (other["target"][:, 1] & AXES) == 0
    outside = other["target"][:, 1] == 0
    assert hidden[0].any() and outside.any()
    # whatever label augmentation turned into a voxel without a bit, and into the padding
    other["target"][:, 0][outside] = 1
    results = []
    for version in (batch, other):
        trainer.optimizer.zero_grad()
        backward(trainer, version)
        results.append(gradients(trainer))
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_each_pass_touches_its_own_network_and_together_they_are_the_joint_backward(started):
    trainer = started()
    trainer.global_step = 5  # lambda is 0.07 here
    batch = sparse_batch(trainer, mixed_keys(trainer))
    backward(trainer, batch)
    sequential = gradients(trainer)
    for number in (1, 2, 3):
        backward(trainer, batch, number)
        touched = [any(float(g.abs().sum()) > 0 for g in grads) for grads in gradients(trainer)]
        assert touched == [number == n for n in (1, 2, 3)]
    trainer.optimizer.zero_grad()
    passes = trainer.loss_passes(Batch.from_loader(batch, trainer.device))
    terms = [term for loss_pass in passes for term in loss_pass.compute().values()]
    torch.stack([value * weight for value, weight in terms]).sum().backward()
    for one, two in zip(sequential, gradients(trainer), strict=True):
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b)


def test_clipping_one_network_leaves_the_others_gradients_alone(started):
    trainer = started("rada.clip_norm=1")
    backward(trainer, sparse_batch(trainer, mixed_keys(trainer)))
    members = trainer.rada_network.members
    for p in members[0].parameters():
        p.grad = None if p.grad is None else p.grad * 1e4
    for member in list(members)[1:]:
        for p in member.parameters():
            p.grad = None if p.grad is None else p.grad * 1e-4
    before = gradients(trainer)
    norm = trainer.clip_gradients()
    after = gradients(trainer)
    assert float(norm) == pytest.approx(float(torch.stack([g.norm() for gs in before for g in gs]).norm()), rel=1e-4)
    assert float(torch.stack([g.norm() for g in after[0]]).norm()) == pytest.approx(1, rel=1e-4)
    for one, two in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def count_passes(trainer, monkeypatch):
    """Records of every forward of a network: its number, with gradient, in training mode, samples."""
    calls: list[tuple[int, bool, bool, int]] = []
    for k, member in enumerate(trainer.rada_network.members):

        def counted(data, vectors=None, k=k, member=member, original=member.forward):
            calls.append((k, torch.is_grad_enabled(), member.training, len(data)))
            return original(data, vectors)

        monkeypatch.setattr(member, "forward", counted)
    return calls


@pytest.mark.parametrize(("passes", "by_network"), [(0, (0, 1, 1)), (2, (3, 3, 3))])
def test_every_network_teaches_once_per_step_without_gradient(started, monkeypatch, passes, by_network):
    trainer = started(f"rada.passes={passes}")
    calls = count_passes(trainer, monkeypatch)
    keys = mixed_keys(trainer)
    trainer.train_step(sparse_batch(trainer, [keys[0], *keys]))
    for k in range(3):
        taught = [call for call in calls if call[0] == k and not call[1]]
        learnt = [call for call in calls if call[0] == k and call[1]]
        # eval mode, the unlabelled sample alone; without noise the first network teaches from its training pass
        assert taught == [(k, False, False, 1)] * by_network[k]
        assert learnt == [(k, True, True, 3)]
    assert trainer.rada_network.training


@pytest.mark.parametrize("labelled_only", [False, True])
def test_teaching_from_the_training_pass_is_teaching_from_a_pass_of_its_own(started, monkeypatch, labelled_only):
    trainer = started("rada.gate_base=2")
    keys = mixed_keys(trainer)
    batch = Batch.from_loader(sparse_batch(trainer, [keys[0]] * 2 if labelled_only else keys), trainer.device)

    def terms(teaches):
        monkeypatch.setattr(type(trainer), "training_pass_teaches", lambda self, batch, rows: teaches)
        found = {}
        for one in trainer.loss_passes(batch):
            found |= {name: float(term.value.detach()) for name, term in one.compute().items()}
        return found | trainer._figures.read()

    assert terms(True) == pytest.approx(terms(False), rel=1e-5)


@pytest.mark.parametrize("module", [torch.nn.Dropout3d(), torch.nn.BatchNorm3d(1)])
def test_a_network_that_acts_differently_in_training_teaches_in_eval_mode(started, monkeypatch, module):
    trainer = started()
    trainer.rada_network.members[0].add_module("further", module)
    trainer.__dict__.pop("_depends_on_mode", None)
    calls = count_passes(trainer, monkeypatch)
    trainer.train_step(sparse_batch(trainer, mixed_keys(trainer)))
    assert (0, False, False, 1) in calls


def test_without_unlabelled_samples_the_unannotated_voxels_of_all_are_taught(started):
    trainer = started()
    labelled = mixed_keys(trainer)[0]
    figures = trainer.train_step(sparse_batch(trainer, [labelled] * 2))
    assert float(figures["co_training_1"]) > 0


@pytest.mark.parametrize("case", ["all ignored", "no foreground", "no plane in the patch", "padding only"])
def test_batches_without_anything_to_learn_stay_finite(started, case):
    trainer = started()
    keys = mixed_keys(trainer)
    batch = sparse_batch(trainer, keys)
    target = batch["target"]
    if case == "all ignored":
        target[:, 0], target[:, 1] = IGNORE, INSIDE
    elif case == "no foreground":
        target[:, 0] = torch.where(target[:, 0] == IGNORE, IGNORE, 0)
    elif case == "no plane in the patch":
        target[:, 1] = INSIDE
    else:
        target[:] = 0
    before = [p.clone() for p in trainer.network.parameters()]
    figures = trainer.train_step(batch)
    assert all(bool(torch.isfinite(torch.as_tensor(float(value)))) for value in figures.values())
    after = list(trainer.network.parameters())
    assert all(bool(torch.isfinite(p).all()) for p in after)
    if case in ("no foreground", "all ignored"):
        assert any(not torch.equal(a, b) for a, b in zip(before, after))
    if case == "padding only":
        assert float(figures["grad_norm"]) == 0


def test_supervised_and_teaching_weights_follow_the_share_of_the_training_done(started):
    trainer = started("num_epochs=2 num_iterations_per_epoch=4 rada.gate_base=2")
    batch = Batch.from_loader(sparse_batch(trainer, mixed_keys(trainer)), trainer.device)
    for step in (0, 2, 6, 8):
        trainer.global_step = step
        t = step / 8
        passes = trainer.loss_passes(batch)
        passes[0].compute()
        terms = passes[1].compute()
        weight = teacher_weight(t, 0.1)
        assert terms["supervised_1"].weight == pytest.approx(1 - 2 * weight)
        assert terms["co_training_1"].weight == pytest.approx(weight)
        assert trainer.entropy_ceiling == pytest.approx(entropy_ceiling(t, 2))


def test_pooled_supervision_uses_every_resolution_but_the_lowest(started):
    trainer = started("rada.lambda_max=0")
    layers = trainer.rada_network.members[0].network.decoder.seg_layers
    trainer.train_step(sparse_batch(trainer, mixed_keys(trainer)))
    assert [layer.weight.grad is None for layer in layers] == [True, False]
    assert trainer.strides == [[1, 1, 1]] and trainer.pooled_loss.weight_factors == (1.0,)


def test_the_networks_start_apart_and_share_nothing(started):
    members = started().rada_network.members
    storages = [{p.data_ptr() for p in member.parameters()} for member in members]
    assert not storages[0] & storages[1] and not storages[1] & storages[2] and not storages[0] & storages[2]
    first = [next(member.parameters()) for member in members]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_an_overflow_in_one_network_skips_the_step_of_all(started):
    """As under AMP: one scaler over three sequential passes; the networks stay finite and together."""
    trainer = started()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plain = started()
    batch = sparse_batch(trainer, mixed_keys(trainer))
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    parameter = next(trainer.rada_network.members[1].parameters())
    hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
    figures = trainer.train_step(batch)
    hook.remove()
    assert not np.isfinite(figures["grad_norm"]) and all(np.isfinite(figures[f"supervised_{k}"]) for k in (1, 2, 3))
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())
    assert trainer.grad_scaler.get_scale() == 2.0**7 and trainer.global_step == 1
    assert not any(momentum for momentum in trainer.optimizer.state.values())
    trainer.global_step = 0  # the ramp of co-training counts skipped steps too; for the comparison it must not
    figures, expected = trainer.train_step(batch), plain.train_step(batch)
    # a power of two scales without rounding: the step that follows is the one without a scaler
    assert figures["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    for one, other in zip(trainer.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(one, other)
        assert bool(torch.isfinite(one).all())
    assert any(not torch.equal(v, before[name]) for name, v in trainer.network.state_dict().items())


@pytest.mark.parametrize("deep_supervision", ["pool", "off"])
def test_a_compiled_training_is_the_plain_one(started, monkeypatch, deep_supervision):
    """The branch nnU-Net takes on a GPU, with the compiler's front end and no code generation."""
    settings = f"rada.deep_supervision={deep_supervision}"
    plain = started(settings)
    torch._dynamo.reset()
    compiled: list[str] = []
    original = torch.compile

    def eager(model: Any, *args: Any, **options: Any) -> Any:
        compiled.append(getattr(getattr(model, "__self__", model), "__class__", type(model)).__name__)
        return original(model, *args, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(type(plain), "_may_compile", lambda self: True)
    trainer = started(settings)
    assert sorted(set(compiled)) == ["Member", "MemoryEfficientSoftDiceLoss"] and compiled.count("Member") == 3
    assert list(trainer.network.state_dict()) == list(plain.network.state_dict())  # no _orig_mod in a checkpoint
    batch = sparse_batch(trainer, mixed_keys(trainer))
    for _ in range(2):
        figures, expected = trainer.train_step(batch), plain.train_step(batch)
        assert {k: float(v) for k, v in figures.items()} == pytest.approx({k: float(v) for k, v in expected.items()})
    for one, other in zip(trainer.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize("semantics", ["off", "clip"])
def test_compiled_in_place_the_networks_share_graphs_and_keep_the_names_of_their_weights(make_rada_net, semantics):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    net = make_rada_net(semantics=semantics, deep_supervision=True)
    names, data = list(net.state_dict()), torch.randn(2, 1, 16, 16, 16)
    expected = [net.forward_member(k, data).full_resolution for k in range(3)]
    for member in net.members:
        member.compile(dynamic=False, backend="eager")
    for k in range(3):
        torch.testing.assert_close(net.forward_member(k, data).full_resolution, expected[k])
    # a graph for each network would reach torch.compile's limit of eight, and the rest would run uncompiled
    assert counters["stats"]["unique_graphs"] == 1
    assert list(net.state_dict()) == names
    torch._dynamo.reset()
