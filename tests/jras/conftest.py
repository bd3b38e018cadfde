"""A small J-RAS network with a filled bank, and the settings that make J-RAS trainers small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_ext.jras.bank import PER_GUIDE, GuideBank
from nnunetv2_ext.jras.network import JRASNetwork
from nnunetv2_ext.jras.settings import JRASSettings

SMALL_JRAS = "jras.retriever_widths=[4,8,8] jras.guide_widths=[4,8,8] jras.key_dim=16 jras.bank_size=24"


def empty(bank: GuideBank) -> None:
    """Take every guide out of a bank, as loading a stripped model does."""
    bank.load_state_dict({name: value[: 0 if name in PER_GUIDE else None] for name, value in bank.state_dict().items()})


@pytest.fixture(scope="session")
def small_jras() -> str:
    """Settings text."""
    return SMALL_JRAS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _unet(input_channels: int, heads: int, dim: int, residual: bool) -> nn.Module:
    common = {
        "input_channels": input_channels,
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "conv_op": {2: nn.Conv2d, 3: nn.Conv3d}[dim],
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        "num_classes": heads,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dim],
        "norm_op_kwargs": {"affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    if residual:
        return ResidualEncoderUNet(**common, n_blocks_per_stage=1)
    return PlainConvUNet(**common, n_conv_per_stage=1)


@pytest.fixture
def make_network() -> Callable[..., JRASNetwork]:
    """``make_network(dim=, guides=, residual=, input_channels=, **settings)``.

    Image channel 1, heads 3, patch 16 per axis. The bank holds random images and masks; guide i belongs to subject
    i // 3.
    """

    def make(
        dim: int = 3, guides: int = 12, residual: bool = False, input_channels: int = 1, seed: int = 0, **settings
    ) -> JRASNetwork:
        torch.manual_seed(seed)
        chosen = JRASSettings(**{"retriever_widths": [4, 8, 8], "guide_widths": [4, 8, 8], "key_dim": 16} | settings)
        extra = 1 + 3 if chosen.fusion == "concat" else 0
        network = JRASNetwork(
            _unet(input_channels + extra, 3, dim, residual), chosen, image_channels=1, heads=3, patch_size=(16,) * dim
        )
        if guides:
            lut = torch.zeros(256, 3, dtype=torch.uint8)
            lut[[0, 1, 2], [0, 1, 2]] = 1
            network.bank.fill(
                torch.randn(guides, 1, *network.low_shape),
                torch.randint(0, 3, (guides, *network.low_shape), dtype=torch.uint8),
                torch.arange(guides) // 3,
                lut,
            )
            network.bank.set_keys(network.embed_bank())
        return network

    return make
