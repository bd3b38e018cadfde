"""One network of three as plain nnU-Net's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_ext.rada.export import (
    export_member,
    export_network,
    gate_of_member,
    index_of_network,
    number_of_networks,
    without_semantics,
)
from nnunetv2_ext.rada.network import RADANet

SEMANTICS = ("clip", "learned", "off")


def stock(architecture: Any, weights: dict[str, torch.Tensor]) -> nn.Module:
    """What the stock predictor builds and loads, strictly."""
    network = nnUNetTrainer.build_network_architecture(None, architecture, 1, 3, False)
    network.load_state_dict(weights)
    return network.eval()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_exported_network_predicts_bit_equal_under_the_stock_trainer(
    make_rada_net: Callable[..., RADANet], rada_architecture: Callable[..., Any], semantics: str, residual: bool
) -> None:
    net = make_rada_net(residual=residual, semantics=semantics).eval()
    data = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        for k in range(3):
            plain = stock(rada_architecture(residual), export_network(net.state_dict(), f"net{k + 1}"))
            assert torch.equal(plain(data), net.forward_member(k, data).full_resolution)


@pytest.mark.parametrize("semantics", ["clip", "learned"])
def test_an_active_head_is_refused_unless_it_is_dropped(
    make_rada_net: Callable[..., RADANet], rada_architecture: Callable[..., Any], semantics: str
) -> None:
    net = make_rada_net(semantics=semantics).eval()
    nn.init.constant_(net.member(1).head.gate, 0.25)
    weights = net.state_dict()
    assert gate_of_member(weights, 1) == 0.25 and gate_of_member(weights, 0) == 0
    with pytest.raises(ValueError, match=r"net2 is active \(gate 0\.25\).*--drop-semantics"):
        export_network(weights, "net2")
    data = torch.randn(1, 1, 16, 16, 16)
    dropped = export_network(weights, "net2", drop_semantics=True)
    closed = without_semantics(weights)
    assert gate_of_member(closed, 1) == 0 and gate_of_member(weights, 1) == 0.25  # the source is only read
    for exported in (dropped, export_network(closed, "net2")):
        plain = stock(rada_architecture(), exported)
        assert torch.equal(plain(data), net.member(1).network(data))
        assert not torch.equal(plain(data), net.forward_member(1, data).full_resolution)
    export_network(weights, "net1")  # its own gate is closed
    reloaded = make_rada_net(semantics=semantics, seed=5)
    reloaded.load_state_dict(closed)
    assert torch.equal(reloaded(data), (sum(member.network(data) for member in net.members)) / 3)


def test_names_of_networks() -> None:
    assert [index_of_network(f"net{k}", 3) for k in (1, 2, 3)] == [0, 1, 2]
    assert index_of_network("student", 1) == index_of_network("net1", 1) == 0
    for name, number, message in (
        ("student", 3, r"has 3 networks.*net1\|net2\|net3"),
        ("teacher", 3, r"no 'teacher'.*net1\|net2\|net3"),
        ("net4", 3, "no 'net4'"),
        ("net2", 1, "no 'net2'"),
        ("net0", 3, "no 'net0'"),
    ):
        with pytest.raises(ValueError, match=message):
            index_of_network(name, number)


def test_other_models_and_networks_are_refused(make_rada_net: Callable[..., RADANet]) -> None:
    weights = make_rada_net(semantics="off", num_networks=1).state_dict()
    assert number_of_networks(weights) == 1 and export_network(weights, "student").keys() == {
        name.removeprefix("members.0.network.") for name in weights if not name.startswith("bank.")
    }
    with pytest.raises(ValueError, match="no network 2"):
        export_member(weights, 1)
    with pytest.raises(ValueError, match="no semantic heads"):
        without_semantics(weights)
    with pytest.raises(ValueError, match="not those of a RADA model"):
        number_of_networks({"encoder.weight": torch.zeros(1)})
