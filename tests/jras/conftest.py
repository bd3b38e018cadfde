"""A small J-RAS network with a filled bank, and the settings that make J-RAS trainers small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunetv2_ext.jras.bank import PER_GUIDE, GuideBank, stored
from nnunetv2_ext.jras.network import Episode, JRASNetwork
from nnunetv2_ext.jras.settings import JRASSettings

SMALL_JRAS = "jras.key_dim=8 jras.value_dim=4 jras.num_guides=2 jras.bank_size=24"


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


def unet(input_channels: int, heads: int, dim: int, residual: bool = False) -> nn.Module:
    """Three resolutions of 4, 8 and 12 channels."""
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


def random_bank(guides: int, dim: int, channels: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images and masks of three classes, patch 16 per axis; guide i belongs to subject i // 3."""
    generator = torch.Generator().manual_seed(seed)
    lut = torch.zeros(256, 3, dtype=torch.uint8)
    lut[[0, 1, 2], [0, 1, 2]] = 1
    labels = torch.randint(0, 3, (guides, *(16,) * dim), dtype=torch.uint8, generator=generator)
    images = torch.randn(guides, channels, *(16,) * dim, generator=generator)
    return stored(images, labels, torch.arange(guides) // 3, lut)


def random_episode(batch: int, guides: int, dim: int, seed: int = 0) -> Episode:
    """As `random_bank`; all samples read."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, guides, 1, *(16,) * dim)
    labels = torch.randint(0, 3, shape, generator=generator)
    masks = torch.cat([(labels == n).float() for n in range(3)], 2)
    known = torch.ones(shape, dtype=torch.bool)
    return Episode(torch.randn(shape, generator=generator), masks, known, torch.ones(batch, dtype=torch.bool))


@pytest.fixture
def make_network() -> Callable[..., JRASNetwork]:
    """``make_network(dim=, guides=, residual=, input_channels=, moved=, **settings)``.

    Image channel 1, heads 3, patch 16 per axis, bank of `random_bank`. If `moved`, the further columns are not zero.
    """

    def make(
        dim: int = 2,
        guides: int = 12,
        residual: bool = False,
        input_channels: int = 1,
        seed: int = 0,
        moved: bool = True,
        **settings,
    ) -> JRASNetwork:
        torch.manual_seed(seed)
        chosen = JRASSettings(**{"key_dim": 8, "value_dim": 4, "num_guides": 3} | settings)
        backbone = unet(input_channels, 3, dim, residual)
        network = JRASNetwork(backbone, chosen, image_channels=1, heads=3, patch_size=(16,) * dim)
        if moved:
            for columns in network.columns.values():
                nn.init.normal_(columns.weight, std=0.3)
        if guides:
            network.bank.fill(random_bank(guides, dim))
        return network

    return make
