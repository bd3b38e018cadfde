"""Random state: seeding, saving and restoring it, so that a continued training draws what an unbroken one would."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices); nnU-Net's single-threaded loader draws from all three."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_random_state(generator: torch.Generator) -> dict[str, Any]:
    """Everything random of this process: Python, numpy, torch CPU, the current CUDA device, the method's generator."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "method": (generator.device.type, generator.get_state()),
    }


def set_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    """Put back what ``get_random_state`` returned. A method generator of another device type keeps its state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    device, method = state["method"]
    if device == generator.device.type:
        generator.set_state(method.cpu())


def make_repeatable(transform: BasicTransform) -> None:
    """Switch off what makes nnU-Net's augmentation depend on the clock.

    GaussianBlurTransform(benchmark=True) times two implementations and keeps the faster one; they differ in the last
    bits.
    """
    if isinstance(transform, GaussianBlurTransform):
        transform.benchmark = False
    for inner in (*getattr(transform, "transforms", ()), getattr(transform, "transform", None)):
        if isinstance(inner, BasicTransform):
            make_repeatable(inner)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's random numbers start at a seed, and go on afterwards as if nothing was drawn."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
