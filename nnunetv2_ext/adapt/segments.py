"""Segmentations of a fold, kept in files: what an interrupted adaptation has predicted is not predicted again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nnunetv2_ext.adapt.score import Segmenter, read_preprocessed
from nnunetv2_ext.core.files import atomic_write

if TYPE_CHECKING:
    from nnunetv2_ext.adapt.adaptation import Job

Weights = dict[str, Tensor]


class Segments:
    """A file a case, of the given cases and of the old validation cases."""

    def __init__(self, job: Job, fold: str) -> None:
        self.job, self.root = job, job.work / "segmentations" / f"fold_{fold}"
        self.segmenter: Segmenter | None = None

    def file(self, what: str, case: str) -> Path:
        """Of one case."""
        return self.root / what / f"{case}.npz"

    def new(self, what: str, case: str, weights: Weights | None = None) -> np.ndarray:
        """Of a given case; from its file if `weights` are not given."""
        return self._of(what, case, weights, self.job.folder, self.job.previous)

    def old(self, what: str, case: str, weights: Weights) -> np.ndarray:
        """Of a validation case."""
        assert self.job.old is not None
        return self._of(f"old_{what}", case, weights, self.job.old.data.folder, self.job.old.previous)

    def _of(self, what: str, case: str, weights: Weights | None, folder: Path, previous: Path | None) -> np.ndarray:
        file = self.file(what, case)
        if not file.is_file():
            assert weights is not None
            with quiet(self.job.work):
                if self.segmenter is None:
                    self.segmenter = Segmenter(self.job.model, self.job.device)
                image, _, properties = read_preprocessed(folder, case, self.job.model, previous)
                labels = self.segmenter.segment(weights, image, properties)
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, lambda out: np.savez_compressed(out, labels=labels))
        with np.load(file) as content:
            return content["labels"]


@contextlib.contextmanager
def quiet(work: Path) -> Iterator[None]:
    """What nnU-Net prints goes to a file; a training's own log has it too."""
    with (work / "printed.txt").open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield
