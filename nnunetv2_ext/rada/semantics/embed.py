"""Region and text vectors of a dataset: computed once, kept on disk, never part of the training graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from nnunetv2_ext.data.cache import CaseCache
from nnunetv2_ext.data.preprocessed import plans_key
from nnunetv2_ext.rada.annotation.cases import CaseSource
from nnunetv2_ext.rada.requirements import require_alpha
from nnunetv2_ext.rada.semantics.clip_encoder import RegionEncoder
from nnunetv2_ext.rada.semantics.regions import embed_regions
from nnunetv2_ext.rada.semantics.slices import Region

Log = Callable[[str], None]

VERSION = 2  # of what is computed; a change makes old caches unread
SMALL_GAP = 0.02


@dataclass(frozen=True)
class CaseEmbeddings:
    """Unit vectors, fp32, on the CPU. N cases, 3 axes, C classes with background, D numbers.

    Attributes:
        cases: N names.
        vectors: ``(N, 3, C, D)``: region of a class on the planes of an axis (several planes: their mean, of unit
            length again); zero where `present` is False, and always for class 0.
        present: ``(N, 3, C)`` bool.
        background: ``(N, D)``: one vector per case; zero without any.
        text: ``(C, D)``: the classes' prompts, background first.
    """

    cases: tuple[str, ...]
    vectors: Tensor
    present: Tensor
    background: Tensor
    text: Tensor


def embed_cases(
    cases: Iterable[CaseSource],
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
    is made only if something is missing. Several processes may run this at once: files are replaced in one step and
    their content is the same but for rounding.

    Args:
        cases: the labelled cases; one without planes is an error.
        prompts: C sentences, background first.
        make_encoder: loads CLIP.
        root: folder of all caches, outside of nnU-Net's configuration folders.
        key: whatever else the vectors depend on, see ``embedding_key``; JSON-serialisable.
        region: how the encoder sees a class.
        log: told about the cache and about how well the vectors separate the classes.

    Raises:
        ValueError: no case, a case without planes or not finite, a region the encoder cannot show, CLIP not at hand.
    """
    sources = list(cases)
    if not sources:
        raise ValueError("there is no case with annotated planes to embed")
    key = {"version": VERSION, "region": region, **key}
    kept = CaseCache(Path(root), "regions", key, ".safetensors", log)
    texts = CaseCache(Path(root), "text", key, ".safetensors", log)

    @cache
    def encoder() -> RegionEncoder:
        made = make_encoder()
        require_alpha(region, made.reads_masks)
        return made

    text = texts.read("prompts", list(prompts), _load)
    if text is None:
        text = {"text": encoder().encode_text(prompts)}
        texts.write("prompts", list(prompts), _packed(text))
    states = {source.name: _state(source, len(prompts)) for source in sources}
    found = {name: kept.read(name, state, _load) for name, state in states.items()}
    missing = [source for source in sources if found[source.name] is None]
    if missing:
        bar = tqdm(missing, desc="CLIP embeddings", unit="case")
        for name, tensors in embed_regions(bar, len(prompts), encoder(), region):
            kept.write(name, states[name], _packed(tensors))
            found[name] = tensors
    log(f"CLIP embeddings of {len(sources)} cases, {len(missing)} of them computed now: {kept.folder}")
    rows = [tensors for tensors in found.values() if tensors is not None]
    result = CaseEmbeddings(
        cases=tuple(source.name for source in sources),
        vectors=torch.stack([tensors["vectors"] for tensors in rows]),
        present=torch.stack([tensors["present"] for tensors in rows]),
        background=torch.stack([tensors["background"] for tensors in rows]),
        text=text["text"],
    )
    report(result.vectors, result.present, result.background, log)
    return result


def report(vectors: Tensor, present: Tensor, background: Tensor, log: Log = print) -> None:
    """Say how well the vectors tell the classes apart, by mean cosines over pairs, and warn if they hardly do.

    Sums of cosines over all pairs are products of sums of vectors: the sum over i, j of v_i . v_j is |sum v|^2.

    Args:
        vectors: ``(N, 3, C, D)``, unit length where `present`.
        present: ``(N, 3, C)`` bool.
        background: ``(N, D)``, unit length or zero.
        log: gets both.
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


def _state(source: CaseSource, number: int) -> dict[str, Any]:
    return {"planes": [list(map(int, indices)) for indices in source.planes], "classes": number, "state": source.state}


def _load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def embedding_key(
    plans_name: str, configuration: Mapping[str, Any], identity: Mapping[str, str], channel: int
) -> dict[str, Any]:
    """What the vectors of preprocessed cases depend on: their plans, CLIP's weights, and the image channel it sees."""
    return {**plans_key(plans_name, configuration), **identity, "channel": channel}


def resolve_region(region: str, has_alpha: bool, log: Log = print) -> Region:
    """``auto`` becomes ``alpha`` with Alpha-CLIP's weights and ``crop`` without; the log says which.

    Raises:
        ValueError: ``alpha`` without those weights.
    """
    if region == "auto":
        region = "alpha" if has_alpha else "crop"
        reason = "read by Alpha-CLIP" if has_alpha else "CLIP without Alpha-CLIP's weights cannot see masks"
        log(f"rada.region: {region} ({reason}).")
    require_alpha(region, has_alpha)
    return cast(Region, region)
