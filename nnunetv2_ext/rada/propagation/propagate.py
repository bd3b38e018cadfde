"""Annotated planes spread to the slices beside them: pseudo-labels, made offline, one volume per axis."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from nnunetv2_ext.core.processes import usable_cpus
from nnunetv2_ext.data.cache import CaseCache
from nnunetv2_ext.rada.annotation.cases import CaseSource
from nnunetv2_ext.rada.annotation.planes import Array
from nnunetv2_ext.rada.propagation.registration import carry_over, clean, correlation

NONE = 255  # in a distance volume: no pseudo-label
MAX_DISTANCE = 6
MIN_CORRELATION = 0.5  # Pearson's r of neighbouring slices
VERSION = 2


class Propagated(NamedTuple):
    """Pseudo-labels of one case."""

    # (3, X, Y, Z), uint8 or int16: per axis what its planes say; the ignore label where they say nothing. Annotated
    # voxels hold their annotation.
    labels: Array
    distances: npt.NDArray[np.uint8]  # (3, X, Y, Z): slices to the plane it comes from, 0: annotated, 255: none


def propagate(
    image: Array, label: Array, planes: Sequence[Sequence[int]], ignore: int, max_distance: int = MAX_DISTANCE
) -> Propagated:
    """Carry each plane outward, slice to slice, up to `max_distance` slices or half way to the next plane of its axis.

    It also stops where a slice correlates with the one before it by less than `MIN_CORRELATION`: the warped mask alone
    does not tell the end of an organ, it never vanishes (measured). Hidden labels are neither needed nor read: where
    `label` is not `ignore` it is an annotation and wins.

    Args:
        image: ``(X, Y, Z)``.
        label: ``(X, Y, Z)`` integers with the ignore label; negative (outside the body) counts as background.
        planes: indices of annotated planes for each axis.
        ignore: the ignore label.
        max_distance: slices, 1 to 254.
    """
    threads = usable_cpus()
    dtype = np.uint8 if ignore < NONE else np.int16
    known = np.where(label < 0, 0, label).astype(dtype)
    labels = np.full((3, *label.shape), ignore, dtype=dtype)
    distances = np.full((3, *label.shape), NONE, dtype=np.uint8)
    for axis in range(3):
        slices, truth = np.moveaxis(image, axis, 0), np.moveaxis(known, axis, 0)
        out, distance = np.moveaxis(labels[axis], axis, 0), np.moveaxis(distances[axis], axis, 0)
        for start, step, count in _walks(sorted(planes[axis]), label.shape[axis], max_distance):
            found = truth[start]
            for number in range(1, count + 1):
                source, target = slices[start + step * (number - 1)], slices[start + step * number]
                if correlation(source, target) < MIN_CORRELATION:
                    break
                if not np.array_equal(source, target):
                    found = clean(carry_over(found, source, target, threads), ignore)
                out[start + step * number] = found
                distance[start + step * number] = np.where(found == ignore, NONE, number)
    annotated = known != ignore
    labels[:, annotated] = known[annotated]
    distances[:, annotated] = 0
    return Propagated(labels, distances)


def _walks(planes: Sequence[int], size: int, max_distance: int) -> list[tuple[int, int, int]]:
    """(plane, direction, number of slices): each slice between two planes belongs to the nearer, a tie to the lower."""
    walks = []
    for below, plane, above in zip([None, *planes], planes, [*planes[1:], None]):
        down = plane if below is None else (plane - below - 1) // 2
        up = size - 1 - plane if above is None else (above - plane) // 2
        # (above - plane) // 2 slices upward reach the middle one too, which the walk down from `above` leaves out
        walks += [(plane, -1, min(down, max_distance)), (plane, 1, min(up, max_distance))]
    return [walk for walk in walks if walk[2] > 0]


def plane_weight(t: float) -> float:
    """w(t) = min(0.95, (cos(pi t) + 1) / 2) for the finished share t of the training, 0 to 1 (DeSCO's schedule)."""
    return min(0.95, (math.cos(math.pi * t) + 1) / 2)


def voxel_weights(distances: Tensor, t: float) -> Tensor:
    """w(t) ** distance, fp32; 1 where annotated (distance 0), 0 where there is no pseudo-label (255)."""
    table = torch.full((NONE + 1,), plane_weight(t), dtype=torch.float64) ** torch.arange(NONE + 1)
    table[NONE] = 0
    return table.float().to(distances.device)[distances.long()]


def propagate_cases(
    cases: Sequence[CaseSource],
    root: str | Path,
    key: dict[str, Any],
    ignore: int,
    max_distance: int = MAX_DISTANCE,
    log: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Propagate the planes of all cases, once: case name to file, for ``read_propagated``.

    A case whose files or planes changed is computed again. Interrupted runs go on where they were; several processes
    may run this at once.

    Args:
        cases: the labelled cases.
        root: of all caches, see `cache_root`.
        key: what else preprocessed data depend on (plans); JSON-serialisable.
        ignore: the ignore label.
        max_distance: see ``propagate``.
        log: gets a line at the end.
    """
    import SimpleITK

    settings = {"max_distance": max_distance, "min_correlation": MIN_CORRELATION, "ignore": ignore}
    settings |= {"version": VERSION, "SimpleITK": SimpleITK.Version_VersionString(), **key}
    cache = CaseCache(Path(root), "propagated", settings, ".b2nd", log)
    paths, computed = {}, 0
    for case in tqdm(cases, desc="propagating planes", unit="case"):
        state = [list(map(list, case.planes)), case.state]
        path = cache.read(case.name, state, _whole)
        if path is None:
            sparse = case.load()
            found = propagate(sparse.image, sparse.label, case.planes, ignore, max_distance)
            path = cache.write(case.name, state, _packed(found))
            computed += 1
        paths[case.name] = path
    log(f"pseudo-labels of {len(paths)} cases, {computed} of them computed now: {cache.folder}")
    return paths


def read_propagated(path: str | Path) -> Any:
    """A case's file as blosc2 array ``(2, 3, X, Y, Z)``: labels, distances; slicing reads what is asked for."""
    import blosc2

    blosc2.set_nthreads(1)
    mapped = {} if os.name == "nt" else {"mmap_mode": "r"}  # as nnU-Net opens its own
    return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mapped)


def _packed(found: Propagated) -> bytes:
    import blosc2

    both = np.stack((found.labels, found.distances.astype(found.labels.dtype)))
    chunks = (2, 1, *(min(64, size) for size in both.shape[2:]))
    array = blosc2.asarray(both, chunks=chunks, cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1})
    array.schunk.vlmeta["version"] = VERSION  # stands at the end of the file
    return array.to_cframe()


def _whole(path: Path) -> Path:
    """The file itself; blosc2 raises if a part of it is missing."""
    array = read_propagated(path)  # kept while its metadata are read: they do not keep it
    if array.schunk.vlmeta["version"] != VERSION:
        raise ValueError(f"{path} is of another version")
    return path
