"""The labelled cases of nnU-Net's preprocessed folder, as embedding and propagation want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nnunetv2_ext.rada.annotation.cases import CaseSource, SparseCase
from nnunetv2_ext.rada.requirements import require_alpha
from nnunetv2_ext.rada.semantics.clip_encoder import load_encoder
from nnunetv2_ext.rada.semantics.clip_model import ClipSource
from nnunetv2_ext.rada.semantics.embed import CaseEmbeddings, embed_cases
from nnunetv2_ext.rada.semantics.slices import Region

# what of a configuration decides how the preprocessed files look
_PREPROCESSING = (
    "data_identifier",
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    "spacing",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
_ENDINGS = (".b2nd", "_seg.b2nd", ".npz", ".npy", "_seg.npy")


class HasPlanes(Protocol):
    """What is needed of ``planes.Planes``."""

    @property
    def indices(self) -> Sequence[Sequence[int]]: ...


def cache_root(preprocessed_dataset_folder: str | Path) -> Path:
    """Where RADA keeps what it computes offline: beside nnU-Net's configuration folders, never in them."""
    return Path(preprocessed_dataset_folder) / "nnunetv2_ext" / "rada"


def plans_key(plans_name: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the plans that preprocessed data depend on; JSON-serialisable."""
    return {"plans": plans_name, **{name: configuration[name] for name in _PREPROCESSING if name in configuration}}


def case_sources(
    dataset: Any, planes: Mapping[str, HasPlanes], spacing: Sequence[float], channel: int = 0
) -> list[CaseSource]:
    """The cases of `planes` that have any, in the order of their names.

    Args:
        dataset: nnU-Net's dataset: ``source_folder`` and ``load_case``.
        planes: found planes by case name.
        spacing: mm along the axes of the preprocessed arrays (the configuration's spacing).
        channel: image channel to read.
    """
    return [
        CaseSource(
            name=name,
            planes=planes[name].indices,
            state=file_state(dataset.source_folder, name),
            load=lambda name=name: read_case(dataset, name, spacing, channel),  # type: ignore[misc]
        )
        for name in sorted(planes)
        if any(map(len, planes[name].indices))
    ]


def read_case(dataset: Any, name: str, spacing: Sequence[float], channel: int = 0) -> SparseCase:
    """One channel and the label of a preprocessed case.

    Raises:
        ValueError: no such channel.
    """
    data, seg, _, _ = dataset.load_case(name)
    if channel >= data.shape[0]:
        raise ValueError(
            f"rada.image_channel={channel}: case {name} has {data.shape[0]} image channels, counted from 0"
        )
    return SparseCase(np.asarray(data[channel]), np.asarray(seg[0]), spacing)


def file_state(folder: str | Path, name: str) -> list[list[Any]]:
    """Name, size and time of a case's files, which tell whether it was preprocessed again."""
    files = [Path(folder) / f"{name}{ending}" for ending in _ENDINGS]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files if path.is_file()]


def embed_preprocessed(
    cases: Sequence[CaseSource],
    plans_name: str,
    configuration: Mapping[str, Any],
    dataset_folder: str | Path,
    source: ClipSource,
    prompts: Sequence[str],
    region: str = "auto",
    channel: int = 0,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
    progress: bool = True,
    identity: Mapping[str, str] | None = None,
) -> CaseEmbeddings:
    """``embed_cases`` for nnU-Net's preprocessed cases, cached in ``DATASET_FOLDER/nnunetv2_ext/rada/HASH``.

    Args:
        cases: from ``case_sources``.
        plans_name, configuration: of the plans (``configuration_manager.configuration``).
        dataset_folder: nnUNet_preprocessed/DatasetXXX.
        source: which CLIP.
        prompts: C sentences, see ``class_prompts``.
        region: ``auto``, ``alpha``, ``crop`` or ``pool``.
        channel: image channel that they were asked for, which CLIP sees.
        device: where CLIP runs.
        log, progress: see ``embed_cases``.
        identity: of the weights, if it is known without them, see ``ClipSource.identity``: vectors that are kept
            complete are then read without the weights.

    Raises:
        ValueError: see ``embed_cases`` and ``load_encoder``.
    """
    return embed_cases(
        cases,
        prompts,
        lambda: load_encoder(source, device, log),
        cache_root(dataset_folder),
        {
            **plans_key(plans_name, configuration),
            **(source.identity() if identity is None else identity),
            "channel": channel,
            "precision": "fp32",  # the only one; in the key, so that existing files stay valid
        },
        resolve_region(region, source.alpha_weights is not None, log),
        log,
        progress,
    )


def resolve_region(region: str, has_alpha: bool, log: Callable[[str], None] = print) -> Region:
    """``auto`` becomes ``alpha`` with Alpha-CLIP's weights and ``crop`` without; the log says which.

    Raises:
        ValueError: ``alpha`` without those weights, or an unknown name.
    """
    if region == "auto":
        region = "alpha" if has_alpha else "crop"
        reason = "read by Alpha-CLIP" if has_alpha else "CLIP without Alpha-CLIP's weights cannot see masks"
        log(f"rada.region: {region} ({reason}).")
    require_alpha(region, has_alpha)
    if region not in ("alpha", "crop", "pool"):
        raise ValueError(f"rada.region={region}: choose auto, alpha, crop or pool")
    return region  # type: ignore[return-value]
