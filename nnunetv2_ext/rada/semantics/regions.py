"""Region vectors of sparsely labelled cases: which regions there are, and batches of them through the encoder."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_ext.rada.annotation.cases import CaseSource, SparseCase
from nnunetv2_ext.rada.annotation.planes import consecutive_runs
from nnunetv2_ext.rada.semantics.clip_encoder import RegionEncoder
from nnunetv2_ext.rada.semantics.slices import Region, encoder_input, intensity_window, rescale

BATCH = 16


def representatives(planes: Sequence[int]) -> tuple[int, ...]:
    """One index for each run of neighbouring planes, its middle: the slices of a slab show the same."""
    return tuple((first + last) // 2 for first, last in consecutive_runs(planes))


class _Job(NamedTuple):
    """What is encoded: a class (label 0: the background) on a plane of a case."""

    case: str
    axis: int
    plane: int
    label: int


def embed_regions(
    sources: Iterable[CaseSource], number: int, encoder: RegionEncoder, region: Region
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and vectors ``(3, C, D)``, present ``(3, C)`` and background ``(D,)`` of each case, as soon as it is done.

    Batches of 16 regions reach over cases, which have 4 or so each: a slice costs 1.5 times as much in batches of 4.

    `number` is C, classes with background. The cases are read one after the other.

    Raises:
        ValueError: a case without planes or not finite; names it.
    """
    encode = encoder.encode_pooled if region == "pool" else encoder.encode_images
    # of the cases that are not done: regions to come, sums of vectors, background
    left: dict[str, int] = {}
    sums: dict[str, Tensor] = {}
    backgrounds: dict[str, Tensor] = {}

    def inputs() -> Iterator[tuple[_Job, tuple[Tensor, Tensor]]]:
        for source in sources:
            found = list(_inputs(source, number, encoder.image_size, region))
            left[source.name] = len(found)
            sums[source.name], backgrounds[source.name] = torch.zeros(3, number, encoder.dim), torch.zeros(encoder.dim)
            yield from found

    waiting, going_on = inputs(), True
    while going_on:
        part = list(islice(waiting, BATCH))
        if part:
            images, masks = (torch.stack(tensors) for tensors in zip(*(seen for _, seen in part)))
            for (job, _), vector in zip(part, encode(images, masks)):
                left[job.case] -= 1
                if job.label == 0:
                    backgrounds[job.case] = vector.clone()  # not the whole batch
                else:
                    sums[job.case][job.axis, job.label] += vector
        going_on = bool(part)  # the last round is for cases without a single region, all outside the body
        for name in [name for name, count in left.items() if count == 0]:
            del left[name]
            vectors, background = sums.pop(name), backgrounds.pop(name)
            yield name, {"vectors": F.normalize(vectors, dim=-1), "present": vectors.any(-1), "background": background}


def _inputs(source: CaseSource, number: int, size: int, region: Region) -> Iterator[tuple[_Job, tuple[Tensor, Tensor]]]:
    """What the encoder gets for each region of a case."""
    case = source.load()
    try:
        jobs = _jobs(case, [representatives(indices) for indices in source.planes], source.name, number)
        window = intensity_window(case.image)
    except ValueError as error:
        raise ValueError(f"case {source.name}: {error}") from error
    for job in jobs:
        picture = rescale(case.image.take(job.plane, job.axis), window)
        mask = case.label.take(job.plane, job.axis) == job.label
        rows, columns = (float(mm) for axis, mm in enumerate(case.spacing) if axis != job.axis)
        yield job, encoder_input(picture, mask, (rows, columns), size, region, background=job.label == 0)


def _jobs(case: SparseCase, planes: Sequence[Sequence[int]], name: str, number: int) -> list[_Job]:
    """Each class on each plane, and the background of the plane with the most foreground.

    The surroundings of that foreground are what is to be told apart from it.
    """
    if not any(map(len, planes)):
        raise ValueError("it has no annotated plane")
    jobs: list[_Job] = []
    best: tuple[int, _Job] | None = None
    for axis, indices in enumerate(planes):
        for index in indices:
            labels = case.label.take(index, axis)
            inside = labels[(labels >= 0) & (labels < number)]  # neither ignored nor outside the body
            counts = np.bincount(inside.ravel().astype(np.int64), minlength=number)
            jobs += [_Job(name, axis, index, label) for label in range(1, number) if counts[label]]
            foreground = int(counts[1:].sum())
            if counts[0] and (best is None or foreground > best[0]):
                best = foreground, _Job(name, axis, index, 0)
    return jobs if best is None else [*jobs, best[1]]
