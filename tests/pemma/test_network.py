"""The invariants, bit for bit: no step taken, or no new channel there, and the network is its base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_ext.pemma.network import Adapter, LowRank, Now, PEMMANetwork, convolutions, is_present
from nnunetv2_ext.pemma.settings import PEMMASettings

HEADS = 3
KINDS: dict[str, tuple[type, int, dict[str, Any]]] = {
    "2d": (PlainConvUNet, 2, {}),
    "3d": (PlainConvUNet, 3, {}),
    "anisotropic": (PlainConvUNet, 3, {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernel_sizes": [[1, 3, 3]] * 3}),
    "residual": (ResidualEncoderUNet, 2, {}),
    "batch norm": (PlainConvUNet, 2, {"norm_op": nn.BatchNorm2d}),
}


def make_base(kind: str, deep_supervision: bool = False, channels: int = 1) -> nn.Module:
    cls, dim, changes = KINDS[kind]
    torch.manual_seed(3)
    blocks = "n_blocks_per_stage" if cls is ResidualEncoderUNet else "n_conv_per_stage"
    kwargs: dict[str, Any] = {
        "n_stages": 3, "features_per_stage": [4, 8, 16], "conv_op": (None, None, nn.Conv2d, nn.Conv3d)[dim],
        "kernel_sizes": 3, "strides": [1, 2, 2], blocks: [1, 2, 1], "num_classes": HEADS,
        "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
        "norm_op": (None, None, nn.InstanceNorm2d, nn.InstanceNorm3d)[dim], "norm_op_kwargs": {"affine": True},
        "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}, "deep_supervision": deep_supervision,
    }  # fmt: skip
    return cls(channels, **(kwargs | changes))


def images(kind: str, batch: int = 2, channels: int = 2) -> torch.Tensor:
    size = [16] * KINDS[kind][1] if KINDS[kind][1] == 2 else [8, 16, 16]
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(5))


def make(kind: str, deep_supervision: bool = False, old: int = 1, new: int = 1, **settings: Any):
    base = make_base(kind, deep_supervision, old)
    return PEMMANetwork(copy.deepcopy(base), PEMMASettings(**settings), old, new), base.eval()


def learn(network: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.05, weight_decay=0.1)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        output = network(x)
        levels = output if isinstance(output, list) else [output]
        sum((level[:, 1] - 1).square().mean() for level in levels).backward()
        optimizer.step()


def same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_before_the_first_step_it_is_the_base(kind: str, deep_supervision: bool) -> None:
    network, base = make(kind, deep_supervision)
    x, y = images(kind), images(kind)
    y[:, 1] = 0
    for mode in (True, False):
        network.train(mode)
        for image in (x, y):
            assert same(network(image), base(image[:, :1].contiguous()))


@pytest.mark.parametrize("kind", KINDS)
def test_after_training_it_is_the_base_where_the_channel_is_missing(kind: str) -> None:
    network, base = make(kind)
    before = copy.deepcopy(network.base.state_dict())
    x = images(kind)
    learn(network, x)
    assert all(torch.equal(value, before[name]) for name, value in network.base.state_dict().items())
    mixed = x.clone()
    mixed[1, 1] = 0
    with torch.no_grad():
        old = base(x[:, :1].contiguous())
        for mode in (True, False):
            network.train(mode)
            assert not same(network(x), old) and not same(network(mixed)[:1], old[:1])
            assert same(network(mixed)[1:], old[1:]), "a sample of a mixed batch"
        missing = x * torch.tensor([1.0, 0.0]).view(1, 2, *[1] * (x.ndim - 2))
        for mode in (True, False):
            network.train(mode)
            assert same(network(missing), old)


def test_several_channels_on_each_side() -> None:
    network, base = make("2d", old=2, new=2)
    x = images("2d", channels=4)
    learn(network, x)
    one = x.clone()
    one[:, 2] = 0  # the other new one is there
    with torch.no_grad():
        assert not same(network.eval()(one), base(x[:, :2].contiguous()))
        one[:, 3] = 0
        assert same(network(one), base(x[:, :2].contiguous()))


def test_in_bfloat16_too() -> None:
    network, base = make("2d")
    x = images("2d")
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert same(network.train()(x), base(x[:, :1].contiguous()))
        learn(network, x)
        x[1, 1] = 0
        with torch.no_grad():
            assert same(network.train()(x)[1], base(x[:, :1].contiguous())[1])


def test_a_closed_gate_keeps_the_sign_of_zero_and_what_is_not_finite() -> None:
    now = Now()
    now.gate = torch.tensor([False, True]).view(2, 1)
    output = torch.tensor([[-0.0, 0.0, float("inf"), 1.0]]).expand(2, -1)
    added = type("Added", (Adapter,), {"forward": lambda self, z: torch.full_like(z, float("nan"))})(now)
    kept, changed = added.hook(nn.Identity(), (output,), output)
    assert torch.equal(kept.view(torch.int32), output[0].view(torch.int32)) and changed.isnan().all()


def test_infinite_adapters_do_not_reach_a_sample_without_the_channel() -> None:
    """Multiplied by a closed gate they would be NaN."""
    network, base = make("2d")
    with torch.no_grad():
        for parameter in network.adapters.parameters():
            parameter.fill_(float("inf"))
        x = images("2d")
        x[0, 1] = 0
        assert torch.equal(network.train()(x)[0], base(x[:, :1].contiguous())[0])


def test_every_adapter_gets_a_gradient_of_zero_if_nobody_has_the_channel() -> None:
    """DDP waits for each of them."""
    network, _ = make("2d", deep_supervision=True)
    x = images("2d")
    x[:, 1] = 0
    sum(level.square().mean() for level in network.train()(x)).backward()
    for name, parameter in network.named_parameters():
        if name.startswith("base."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_each_part_of_the_adapters_learns() -> None:
    network, _ = make("2d", deep_supervision=True)
    before = copy.deepcopy(network.adapters.state_dict())
    learn(network, images("2d"), 4)
    still = [name for name, value in network.adapters.state_dict().items() if torch.equal(value, before[name])]
    # a bias in front of an instance norm learns nothing; what moves is its weight decay
    assert [name for name in still if not name.endswith("bias")] == []


@pytest.mark.parametrize(
    ("settings", "expected"), [({"rank": 0}, 6771), ({"rank": 4}, 20599), ({"rank": 4, "stem": "first"}, 14367)]
)
def test_the_number_of_values_that_learn_is_that_of_the_specification(settings: dict[str, Any], expected: int) -> None:
    """8-16-32-64 features, two convolutions a stage, five heads; counted by hand."""
    kwargs: dict[str, Any] = {
        "n_stages": 4, "features_per_stage": [8, 16, 32, 64], "conv_op": nn.Conv2d, "kernel_sizes": 3,
        "strides": [1, 2, 2, 2], "n_conv_per_stage": 2, "num_classes": 5, "n_conv_per_stage_decoder": 2,
        "conv_bias": True, "norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU,
    }  # fmt: skip
    network = PEMMANetwork(PlainConvUNet(1, **kwargs), PEMMASettings(**settings), 1, 1)
    assert sum(p.numel() for p in network.base.parameters()) == 121671
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == expected


@torch.no_grad()
def test_a_low_rank_change_folds_into_the_weight() -> None:
    network, _ = make("anisotropic")
    for name, conv in convolutions(network.base).items():
        adapter = network.adapters["convs"][name.replace(".", "-")]
        assert isinstance(adapter, LowRank)
        adapter.b.weight.normal_()
        z = torch.randn(1, conv.in_channels, 4, 8, 8)
        folded = torch.nn.functional.conv3d(z, adapter.merged(conv.weight), conv.bias, conv.stride, conv.padding)
        inner = nn.Conv3d.forward(conv, z)  # without its hook
        assert torch.allclose(folded, inner + adapter(z), atol=1e-4)


def test_a_copy_has_hooks_of_its_own() -> None:
    network, _ = make("2d")
    other = copy.deepcopy(network)
    x = images("2d")
    learn(other, x)
    with torch.no_grad():
        assert same(network.eval()(x), network.base.eval()(x[:, :1].contiguous()))
        assert not same(other.eval()(x), network(x))


def test_a_channel_is_there_if_one_voxel_is() -> None:
    x = torch.zeros(2, 2, 4, 4)
    x[1, 1, 2, 3] = -1e-20
    assert is_present(x).tolist() == [False, True]


def test_refusals_of_the_network() -> None:
    with pytest.raises(ValueError, match=r"needs a base with an encoder.*not Linear"):
        PEMMANetwork(nn.Linear(1, 1), PEMMASettings(), 1, 1)
    with pytest.raises(ValueError, match="has 1 channels and the base 1"):
        PEMMANetwork(make_base("2d"), PEMMASettings(), 1, 0)
    with pytest.raises(ValueError, match="leave nothing to train"):
        PEMMASettings(stem="none", rank=0, train_heads=False)
