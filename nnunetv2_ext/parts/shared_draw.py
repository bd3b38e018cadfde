"""One draw of intensities for several samples: their intensity transforms take the same random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnunetv2_ext.core.randomness import drawing_from

PIECES = 6  # of a random curve
CASES_LOOKED_AT = 8  # for the range of intensities
PERCENTILES = 0.5, 99.5


class SharedDraw:
    """nnU-Net's transforms; whatever only changes intensities draws from a seed that is given for each sample.

    At module level, so that worker processes can unpickle it.

    Args:
        transforms: nnU-Net's.
        style_share: chance of a random curve, drawn from the seed.
        limits: ``(C, 2)``, intensities between which the curve bends; outside it goes on with slope 1.

    Attributes:
        seeds: of the samples to come, in order.
    """

    def __init__(self, transforms: BasicTransform | None, style_share: float, limits: npt.NDArray[Any]) -> None:
        whole = transforms.transforms if isinstance(transforms, ComposeTransforms) else [transforms]
        self.steps = [step for step in whole if step is not None]
        self.style_share, self.limits = style_share, limits
        self.seeds: list[int] = []
        intensity = [number for number, step in enumerate(self.steps) if _is_intensity(step)]
        self._shared = (intensity[0], intensity[-1] + 1) if intensity else (0, 0)
        between = self.steps[slice(*self._shared)]
        if not all(_is_intensity(step) for step in between):
            names = ", ".join(type(step).__name__ for step in between if not _is_intensity(step))
            raise ValueError(f"a shared draw needs consecutive intensity transforms, but {names} lies among them")

    def __call__(self, **sample: Any) -> dict[str, Any]:
        seed, (first, end) = self.seeds.pop(0), self._shared
        for step in self.steps[:first]:
            sample = step(**sample)
        with drawing_from(seed):
            for step in self.steps[first:end]:
                sample = step(**sample)
        self._style(sample["image"], seed)
        for step in self.steps[end:]:
            sample = step(**sample)
        return sample

    def _style(self, image: torch.Tensor, seed: int) -> None:
        rng = np.random.default_rng(seed)
        if rng.random() >= self.style_share:
            return
        for channel, (low, high) in zip(image, self.limits):
            knots = np.concatenate(([0.0], np.cumsum(rng.dirichlet(np.ones(PIECES)))))
            if high > low:
                channel.copy_(curve(channel, low, high, knots))


def curve(x: torch.Tensor, low: float, high: float, knots: npt.NDArray[Any]) -> torch.Tensor:
    """An increasing curve through the `knots`, 0 to 1 and evenly spaced, between `low` and `high`; outside slope 1."""
    values = x.numpy()
    inside = values.clip(low, high)
    bent = low + (high - low) * np.interp(inside, np.linspace(low, high, len(knots)), knots)
    return torch.from_numpy((bent + values - inside).astype(np.float32))


def intensity_range(dataset: Any, channels: int) -> npt.NDArray[Any]:
    """Between which nearly all intensities of the first cases lie, ``(C, 2)``."""
    found = [
        np.percentile(np.asarray(dataset.load_case(case)[0])[:channels].reshape(channels, -1), PERCENTILES, axis=1)
        for case in sorted(dataset.identifiers)[:CASES_LOOKED_AT]
    ]
    return np.mean(found, axis=0).T


def _is_intensity(step: BasicTransform) -> bool:
    inner = step.transform if isinstance(step, RandomTransform) else step
    kind = type(inner).__module__.removeprefix("batchgeneratorsv2.transforms.").partition(".")[0]
    # SimulateLowResolutionTransform lies among the spatial ones, but moves nothing
    return kind in ("intensity", "noise", "local") or isinstance(inner, SimulateLowResolutionTransform)
