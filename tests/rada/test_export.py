"""One network of three as plain nnU-Net's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_ext.rada.export import drop_semantics, export_network
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
    with pytest.raises(ValueError, match=r"net2 is active \(gate 0\.25\).*--drop-semantics"):
        export_network(weights, "net2")
    data = torch.randn(1, 1, 16, 16, 16)
    closed = drop_semantics({"network_weights": weights, "epoch": 3})["network_weights"]
    assert float(weights["members.1.head.gate"]) == 0.25, "the source is only read"
    plain = stock(rada_architecture(), export_network(closed, "net2"))
    assert torch.equal(plain(data), net.member(1).network(data))
    assert not torch.equal(plain(data), net.forward_member(1, data).full_resolution)
    export_network(weights, "net1")  # its own gate is closed
    reloaded = make_rada_net(semantics=semantics, seed=5)
    reloaded.load_state_dict(closed)
    assert torch.equal(reloaded(data), (sum(member.network(data) for member in net.members)) / 3)


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("student", 3, r"has 3 networks.*net1\|net2\|net3"),
        ("teacher", 3, r"no 'teacher'.*net1\|net2\|net3"),
        ("net4", 3, "no 'net4'"),
        ("net2", 1, "no 'net2'"),
        ("net0", 3, "no 'net0'"),
    ],
)
def test_networks_that_are_not_there(make_rada_net, name: str, number: int, message: str) -> None:
    weights = make_rada_net(semantics="off", num_networks=number).state_dict()
    with pytest.raises(ValueError, match=message):
        export_network(weights, name)


def test_other_models_and_networks_are_refused(make_rada_net: Callable[..., RADANet]) -> None:
    weights = make_rada_net(semantics="off", num_networks=1).state_dict()
    assert export_network(weights, "student").keys() == export_network(weights, "net1").keys()
    assert export_network(weights, "student").keys() == {
        name.removeprefix("members.0.network.") for name in weights if not name.startswith("bank.")
    }
    with pytest.raises(ValueError, match="no semantic heads"):
        drop_semantics({"network_weights": weights})
    with pytest.raises(ValueError, match="not those of a RADA model"):
        export_network({"encoder.weight": torch.zeros(1)}, "net1")
