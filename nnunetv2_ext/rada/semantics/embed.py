"""Region and text vectors of a dataset: computed once, kept on disk, never part of the training graph."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nnunetv2_ext.data.cache import CaseCache
from nnunetv2_ext.rada.annotation.cases import CaseSource
from nnunetv2_ext.rada.semantics.clip_encoder import RegionEncoder
from nnunetv2_ext.rada.semantics.clip_model import Log
from nnunetv2_ext.rada.semantics.regions import embed_regions
from nnunetv2_ext.rada.semantics.slices import Region

VERSION = 2  # of what is computed; a change makes old caches unread
SMALL_GAP = 0.02


@dataclass(frozen=True)
class CaseEmbeddings:
    """Unit vectors, fp32, on the CPU. N cases, 3 axes, C classes with background, D numbers."""

    cases: tuple[str, ...]  # N names
    # (N, 3, C, D): region of a class on the planes of an axis (several planes: their mean, of unit length again); zero
    # where `present` is False, and always for class 0
    vectors: Tensor
    present: Tensor  # (N, 3, C) bool
    background: Tensor  # (N, D): one vector per case; zero without any
    text: Tensor  # (C, D): the classes' prompts, background first

    def with_background(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Vectors by case, the background's in the place of class 0 for every axis, and which are valid."""
        vectors, valid = self.vectors.clone(), self.present.clone()
        vectors[:, :, 0] = self.background[:, None]
        valid[:, :, 0] = self.background.any(1)[:, None]
        return dict(zip(self.cases, zip(vectors, valid)))


def embed_cases(
    cases: Sequence[CaseSource],
    prompts: Sequence[str],
    make_encoder: Callable[[], RegionEncoder],
    root: str | Path,
    key: Mapping[str, Any],
    region: Region,
    log: Log = print,
) -> CaseEmbeddings:
    """Vectors of all cases and prompts, from the disk as far as they are there, else computed and kept.

    One file per case is written as soon as it is computed, so an interrupted run loses the last batch at most. Files
    belong to the key, the case's state and its planes, or to the prompts: what changed is computed again. The encoder
    is made only if something is missing. Several processes may run this at once: the content they replace is the same
    but for rounding.

    Args:
        cases: at least one.
        prompts: C sentences, background first.
        make_encoder: loads CLIP.
        root: of all caches, see `cache_root`.
        key: whatever else the vectors depend on, JSON-serialisable: plans, CLIP's identity, image channel.
        region: how the encoder sees a class.
        log: told about the cache and about how well the vectors separate the classes.

    Raises:
        ValueError: a case without planes or not finite, a region the encoder cannot show, CLIP not at hand.
    """
    key = {"version": VERSION, "region": region, **key}
    kept, texts = (CaseCache(Path(root), kind, key, ".safetensors", log) for kind in ("regions", "text"))
    encoder = cache(make_encoder)
    text = texts.read("prompts", list(prompts), _load)
    if text is None:
        text = {"text": encoder().encode_text(prompts)}
        texts.write("prompts", list(prompts), _packed(text))
    states = {
        source.name: {"planes": list(map(list, source.planes)), "classes": len(prompts), "state": source.state}
        for source in cases
    }
    found = {name: kept.read(name, state, _load) for name, state in states.items()}
    missing = [source for source in cases if found[source.name] is None]
    if missing:
        bar = tqdm(missing, desc="CLIP embeddings", unit="case")
        for name, tensors in embed_regions(bar, len(prompts), encoder(), region):
            kept.write(name, states[name], _packed(tensors))
            found[name] = tensors
    log(f"CLIP embeddings of {len(cases)} cases, {len(missing)} of them computed now: {kept.folder}")
    rows = [tensors for tensors in found.values() if tensors is not None]
    vectors, present, background = (
        torch.stack([tensors[part] for tensors in rows]) for part in ("vectors", "present", "background")
    )
    report(vectors, present, background, log)
    return CaseEmbeddings(tuple(found), vectors, present, background, text["text"])


def report(vectors: Tensor, present: Tensor, background: Tensor, log: Log = print) -> None:
    """Say how well the vectors tell the classes apart, by mean cosines over pairs, and warn if they hardly do.

    Sums of cosines over all pairs are products of sums of vectors: the sum over i, j of v_i . v_j is |sum v|^2.

    Args as of `CaseEmbeddings`.
    """
    masked = (vectors * present[..., None]).double()
    sums, counts = masked.sum((0, 1)), present.sum((0, 1)).double()  # (C, D), (C,)
    own, everything, regions = sums.square().sum(), sums.sum(0), counts.sum()
    within = _mean(own - masked.square().sum(), (counts * (counts - 1)).sum())
    between = _mean(everything.square().sum() - own, regions**2 - counts.square().sum())
    apart = _mean(everything @ background.double().sum(0), regions * background.any(1).sum())
    log(
        f"CLIP embeddings, mean cosine within a class {within:.3f}, between classes {between:.3f}, against background "
        f"{apart:.3f}"
    )
    gap = within - max((value for value in (between, apart) if not math.isnan(value)), default=math.nan)
    if gap < SMALL_GAP:
        log(
            f"WARNING: the embeddings hardly separate the classes (gap {gap:.3f} < {SMALL_GAP}): their guidance "
            "is weak; try rada.alpha_weights, other rada.prompts or rada.region, or rada.semantics=learned"
        )


def _mean(total: Tensor, number: Tensor) -> float:
    return float(total / number) if number > 0 else math.nan


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()})
