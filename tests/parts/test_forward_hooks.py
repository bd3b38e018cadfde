"""A hook that came after another network of the same class was compiled is obeyed."""

import copy

import pytest
import torch
from torch import nn

from nnunetv2_ext.parts.forward_hooks import register_forward_hook


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_code_of_a_network_without_hooks_is_not_taken(compiled_first: bool) -> None:
    torch._dynamo.reset()
    x, plain = torch.randn(2, 4), Network()
    hooked = copy.deepcopy(plain)
    compiled = torch.compile(plain, backend="eager")
    if compiled_first:
        compiled(x)
    register_forward_hook(hooked.first, lambda module, inputs, output: 2 * output)
    assert torch.equal(torch.compile(hooked, backend="eager")(x), hooked(x))
    assert torch.equal(compiled(x), plain(x))
    assert not torch.equal(plain(x), hooked(x))
