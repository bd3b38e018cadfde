"""What the folds of a model say of one unlabelled case: its label, where to doubt it, and how far to trust the case."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nnunetv2_ext.parts.dice import dice
from nnunetv2_ext.parts.prediction import FoldPredictor

Array = npt.NDArray[Any]

FLOOR = 0.5  # a lower agreement means that more of the label is in doubt than not


@dataclass(frozen=True)
class Verdict:
    """Of one case, on the image's grid.

    Attributes:
        label: (X, Y, Z) integers, the ensemble's segmentation as ``nnUNetv2_predict`` writes it.
        doubtful: (X, Y, Z) bool, where the folds disagree or their mean probability is low.
        agreement: 0..1, see `agreement`; NaN where no fold found anything.
    """

    label: Array
    doubtful: Array
    agreement: float


class Ranked(NamedTuple):
    """A case among the others."""

    case: str
    agreement: float
    why: str  # it was dropped; empty if it was kept


def judge(data: Array, properties: dict[str, Any], predictor: FoldPredictor, threshold: float) -> Verdict:
    """Predict a case by every fold.

    Args:
        data: (C, *S) preprocessed.
        properties: of nnU-Net's preprocessing.
        predictor: the folds.
        threshold: mean probability below which a voxel is in doubt.

    Raises:
        ValueError: the network's output is not finite.
    """
    total, segmentations = None, []
    for logits in predictor.logits(data):
        if not torch.isfinite(logits).all():
            raise ValueError("its prediction holds NaN or infinite values: look at the model's training")
        if len(predictor.folds) > 1:
            segmentations.append(predictor.segmentation(logits, properties))
        with torch.inference_mode():  # in nnU-Net's order
            total = logits.clone() if total is None else total.add_(logits)
    assert total is not None
    with torch.inference_mode():
        total /= len(predictor.folds)
    label, probabilities = predictor.on_image(total, properties)
    doubtful = confidence(probabilities, predictor.has_regions) < threshold
    for other in segmentations:
        doubtful |= other != label
    trust = agreement(label, segmentations, probabilities, predictor.structures, predictor.has_regions)
    return Verdict(label, doubtful, trust)


def confidence(probabilities: Array, has_regions: bool) -> Array:
    """(X, Y, Z), 0..1: that of the most likely class; of regions that of the least certain one, inside or outside."""
    if has_regions:
        found = np.maximum(probabilities, 1 - probabilities).min(0)
    else:
        found = probabilities.max(0)
    return np.asarray(found)


def agreement(
    label: Array,
    segmentations: Sequence[Array],
    probabilities: Array,
    structures: Mapping[str, int | tuple[int, ...]],
    has_regions: bool,
) -> float:
    """Mean over the structures that any fold found of the mean Dice between each fold and the ensemble.

    A single fold has nobody to agree with. Its soft Dice is taken, 2 sum(p m) / (sum(p) + sum(m)) of the probability p
    and the mask m, which is about the Dice to expect.

    Args:
        label: (X, Y, Z), the ensemble's.
        segmentations: (X, Y, Z) of each fold; none for a single fold.
        probabilities: (heads, X, Y, Z) of the ensemble.
        structures: name to label value or values, in the order of the heads.
        has_regions: without regions the first head is the background.
    """
    if segmentations:
        by_fold = [dice(other, label, None, structures) for other in segmentations]
        # an empty prediction of an empty mask is NaN: only folds that found something count
        scores = [np.array([own[name] for own in by_fold]) for name in structures]
    else:
        scores = []
        for p, value in zip(probabilities if has_regions else probabilities[1:], structures.values(), strict=True):
            mask = np.isin(label, value)
            both = float(p.sum(dtype=np.float64)) + int(mask.sum())
            scores.append(np.array([2 * float(p[mask].sum(dtype=np.float64)) / both if mask.any() else math.nan]))
    known = [float(np.nanmean(own)) for own in scores if not np.isnan(own).all()]
    return float(np.mean(known)) if known else math.nan


def ranked(agreements: Mapping[str, float], keep: float) -> list[Ranked]:
    """All cases, those kept first and the best of each first.

    Args:
        agreements: by case; NaN where nothing was found.
        keep: share of all cases that is kept at most, 0..1, rounded up.
    """
    order = sorted(agreements, key=lambda case: (-np.nan_to_num(agreements[case], nan=-1.0), case))
    most = math.ceil(keep * len(order) - 1e-9)
    found = []
    for rank, case in enumerate(order):
        score = agreements[case]
        if math.isnan(score):
            why = "nothing found"
        elif score < FLOOR:
            why = f"agreement below {FLOOR:g}"
        else:
            why = "" if rank < most else f"not among the best {keep:.0%}"
        found.append(Ranked(case, score, why))
    return found
