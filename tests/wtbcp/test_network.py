"""Haar bands by hand; three networks of which each learns, and of which the main one predicts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.wtbcp.network import Outputs, WaveletUNet, dice_consistency, haar_bands


def test_the_bands_of_two_by_four_by_hand() -> None:
    low, high = haar_bands(torch.tensor([[[[1.0, 3, 0, 4], [5, 7, 8, 0]]]]))
    assert low.tolist() == [[[[4, 4, 3, 3], [4, 4, 3, 3]]]]
    assert high.tolist() == [[[[-3, -1, -3, 1], [1, 3, 5, -3]]]]


def test_the_bands_are_those_of_the_transform() -> None:
    """From the coefficients: each detail band transformed back by itself, and their sum."""
    x = np.random.RandomState(0).randn(4, 6, 2)
    pair = {0: np.array([1, 1]) / np.sqrt(2), 1: np.array([1, -1]) / np.sqrt(2)}
    bands = {}
    for which in itertools.product((0, 1), repeat=3):
        filters = np.einsum("i,j,k->ijk", *(pair[w] for w in which))
        back = np.zeros_like(x)
        for a, b, c in itertools.product(*(range(0, n, 2) for n in x.shape)):
            block = np.s_[a : a + 2, b : b + 2, c : c + 2]
            back[block] = (x[block] * filters).sum() * filters
        bands[which] = back
    low, high = haar_bands(torch.from_numpy(x)[None, None])
    assert np.allclose(low[0, 0].numpy(), bands[0, 0, 0])
    assert np.allclose(high[0, 0].numpy(), sum(b for which, b in bands.items() if any(which)))


def test_an_axis_of_odd_size_is_left_alone() -> None:
    low, _ = haar_bands(torch.tensor([[[[1.0, 3], [5, 7], [2, 0]]]]))
    assert low.tolist() == [[[[2, 2], [6, 6], [1, 1]]]]


@pytest.fixture
def network(make_trainer) -> WaveletUNet:
    trainer = make_trainer(load_trainer("nnUNetTrainerWTBCP"), "seed=1 wtbcp.mode=wtbcp", "2d")
    arguments = trainer.plans_manager, trainer.configuration_manager, 1, 3
    return trainer.build_network_architecture(*arguments, enable_deep_supervision=False)


def _reached(network: WaveletUNet, value: torch.Tensor) -> set[str]:
    network.zero_grad()
    value.backward()
    moved = {name for name, p in network.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    return {".".join(name.split(".")[:3]) for name in moved}


def test_skips_are_joined_with_the_high_network_above_and_with_the_low_one_below(network) -> None:
    """What the three joints get: at one of three resolutions the high network's skip, at two the low one's."""
    x, got, skips = torch.randn(2, 1, 24, 24), [], {}
    for name in Outputs._fields:
        getattr(network, name).encoder.register_forward_hook(lambda m, i, out, name=name: skips.update({name: out}))
    for joint in network.joints:
        joint.register_forward_hook(lambda module, inputs, output: got.append((inputs[0], output)))
    outputs = network.train()(x)
    assert len(got) == 3
    for level, (other, (joined, _)) in enumerate(zip(("high", "low", "low"), got, strict=True)):
        assert torch.equal(joined, torch.cat((skips["main"][level], skips[other][level]), 1))
    made = [output for _, output in got]
    assert torch.equal(outputs.main, network.main.decoder(made))
    assert torch.equal(outputs.high, network.high.decoder([made[0], *skips["high"][1:]]))
    assert torch.equal(outputs.low, network.low.decoder([skips["low"][0], *made[1:]]))
    assert torch.equal(network.eval()(x), outputs.main)


def test_the_networks_see_the_bands(network) -> None:
    x, seen = torch.randn(2, 1, 24, 24), []
    for part in (network.low, network.high):
        part.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network(x)
    low, high = haar_bands(x)
    assert torch.equal(seen[0], low + 0.2 * high) and torch.equal(seen[1], high + 0.65 * low)


def test_all_three_networks_learn_from_their_own_output_and_from_the_consistency(network) -> None:
    x, valid = torch.randn(2, 1, 24, 24), torch.ones(2, 1, 24, 24, dtype=torch.bool)
    network.train()
    for name in Outputs._fields:
        assert f"{name}.decoder.stages" in _reached(network, getattr(network(x), name).square().mean())
    outputs = network(x)
    reached = _reached(network, dice_consistency(outputs.low, outputs.high, valid, False))
    assert {"low.decoder.stages", "high.decoder.stages", "low.encoder.stages", "high.encoder.stages"} <= reached
    assert not any(name.startswith("main.decoder") for name in reached)


def test_consistency_by_hand() -> None:
    p = torch.tensor([[[0.5, 0.2], [0.5, 0.8]]])
    q = torch.tensor([[[0.9, 0.4], [0.1, 0.6]]])
    valid = torch.tensor([[[True, True]]])
    expected = 1 - 2 * (0.5 * 0.1 + 0.8 * 0.6) / (0.25 + 0.64 + 0.01 + 0.36)
    assert float(dice_consistency(p.log(), q.log(), valid, False)) == pytest.approx(expected, abs=1e-4)
    only = 1 - 2 * 0.48 / (0.64 + 0.36)
    masked = dice_consistency(p.log(), q.log(), torch.tensor([[[False, True]]]), False)
    assert float(masked) == pytest.approx(only, abs=1e-4)
    regions = dice_consistency(p.logit(), q.logit(), valid, True)
    first = 1 - 2 * (0.45 + 0.08) / (0.25 + 0.04 + 0.81 + 0.16)
    assert float(regions) == pytest.approx((first + expected) / 2, abs=1e-4)
