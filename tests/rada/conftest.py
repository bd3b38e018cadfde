"""Small networks of RADA, built as the trainer builds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nnunetv2_ext.rada.network import RADANet, build_rada_network
from nnunetv2_ext.rada.settings import RADASettings
from tests.conftest import TinyDataset
from tests.rada.sparse_data import make_sparse_tiny
from tests.rada.tiny_clip import said, tiny_clip  # noqa: F401 - fixtures
from tests.rada.trainers import make_rada  # noqa: F401 - fixture

_UNET = "dynamic_network_architectures.architectures.unet."
TINY_DIM = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def architecture(residual: bool = False, patch_size: tuple[int, ...] = (16, 16, 16), stages: int = 3) -> Any:
    """What a configuration of nnU-Net's plans says about its network."""
    dim = len(patch_size)
    blocks = {"n_blocks_per_stage" if residual else "n_conv_per_stage": [1] * stages}
    return SimpleNamespace(
        patch_size=list(patch_size),
        network_arch_class_name=_UNET + ("ResidualEncoderUNet" if residual else "PlainConvUNet"),
        network_arch_init_kwargs_req_import=["conv_op", "norm_op", "dropout_op", "nonlin"],
        network_arch_init_kwargs={
            "n_stages": stages,
            "features_per_stage": [4, 8, 12, 12][:stages],
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * stages,
            "strides": [[1] * dim] + [[2] * dim] * (stages - 1),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
            **blocks,
        },
    )


@pytest.fixture(scope="session")
def rada_architecture() -> Callable[..., Any]:
    """``rada_architecture(residual=, patch_size=, stages=)``: stands for a ConfigurationManager."""
    return architecture


@pytest.fixture(scope="session")
def make_rada_net() -> Callable[..., RADANet]:
    """``make_rada_net(classes=, residual=, deep_supervision=, seed=, stages=, **settings)``; one input channel.

    With `clip` its bank is filled with random vectors.
    """

    def make(
        classes: int = 3,
        residual: bool = False,
        deep_supervision: bool = False,
        seed: int = 0,
        stages: int = 3,
        **settings: Any,
    ) -> RADANet:
        torch.manual_seed(seed)
        chosen = RADASettings(**settings)
        net = build_rada_network(
            architecture(residual, stages=stages), 1, classes, deep_supervision, chosen, dimension=TINY_DIM
        )
        if chosen.semantics == "clip":
            image, text = torch.randn(3, classes, TINY_DIM), torch.randn(classes, TINY_DIM)
            net.set_bank(F.normalize(image, dim=-1), F.normalize(text, dim=-1))
        return net

    return make


@pytest.fixture(scope="session")
def sparse_tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Eight training phantoms, four of them with three planes, the others unlabelled; see `make_sparse_tiny`."""
    return make_sparse_tiny(tmp_path_factory.mktemp("sparse"))
