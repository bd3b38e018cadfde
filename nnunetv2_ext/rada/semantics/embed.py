"""Region and text vectors of a dataset: computed once, kept on disk, never part of the training graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nnunetv2_ext.data.cache import CaseCache
from nnunetv2_ext.rada.annotation.cases import CaseSource
from nnunetv2_ext.rada.requirements import require_alpha
from nnunetv2_ext.rada.semantics.clip_encoder import RegionEncoder
from nnunetv2_ext.rada.semantics.regions import embed_regions
from nnunetv2_ext.rada.semantics.slices import Region
from nnunetv2_ext.rada.semantics.spread import SMALL_GAP, Spread, spread

Log = Callable[[str], None]

VERSION = 2  # of what is computed; a change makes old caches unread


@dataclass(frozen=True)
class CaseEmbeddings:
    """Unit vectors, fp32, on the CPU. N cases, 3 axes, C classes with background, D numbers.

    Attributes:
        cases: N names.
        vectors: ``(N, 3, C, D)``: region of a class on the planes of an axis (several planes: their mean, of unit
            length again); zero where `present` is False, and always for class 0.
        present: ``(N, 3, C)`` bool.
        background: ``(N, D)``: one vector per case; zero where `has_background` is False.
        has_background: ``(N,)`` bool.
        text: ``(C, D)``: the classes' prompts, background first.
        prompts: C sentences.
    """

    cases: tuple[str, ...]
    vectors: Tensor
    present: Tensor
    background: Tensor
    has_background: Tensor
    text: Tensor
    prompts: tuple[str, ...]


def embed_cases(
    cases: Iterable[CaseSource],
    prompts: Sequence[str],
    make_encoder: Callable[[], RegionEncoder],
    root: str | Path,
    key: Mapping[str, Any],
    region: Region,
    log: Log = print,
    progress: bool = True,
) -> CaseEmbeddings:
    """Vectors of all cases and prompts, from the disk as far as they are there, else computed and kept.

    One file per case is written as soon as it is computed, so an interrupted run loses the last batch at most. Files
    belong to the key, the case's state and its planes, or to the prompts: what changed is computed again. The encoder
    is made only if something is missing. Several processes may run this at once: files are replaced in one step and
    their content is the same but for rounding.

    Args:
        cases: the labelled cases; one without planes is an error.
        prompts: C sentences, background first.
        make_encoder: loads CLIP.
        root: folder of all caches, outside of nnU-Net's configuration folders.
        key: whatever else the vectors depend on (weights, plans, precision); JSON-serialisable.
        region: how the encoder sees a class.
        log: told about the cache and about how well the vectors separate the classes.
        progress: show a bar on stderr.

    Raises:
        ValueError: no case, a case without planes or not finite, a region the encoder cannot show, CLIP not at hand.
    """
    sources = list(cases)
    if not sources:
        raise ValueError("there is no case with annotated planes to embed")
    key = {"version": VERSION, "region": region, **key}
    cache = CaseCache(Path(root), "regions", key, ".safetensors", log)
    encoder = _Lazy(make_encoder, region)
    text = _text_vectors(CaseCache(Path(root), "text", key, ".safetensors", log), prompts, encoder)
    states = {source.name: _state(source, len(prompts)) for source in sources}
    found = {name: cache.read(name, state, _load) for name, state in states.items()}
    missing = [source for source in sources if found[source.name] is None]
    if missing:
        bar = tqdm(missing, desc="CLIP embeddings", unit="case", disable=not progress)
        for name, tensors in embed_regions(bar, len(prompts), encoder.get(), region):
            cache.write(name, states[name], _packed(tensors))
            found[name] = tensors
    log(f"CLIP embeddings of {len(sources)} cases, {len(missing)} of them computed now: {cache.folder}")
    rows = [tensors for tensors in found.values() if tensors is not None]
    result = CaseEmbeddings(
        cases=tuple(source.name for source in sources),
        vectors=torch.stack([tensors["vectors"] for tensors in rows]),
        present=torch.stack([tensors["present"] for tensors in rows]),
        background=torch.stack([tensors["background"] for tensors in rows]),
        has_background=torch.stack([tensors["background"].any() for tensors in rows]),
        text=text,
        prompts=tuple(prompts),
    )
    report(spread(result.vectors, result.present, result.background, result.has_background), log)
    return result


def report(found: Spread, log: Log = print) -> None:
    """Say how well the vectors tell the classes apart, and warn if they hardly do."""
    log(f"CLIP embeddings, {found.describe()}")
    if found.gap < SMALL_GAP:
        log(
            f"WARNING: the embeddings hardly separate the classes (gap {found.gap:.3f} < {SMALL_GAP}): their guidance "
            "is weak; try rada.alpha_weights, other rada.prompts or rada.region, or rada.semantics=learned"
        )


class _Lazy:
    """The encoder, made at first use."""

    def __init__(self, make: Callable[[], RegionEncoder], region: Region) -> None:
        self._make, self._region = make, region
        self._encoder: RegionEncoder | None = None

    def get(self) -> RegionEncoder:
        if self._encoder is None:
            encoder = self._make()
            require_alpha(self._region, encoder.reads_masks)
            self._encoder = encoder
        return self._encoder


def _text_vectors(cache: CaseCache, prompts: Sequence[str], encoder: _Lazy) -> Tensor:
    tensors = cache.read("prompts", list(prompts), _load)
    if tensors is None:
        tensors = {"text": encoder.get().encode_text(prompts)}
        cache.write("prompts", list(prompts), _packed(tensors))
    return tensors["text"]


def _state(source: CaseSource, number: int) -> dict[str, Any]:
    return {"planes": [list(map(int, indices)) for indices in source.planes], "classes": number, "state": source.state}


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()})
