"""Med2DSegNet against its formulas and a slow reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from nnunetv2_ext.med2d.network import BLOCKS, WIDTHS, Med2DSegNet, MedBlock
from nnunetv2_ext.med2d.plans import architecture


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("i", "o", "stride"), [(8, 16, 2), (16, 16, 1), (64, 96, 2), (96, 96, 1), (124, 124, 1)])
def test_a_block_has_the_parameters_of_the_formula(i: int, o: int, stride: int) -> None:
    m, r = 6 * i, max(4, i // 4)
    counted = m * i + 49 * m + (2 * m * r + m + r) + m * o + 4 * m + 2 * o
    assert parameters(MedBlock(i, o, stride)) == counted


def test_three_channels_and_two_classes_give_the_papers_number() -> None:
    network = Med2DSegNet(3, 2)
    assert parameters(network) == 2_076_935
    assert abs(parameters(network) / 2.07e6 - 1) < 0.01  # the paper: 2.07 million
    decoder = sum(9 * (a + b) * b + 2 * b + 2 * (b + 1) for a, b in zip(WIDTHS[:0:-1], WIDTHS[-2::-1]))
    assert parameters(network.decoder) == decoder


def slow_block(block: MedBlock, x: torch.Tensor, stride: int) -> torch.Tensor:
    """The formulas, channel by channel and pixel by pixel, in eval mode."""

    def normed(norm: Any, channel: int, value: torch.Tensor) -> torch.Tensor:
        scale = norm.weight[channel] / torch.sqrt(norm.running_var[channel] + norm.eps)
        return scale * (value - norm.running_mean[channel]) + norm.bias[channel]

    expand, n1, _ = block.expand
    depth, n2, _ = block.depthwise
    reduce, n3 = block.reduce
    samples = []
    for image in x:
        inner = []
        for c in range(expand.out_channels):
            u = sum(expand.weight[c, i, 0, 0] * image[i] for i in range(len(image)))
            u = normed(n1, c, u).clamp(min=0)
            height, width = u.shape
            v = torch.zeros(math.ceil(height / stride), math.ceil(width / stride))
            for a in range(v.shape[0]):
                for b in range(v.shape[1]):
                    total = torch.zeros(())
                    for da in range(-3, 4):
                        for db in range(-3, 4):
                            row, column = a * stride + da, b * stride + db
                            if 0 <= row < height and 0 <= column < width:
                                total = total + depth.weight[c, 0, da + 3, db + 3] * u[row, column]
                    v[a, b] = total
            inner.append(normed(n2, c, v).clamp(min=0))
        v = torch.stack(inner)
        mean = v.mean((1, 2))
        if block.gap == "gate":
            first, _, second = block.gate
            hidden = (first.weight @ mean + first.bias).clamp(min=0)
            v = v * torch.sigmoid(second.weight @ hidden + second.bias)[:, None, None]
        elif block.gap == "add":
            v = v + mean[:, None, None]
        y = torch.stack(
            [
                normed(n3, o, sum(reduce.weight[o, c, 0, 0] * v[c] for c in range(len(v))))
                for o in range(reduce.out_channels)
            ]
        )
        samples.append(image + y if block.has_residual else y)
    return torch.stack(samples)


@pytest.mark.parametrize("gap", ["gate", "add", "none"])
@pytest.mark.parametrize(
    ("i", "o", "stride", "size"), [(2, 2, 1, (5, 5)), (2, 3, 2, (5, 4)), (2, 2, 2, (4, 4)), (2, 3, 1, (4, 5))]
)
def test_a_block_is_its_slow_reference(gap: Any, i: int, o: int, stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = MedBlock(i, o, stride, expansion=2, gap=gap)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    block.eval()
    x = torch.randn(2, i, *size)
    with torch.no_grad():
        assert torch.allclose(block(x), slow_block(block, x, stride), atol=1e-5)
    assert block.has_residual == (i == o and stride == 1)


def test_an_open_gate_is_no_gate_and_adding_the_mean_doubles_a_constant() -> None:
    torch.manual_seed(0)
    gate, none, add = (MedBlock(4, 4, gap=gap).eval() for gap in ("gate", "none", "add"))
    none.load_state_dict(gate.state_dict(), strict=False)
    assert gate.gate is not None
    nn.init.zeros_(gate.gate[2].weight)
    nn.init.constant_(gate.gate[2].bias, 1e4)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(gate(x), none(x))
        add.depthwise = nn.Identity()
        add.expand = nn.Identity()
        add.reduce = nn.Identity()
        constant = torch.full((1, 4, 3, 3), 0.7)
        assert torch.allclose(add(constant), 3 * constant)  # the residual, and twice the constant


@pytest.mark.parametrize("size", [(32, 64), (96, 96)])
def test_skips_and_outputs_have_nnunets_shapes(size: tuple[int, int]) -> None:
    network = Med2DSegNet(1, 6, deep_supervision=True)
    x = torch.randn(2, 1, *size)
    skips = network.encoder(x)
    assert [s.shape[1] for s in skips] == network.encoder.output_channels == list(WIDTHS)
    assert [tuple(s.shape[2:]) for s in skips] == [tuple(n // 2**i for n in size) for i in range(6)]
    assert [tuple(o.shape) for o in network(x)] == [(2, 6, *(n // 2**i for n in size)) for i in range(5)]
    full = network(x)[0]
    network.decoder.deep_supervision = False
    network.eval()
    with torch.no_grad():
        assert network(x).shape == full.shape
        assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"features_per_stage": [8, 16], "n_blocks_per_stage": [1, 1], "strides": [[1, 1], [2, 2]]},
            "at least 3 stages",
        ),
        ({"features_per_stage": [4, *WIDTHS[1:]]}, "at least 8 channels"),
        ({"n_blocks_per_stage": BLOCKS[1:]}, "6 widths, 5 numbers"),
        ({"strides": [[1, 1], *[[2, 1]] * 5]}, "pairs of equal numbers"),
        ({"gap": "max"}, "gap=gate"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Med2DSegNet(1, 2, **change)


def configuration(patch: list[int], stages: int) -> dict[str, Any]:
    strides = [[1] * len(patch)] + [[2] * len(patch)] * (stages - 1)
    return {"patch_size": patch, "architecture": {"arch_kwargs": {"strides": strides}}}


@pytest.mark.parametrize(("patch", "stages", "kept"), [([96, 96], 4, 4), ([352, 352], 6, 6), ([512, 512], 8, 6)])
def test_the_plans_decide_how_many_stages(patch: list[int], stages: int, kept: int) -> None:
    kwargs = architecture(configuration(patch, stages))["arch_kwargs"]
    assert kwargs["features_per_stage"] == list(WIDTHS[:kept])
    assert kwargs["strides"] == [[1, 1], *[[2, 2]] * (kept - 1)]


@pytest.mark.parametrize(
    ("patch", "stages", "options", "words"),
    [
        ([100, 90], 6, {}, r"the nearest is \[96, 96\]"),
        ([64, 64, 64], 5, {}, "use -c 2d"),
        ([64, 64], 2, {}, "at least 3 stages"),
        ([64, 64], 5, {"width": "wide"}, "--width is a factor"),
        ([64, 64], 5, {"gap": "mean"}, "gap=gate"),
    ],
)
def test_plans_that_do_not_fit_are_refused(patch: list[int], stages: int, options: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        architecture(configuration(patch, stages), "", options)
