"""Three plain networks with one face: what they compute, share, save and let nnU-Net switch."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_ext.core.checkpoint import check_weights
from nnunetv2_ext.rada.member import Member
from nnunetv2_ext.rada.network import RADANet, build_rada_network
from nnunetv2_ext.rada.settings import RADASettings

SEMANTICS = ("clip", "learned", "off")


def patches(B: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randn(B, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def open_gates(net: RADANet, value: float = 0.7) -> RADANet:
    for member in net.members:
        nn.init.constant_(member.head.gate, value)
    return net


# ---- what is computed --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_fresh_member_computes_exactly_what_the_plans_network_computes(
    make_rada_net: Callable[..., RADANet], semantics: str, deep_supervision: bool, residual: bool
) -> None:
    net = make_rada_net(residual=residual, deep_supervision=deep_supervision, semantics=semantics)
    for k in range(3):
        mine, plain = net.forward_member(k, patches()).logits, net.member(k).network(patches())
        if not deep_supervision:
            mine, plain = [mine], [plain]
        assert isinstance(mine, list) and len(mine) == len(plain) == (2 if deep_supervision else 1)
        for a, b in zip(mine, plain):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_fresh_prediction_is_exactly_the_plain_networks_mean(
    make_rada_net: Callable[..., RADANet], semantics: str, classes: int
) -> None:
    net = make_rada_net(classes=classes, semantics=semantics).eval()
    with torch.inference_mode():
        first, second, third = (member.network(patches()) for member in net.members)
        assert torch.equal(net(patches()), (first + second + third) / 3)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_fresh_member_changes_no_bit_under_autocast(make_rada_net: Callable[..., RADANet], classes: int) -> None:
    net = make_rada_net(classes=classes)
    with torch.autocast("cpu", torch.bfloat16):
        mine, plain = net.forward_member(0, patches()).full_resolution, net.member(0).network(patches())
        assert mine.dtype == plain.dtype == torch.bfloat16 == net(patches()).dtype and torch.equal(mine, plain)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_single_is_that_network_alone(make_rada_net: Callable[..., RADANet], k: int) -> None:
    net = open_gates(make_rada_net(infer=f"single:{k}"))
    assert torch.equal(net(patches()), net.forward_member(k - 1, patches()).full_resolution)
    assert not torch.equal(net(patches()), net.forward_member(k % 3, patches()).full_resolution)


def test_mean_is_the_mean_of_the_conditioned_logits(make_rada_net: Callable[..., RADANet]) -> None:
    net = open_gates(make_rada_net())
    outputs = [net.forward_member(k, patches()).full_resolution for k in range(3)]
    assert torch.allclose(net(patches()), torch.stack(outputs).mean(0), atol=1e-6)


@pytest.mark.parametrize("infer", ["mean", "single:2"])
@pytest.mark.parametrize("num_networks", [1, 3])
def test_predictions_may_be_modified_in_place(
    make_rada_net: Callable[..., RADANet], infer: str, num_networks: int
) -> None:
    infer = "single:1" if infer != "mean" and num_networks == 1 else infer
    net = open_gates(make_rada_net(infer=infer, num_networks=num_networks)).eval()
    with torch.inference_mode():
        first = net(patches())
        kept = first.clone()
        first += 1
        assert torch.equal(net(patches()), kept)


@pytest.mark.parametrize("training", [True, False])
def test_called_it_returns_one_tensor_also_with_deep_supervision(
    make_rada_net: Callable[..., RADANet], training: bool
) -> None:
    net = make_rada_net(deep_supervision=True).train(training)
    logits = net(patches())
    net.deep_supervision = False
    assert (
        isinstance(logits, torch.Tensor) and logits.shape == (2, 3, 16, 16, 16) and torch.equal(logits, net(patches()))
    )


def test_features_are_the_input_of_the_last_segmentation_layer(make_rada_net: Callable[..., RADANet]) -> None:
    net = make_rada_net(semantics="off")
    output = net.forward_member(2, patches())
    assert output.features.shape == (2, 4, 16, 16, 16)
    assert torch.equal(net.member(2).network.decoder.seg_layers[-1](output.features), output.logits)


def test_own_vectors_condition_their_sample_only(make_rada_net: Callable[..., RADANet]) -> None:
    net = open_gates(make_rada_net())
    own, valid = torch.randn(2, 3, 3, 16), torch.zeros(2, 3, 3, dtype=torch.bool)
    use = torch.ones(2, dtype=torch.bool)
    bank = net.forward_member(0, patches()).full_resolution
    same = net.forward_member(0, patches(), net.conditioning(0, own, valid, use)).full_resolution
    assert torch.allclose(same, bank, atol=1e-4)
    valid[1] = True
    mixed = net.forward_member(0, patches(), net.conditioning(0, own, valid, use)).full_resolution
    assert torch.allclose(mixed[0], bank[0], atol=1e-4) and not torch.allclose(mixed[1], bank[1], atol=1e-2)


def test_a_plane_outside_the_view_does_not_condition(make_rada_net: Callable[..., RADANet]) -> None:
    net = open_gates(make_rada_net())
    own, use = torch.randn(1, 3, 3, 16), torch.ones(1, dtype=torch.bool)
    for k, unseen in enumerate((2, 1, 0)):
        valid = torch.zeros(1, 3, 3, dtype=torch.bool)
        bank = net.conditioning(k, own, valid, use)
        valid[:, unseen] = True
        assert torch.equal(net.conditioning(k, own, valid, use), bank)
        valid[:] = True
        assert not torch.equal(net.conditioning(k, own, valid, use), bank)


# ---- weights -----------------------------------------------------------------------------------------------------
def test_the_networks_start_differently_and_share_no_storage(make_rada_net: Callable[..., RADANet]) -> None:
    net = make_rada_net(semantics="learned")
    for name, first in net.members[0].named_parameters():
        others = [dict(member.named_parameters())[name] for member in net.members]
        assert len({p.data_ptr() for p in others}) == 3 and others[0] is first
        if first.ndim > 1:
            assert not torch.equal(others[0], others[1]) and not torch.equal(others[1], others[2])


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_first_network_starts_as_plain_nnunet(
    rada_architecture: Callable[..., Any], make_rada_net: Callable[..., RADANet], semantics: str
) -> None:
    torch.manual_seed(3)
    plain = nnUNetTrainer.build_network_architecture(None, rada_architecture(), 1, 3, True).state_dict()
    net = make_rada_net(seed=3, semantics=semantics)
    mine = net.member(0).network.state_dict()
    assert mine.keys() == plain.keys() and all(torch.equal(mine[name], plain[name]) for name in plain)


def test_a_members_loss_reaches_no_other_member(make_rada_net: Callable[..., RADANet]) -> None:
    for semantics in SEMANTICS:
        net = make_rada_net(semantics=semantics, deep_supervision=True)
        sum(level.square().mean() for level in net.forward_member(1, patches()).logits).backward()
        assert all(p.grad is None for k in (0, 2) for p in net.members[k].parameters())
        missing = {name for name, p in net.members[1].named_parameters() if p.grad is None}
        assert missing == (set() if semantics == "off" else {"projection.weight", "projection.bias"})


def test_off_leaves_nothing_without_gradient(make_rada_net: Callable[..., RADANet]) -> None:
    net = make_rada_net(semantics="learned", deep_supervision=False)
    output = net.forward_member(0, patches())
    label = torch.ones(2, 16, 16, 16, dtype=torch.int16)
    aligned = net.alignment_loss(0, output.features, label, torch.full_like(label, 15))
    (output.full_resolution.square().mean() + aligned).backward()
    unused = [f"network.decoder.seg_layers.0.{name}" for name in ("weight", "bias")]
    assert [name for name, p in net.members[0].named_parameters() if p.grad is None] == unused


def test_nnunet_switches_deep_supervision_of_all(make_rada_net: Callable[..., RADANet]) -> None:
    net = make_rada_net(semantics="off")
    for enabled in (True, False):
        net.decoder.deep_supervision = enabled  # nnUNetTrainer.set_deep_supervision_enabled
        assert net.decoder.deep_supervision is enabled
        assert [isinstance(net.forward_member(k, patches()).logits, list) for k in range(3)] == [enabled] * 3
    assert not any(name.startswith("decoder") for name in net.state_dict())


# ---- saving ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("inference_mode", [False, True])
def test_state_dict_round_trip(make_rada_net: Callable[..., RADANet], semantics: str, inference_mode: bool) -> None:
    net = make_rada_net(semantics=semantics)
    net.bank.set_views([(0,), (0, 2), (2,)])
    if semantics != "off":
        open_gates(net)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = make_rada_net(semantics=semantics, seed=9)
    state = torch.load(file)
    check_weights(state, other, "checkpoint")
    with torch.inference_mode(inference_mode):
        other.load_state_dict(state)
    assert torch.equal(other(patches()), net(patches())) and other.bank.view_axes == ((0,), (0, 2), (2,))
    with torch.inference_mode(inference_mode):  # the next fold
        other.load_state_dict(make_rada_net(semantics=semantics, seed=4).state_dict())
    assert not torch.equal(other(patches()), net(patches()))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_vectors_of_another_dimension_load(make_rada_net: Callable[..., RADANet], inference_mode: bool) -> None:
    net = make_rada_net()
    net.set_bank(torch.randn(3, 3, 24), torch.randn(3, 24))
    open_gates(net)
    other = make_rada_net(seed=9)  # built for 16 numbers
    parameters = list(other.parameters())
    check_weights(net.state_dict(), other, "checkpoint")
    with torch.inference_mode(inference_mode):
        other.load_state_dict(net.state_dict())
    assert other.bank.text.shape[1] == 24 and other.bank.is_filled and torch.equal(other(patches()), net(patches()))
    # an optimiser's references stay good, and so does training
    assert all(a is b for a, b in zip(parameters, other.parameters()))
    if not inference_mode:
        other.forward_member(0, patches()).full_resolution.mean().backward()
        assert other.member(0).head.merge.weight.grad.shape == (256, 48)


def test_another_number_of_classes_is_an_error(make_rada_net: Callable[..., RADANet]) -> None:
    with pytest.raises(ValueError, match="labels changed"):
        make_rada_net(classes=3).load_state_dict(make_rada_net(classes=4).state_dict(), strict=False)


def test_only_what_depends_on_the_dimension_starts_anew_with_it(make_rada_net: Callable[..., RADANet]) -> None:
    net = make_rada_net()
    member = net.member(1)
    context, merge = member.head.context.weight.clone(), member.head.merge.weight.clone()
    net.set_bank(torch.randn(3, 3, 16), torch.randn(3, 16))
    assert torch.equal(member.head.merge.weight, merge)
    net.set_bank(torch.randn(3, 3, 9), torch.randn(3, 9))
    assert torch.equal(member.head.context.weight, context) and member.head.merge.weight.shape == (256, 18)
    assert member.head.merge.weight.abs().sum() > 0 and member.head.text_adapter.up.weight.abs().sum() > 0
    assert member.projection.out_features == 9 and net(patches()).shape == (2, 3, 16, 16, 16)


def test_copies_and_other_processes_predict_the_same(make_rada_net: Callable[..., RADANet], tmp_path: Path) -> None:
    net = open_gates(make_rada_net()).eval()
    expected = net(patches())
    twin = copy.deepcopy(net)
    assert torch.equal(twin(patches()), expected) and twin.bank is not net.bank
    twin.set_bank(torch.randn(3, 3, 16), torch.randn(3, 16))
    assert torch.equal(net(patches()), expected) and not torch.equal(twin(patches()), expected)
    torch.save((net, patches()), tmp_path / "net.pt")
    script = (
        "import sys, torch; torch.set_num_threads(1); net, data = torch.load('net.pt', weights_only=False); "
        "torch.save((net.eval()(data).detach(), sorted(sys.modules)), 'answer.pt')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=240)
    answer, imported = torch.load(tmp_path / "answer.pt")
    assert torch.allclose(answer, expected, atol=1e-4)
    assert "nnunetv2_ext.rada.network" in imported and not {"open_clip", "safetensors"} & set(imported)


def test_a_compiled_member_computes_the_same_and_keeps_its_names(make_rada_net: Callable[..., RADANet]) -> None:
    net = open_gates(make_rada_net(deep_supervision=True))
    names = list(net.state_dict())
    expected = net.forward_member(0, patches())
    net.member(0).compile(dynamic=False, backend="aot_eager")
    got = net.forward_member(0, patches())
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got.logits, expected.logits))
    got.full_resolution.square().mean().backward()
    assert net.member(0).head.gate.grad is not None and list(net.state_dict()) == names


# ---- mistakes ----------------------------------------------------------------------------------------------------
def test_an_empty_bank_changes_nothing(make_rada_net: Callable[..., RADANet]) -> None:
    net = make_rada_net(semantics="clip")
    net.bank.set(torch.zeros(3, 3, 16), torch.zeros(3, 16))
    with torch.no_grad():
        assert torch.equal(net.forward_member(0, patches()).logits, net.member(0).network(patches()))


def test_a_2d_configuration_is_refused(rada_architecture: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"these plans is 2-D.*3d_fullres"):
        build_rada_network(rada_architecture(patch_size=(16, 16)), 1, 2, True, RADASettings())


def test_a_network_without_encoder_and_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="PlainConvUNet"):
        Member(nn.Conv3d(1, 2, 1), "off")
