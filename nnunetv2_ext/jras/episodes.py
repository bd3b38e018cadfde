"""Episodes: a batch and the guides of each of its patches, under one draw of intensities.

A guide tells what tissue looks like in its scan only if it looks like the scan that is segmented. Augmented
independently, guides lose just that. So the patch and its guides get the same intensity transforms, with the same
random numbers, and each a spatial transform of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_ext.data.subjects import members_of

PIECES = 6  # of a random curve
CASES_LOOKED_AT = 8  # for the range of intensities
PERCENTILES = 0.5, 99.5


class EpisodeLoader(nnUNetDataLoader):
    """nnUNetDataLoader whose batches also hold ``guide_data`` and ``guide_target``, K of other subjects for each patch.

    They are nnU-Net's own patches, ``(B, K, C, *P)`` and ``(B, K, 1 or regions, *P)``: cut, oversampled and augmented
    as those of the batch, with the intensity draw of their query. With ``num_guides`` 0 a batch has none.

    Args:
        dataset, arguments: of nnUNetDataLoader.
        num_guides: K.
        fg_share: chance that a guide is forced to show foreground.
        style_share: chance that an episode's intensities pass through a random curve.
        image_channels: C; one-hot channels of a cascade behind them are left alone.
        subjects: case to subject; None: each case is its own.

    Raises:
        ValueError: a patch would find fewer than K other subjects.
    """

    transforms: Any
    batch_size: int
    get_do_oversample: Any

    def __init__(
        self,
        dataset: Any,
        num_guides: int,
        fg_share: float,
        style_share: float,
        image_channels: int,
        subjects: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(dataset, **arguments)
        self.num_guides, self.fg_share = num_guides, fg_share
        self._cases = members_of(dataset.identifiers, subjects)
        self._subject = {case: subject for subject, cases in self._cases.items() for case in cases}
        require_subjects(num_guides, len(self._cases))
        limits = intensity_range(dataset, image_channels) if style_share else np.zeros((image_channels, 2))
        self.transforms = SharedDraw(self.transforms, style_share, limits)
        self._wanted: list[str] | None = None  # the guides' cases, while they are made

    def get_indices(self) -> Any:
        """nnU-Net's, or the guides' cases."""
        return super().get_indices() if self._wanted is None else self._wanted

    def generate_train_batch(self) -> dict[str, Any]:
        """nnU-Net's, with the guides."""
        seeds = [int(np.random.randint(2**31)) for _ in range(self.batch_size)]
        self.transforms.seeds = list(seeds)
        batch = super().generate_train_batch()
        if not self.num_guides:
            return batch
        others = [self._others(self._subject[str(case)]) for case in batch["keys"]]
        size, oversample = self.batch_size, self.get_do_oversample
        self._wanted = [case for cases in others for case in cases]
        self.transforms.seeds = [seed for seed in seeds for _ in range(self.num_guides)]
        self.batch_size, self.get_do_oversample = len(self._wanted), lambda _: np.random.uniform() < self.fg_share
        try:
            guides = super().generate_train_batch()
        finally:
            self._wanted, self.batch_size, self.get_do_oversample = None, size, oversample
        target = guides["target"][0] if isinstance(guides["target"], list) else guides["target"]
        for name, value in (("data", guides["data"]), ("target", target)):
            batch[f"guide_{name}"] = value.unflatten(0, (size, self.num_guides))
        batch["guide_keys"] = np.array(others)
        return batch

    def _others(self, subject: str) -> list[str]:
        """A case each of K other subjects."""
        others = [name for name in self._cases if name != subject]
        chosen = np.random.choice(len(others), self.num_guides, replace=False)
        of_subjects = [self._cases[others[i]] for i in chosen]
        return [cases[np.random.randint(len(cases))] for cases in of_subjects]


def require_subjects(num_guides: int, subjects: int) -> None:
    """Raise ValueError unless a patch has guides of `num_guides` other subjects."""
    if num_guides <= subjects - 1:
        return
    remedy = "add cases of other subjects, or set jras.retriever=none"
    if subjects > 1:
        remedy = f"set jras.num_guides={subjects - 1}, or add cases of other subjects"
    raise ValueError(
        f"a patch gets {num_guides} guides of other subjects, but the training cases of this fold are of {subjects} "
        f"subject(s), which leaves {subjects - 1}: {remedy}"
    )


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
            raise ValueError(f"J-RAS shares the draw of consecutive intensity transforms, but {names} lies among them")

    def __call__(self, **sample: Any) -> dict[str, Any]:
        seed, (first, end) = self.seeds.pop(0), self._shared
        for step in self.steps[:first]:
            sample = step(**sample)
        with _drawing_from(seed):
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


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
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
