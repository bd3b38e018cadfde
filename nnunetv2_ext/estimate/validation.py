"""Validation cases, predicted by the fold that has not seen them and scored against their truth."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunetv2_ext.data.case import read_label_map
from nnunetv2_ext.data.find import Model
from nnunetv2_ext.data.preprocessed import Preprocessed
from nnunetv2_ext.estimate.corruption import corrupt
from nnunetv2_ext.estimate.features import Features, agreement, masks_of, of_case, with_agreement
from nnunetv2_ext.estimate.mirroring import agreement_of_passes
from nnunetv2_ext.parts.dice import dice
from nnunetv2_ext.parts.prediction import FoldPredictor
from nnunetv2_ext.parts.surface import drop_thin_axes, hd95, surface_distances

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Where predictions of validation cases come from."""

    model: Model
    data: Preprocessed
    predictor: FoldPredictor
    corrupted: bool
    optional: Sequence[str]
    saved: bool


def rows_of(case: str, fold: int, source: Source) -> Iterator[dict[str, Any]]:
    """The rows of a case as `calibration.Row` takes them, without its subject.

    Raises:
        ValueError: what is needed of the case is missing or damaged.
    """
    predictor = source.predictor
    truth, properties = _truth(case, source)
    ignore = predictor.labels.ignore_label
    ignored = None if ignore is None else truth == ignore
    predicted = _saved(case, fold, source, ignored) if source.saved else _predicted(case, fold, source)
    for is_corrupted, (features, segmentation) in enumerate(predicted):
        if segmentation.shape != truth.shape:
            raise ValueError(
                f"case {case}: its truth has shape {truth.shape}, its prediction {segmentation.shape}: preprocess the "
                "dataset again"
            )
        scores = dice(segmentation, truth, ignored, predictor.structures)
        for (name, score), (found, _) in zip(scores.items(), features, strict=True):
            if not math.isnan(score):
                yield {
                    "case": case,
                    "subject": "",
                    "structure": name,
                    "features": found,
                    "dice": score,
                    "corrupted": bool(is_corrupted),
                    "hd95": _hd95(segmentation, truth, ignored, predictor.structures[name], properties["spacing"]),
                }


def _predicted(case: str, fold: int, source: Source) -> Iterator[tuple[list[tuple[Features, int]], Array]]:
    """Features and segmentation of the clean image, then of the corrupted copy."""
    predictor = source.predictor
    image, label, properties = source.data.read_case(case)
    clean = np.asarray(image[:], dtype=np.float32)
    if not np.isfinite(clean).all():
        raise ValueError(f"case {case}: its preprocessed image holds NaN or infinite values: preprocess it again")
    stage = previous_stage(case, source)
    ignore = predictor.labels.ignore_label
    labelled = None if ignore is None else torch.from_numpy(np.asarray(label[0]) != ignore)
    copies = [clean] + ([corrupt(clean, case, predictor.is_ct)[0]] if source.corrupted else [])
    for copy in copies:
        seen = predictor.with_stage(copy, stage)
        logits = predictor.logits_of(fold, seen)
        tta = agreement_of_passes(predictor)
        probabilities = _labelled_only(predictor, logits, labelled)
        ens = None
        if "ens" in source.optional:
            others = (predictor.logits_of(other, seen) for other in predictor.folds if other != fold)
            masks = [masks_of(_labelled_only(predictor, o, labelled), predictor.has_regions) for o in others]
            ens = agreement(masks_of(probabilities, predictor.has_regions), masks)
        features = with_agreement(of_case(probabilities, predictor.has_regions), tta, ens)
        yield features, predictor.segmentation(logits, properties)


def _labelled_only(predictor: FoldPredictor, logits: Tensor, labelled: Tensor | None) -> Tensor:
    probabilities = predictor.probabilities(logits)
    return probabilities if labelled is None else only_where(probabilities, labelled, predictor.has_regions)


def _saved(
    case: str, fold: int, source: Source, ignored: Array | None
) -> Iterator[tuple[list[tuple[Features, int]], Array]]:
    """Of the prediction that nnU-Net's validation saved."""
    folder = source.model.folder / f"fold_{fold}" / "validation"
    predictor = source.predictor
    probabilities, segmentation = read_saved(
        folder, case, predictor, f"run nnUNetv2_train ... {fold} --val --npz, which saves them"
    )
    if ignored is not None and ignored.shape == segmentation.shape:
        probabilities = only_where(probabilities, torch.from_numpy(~ignored), predictor.has_regions)
    yield of_case(probabilities, predictor.has_regions), segmentation


def read_saved(folder: Path, case: str, predictor: FoldPredictor, remedy: str) -> tuple[Tensor, Array]:
    """Probabilities ``(heads, *S)`` that nnU-Net saved, and the segmentation beside them.

    Raises:
        ValueError: they are missing, damaged or of another model.
    """
    file = folder / f"{case}.npz"
    if not file.is_file():
        raise ValueError(f"{file} is missing: {remedy}")
    try:
        with np.load(file) as content:
            probabilities = np.asarray(content["probabilities"], dtype=np.float32)
    except Exception as error:  # zipfile and numpy have their own
        raise ValueError(f"{file} holds no probabilities ({type(error).__name__}): {remedy}") from error
    segmentation, _ = read_label_map(
        case, folder / f"{case}{predictor.dataset_json['file_ending']}", predictor.reader(), "segmentation"
    )
    heads = predictor.labels.num_segmentation_heads
    if probabilities.shape != (heads, *segmentation.shape):
        raise ValueError(
            f"{file} holds probabilities of shape {probabilities.shape}, this model's would be "
            f"{(heads, *segmentation.shape)}: they are of another model; {remedy}"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError(f"{file} holds NaN or infinite values: {remedy}")
    return torch.from_numpy(probabilities), segmentation


def previous_stage(case: str, source: Source) -> Array | None:
    """Of a cascade's last stage what the network sees beside the image, ``(*S)``; None for other models."""
    name = source.predictor.previous_stage
    if name is None:
        return None
    model = source.model
    folder = model.folder.parent / f"{model.trainer}__{model.plans}__{name}" / "predicted_next_stage"
    return source.data.read_previous_stage(case, folder / model.configuration)


def _hd95(
    segmentation: Array, truth: Array, ignored: Array | None, value: int | tuple[int, ...], spacing: Sequence[float]
) -> float | None:
    (segmentation, truth, unknown), spacing = drop_thin_axes(
        spacing, segmentation, truth, np.zeros(truth.shape, bool) if ignored is None else ignored
    )
    ours, theirs = (np.isin(labels, value) & ~unknown for labels in (segmentation, truth))
    distance = hd95(*surface_distances(ours, theirs, spacing, unknown if unknown.any() else None))
    return None if math.isnan(distance) else distance


def only_where(probabilities: Tensor, labelled: Tensor, has_regions: bool) -> Tensor:
    """Probabilities with certain background where there is no truth."""
    found = probabilities * labelled
    if not has_regions:
        found[0] += ~labelled
    return found


def _truth(case: str, source: Source) -> tuple[Array, dict[str, Any]]:
    file = source.data.base / "gt_segmentations" / f"{case}{source.data.dataset_json['file_ending']}"
    return read_label_map(case, file, source.predictor.reader(), "truth")
