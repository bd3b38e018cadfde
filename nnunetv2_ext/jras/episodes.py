"""Episodes: a batch and the guides of each of its patches, under one draw of intensities.

A guide tells what tissue looks like in its scan only if it looks like the scan that is segmented. Augmented
independently, guides lose just that. So the patch and its guides get the same intensity transforms, with the same
random numbers, and each a spatial transform of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_ext.data.subjects import members_of
from nnunetv2_ext.parts.shared_draw import SharedDraw, intensity_range


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
