"""Region vectors of sparsely labelled cases: which regions there are, and batches of them through the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_ext.rada.annotation.cases import CaseSource, SparseCase
from nnunetv2_ext.rada.annotation.planes import consecutive_runs
from nnunetv2_ext.rada.semantics.clip_encoder import RegionEncoder
from nnunetv2_ext.rada.semantics.slices import Region, encoder_input, in_plane, intensity_window, rescale

Array = npt.NDArray[Any]

BATCH = 16


def representatives(planes: Sequence[int]) -> tuple[int, ...]:
    """One index for each run of neighbouring planes, its middle: the slices of a slab show the same.

    >>> representatives([3, 7, 8, 9])
    (3, 8)
    """
    return tuple((first + last) // 2 for first, last in consecutive_runs(planes))


@dataclass(frozen=True)
class _Job:
    """What is encoded: a class (label 0: the background) on a plane of one of the open cases."""

    case: int
    axis: int
    index: int
    label: int


class _Open:
    """A case whose regions are being encoded."""

    def __init__(self, name: str, number: int, dim: int, jobs: int) -> None:
        self.name, self.left = name, jobs
        self.sums, self.background = torch.zeros(3, number, dim), torch.zeros(dim)

    def add(self, job: _Job, vector: Tensor) -> None:
        self.left -= 1
        if job.label == 0:
            self.background = vector
        else:
            self.sums[job.axis, job.label] += vector

    def result(self) -> dict[str, Tensor]:
        return {
            "vectors": F.normalize(self.sums, dim=-1),
            "present": self.sums.any(-1),
            "background": self.background.clone(),
        }


def embed_regions(
    sources: Iterable[CaseSource], number: int, encoder: RegionEncoder, region: Region
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and vectors ``(3, C, D)``, present ``(3, C)`` and background ``(D,)`` of each case, as soon as it is done.

    Batches of 16 regions reach over cases, which have 4 or so each: a slice costs 1.5 times as much in batches of 4.

    Args:
        sources: the cases, read one after the other.
        number: C, classes with background.
        encoder: CLIP.
        region: how it sees a class.

    Raises:
        ValueError: a case without planes or not finite; names it.
    """
    encode = encoder.encode_pooled if region == "pool" else encoder.encode_images
    cases: dict[int, _Open] = {}
    waiting: list[tuple[_Job, tuple[Tensor, Tensor]]] = []

    def flush() -> Iterator[tuple[str, dict[str, Tensor]]]:
        part = waiting[:BATCH]
        del waiting[:BATCH]
        images, masks = (torch.stack(tensors) for tensors in zip(*(inputs for _, inputs in part)))
        for (job, _), vector in zip(part, encode(images, masks)):
            cases[job.case].add(job, vector)
        for key in [key for key, case in cases.items() if case.left == 0]:
            done = cases.pop(key)
            yield done.name, done.result()

    for key, source in enumerate(sources):
        inputs = list(_inputs(source, key, number, encoder.image_size, region))
        cases[key] = _Open(source.name, number, encoder.dim, len(inputs))
        waiting += inputs
        while len(waiting) >= BATCH:
            yield from flush()
    while waiting:
        yield from flush()
    for case in cases.values():  # without a single region, all outside the body
        yield case.name, case.result()


def _inputs(
    source: CaseSource, key: int, number: int, size: int, region: Region
) -> Iterator[tuple[_Job, tuple[Tensor, Tensor]]]:
    """What the encoder gets for each region of a case."""
    case = source.load()
    try:
        jobs = _jobs(case, [representatives(indices) for indices in source.planes], key, number)
        window = intensity_window(case.image)
    except ValueError as error:
        raise ValueError(f"case {source.name}: {error}") from error
    for job in jobs:
        picture = rescale(case.image.take(job.index, job.axis), window)
        mask = case.label.take(job.index, job.axis) == job.label
        spacing = in_plane(case.spacing, job.axis)
        yield job, encoder_input(picture, mask, spacing, size, region, background=job.label == 0)


def _jobs(case: SparseCase, planes: Sequence[Sequence[int]], key: int, number: int) -> list[_Job]:
    """Each class on each plane, and the background of the plane with the most foreground, whose surroundings are the
    ones to be told apart from it.
    """
    if not any(map(len, planes)):
        raise ValueError("it has no annotated plane")
    jobs: list[_Job] = []
    best: tuple[int, _Job] | None = None
    for axis, indices in enumerate(planes):
        for index in indices:
            counts = _counts(case.label.take(index, axis), number)
            jobs += [_Job(key, axis, index, label) for label in range(1, number) if counts[label]]
            foreground = int(counts[1:].sum())
            if counts[0] and (best is None or foreground > best[0]):
                best = foreground, _Job(key, axis, index, 0)
    return jobs if best is None else [*jobs, best[1]]


def _counts(labels: Array, number: int) -> npt.NDArray[np.int64]:
    """Pixels of the labels 0 to `number` - 1; ignored ones and those outside the body are none of them."""
    inside = labels[(labels >= 0) & (labels < number)].astype(np.int64)
    return np.bincount(inside.ravel(), minlength=number)
