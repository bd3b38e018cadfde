"""Dice of label maps as nnU-Net scores a validation, for methods that score in memory (evaluate/ scores files)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask


def dice(
    segmentation: np.ndarray, truth: np.ndarray, ignored: np.ndarray | None, structures: Mapping[str, Any]
) -> dict[str, float]:
    """nnU-Net's Dice of each structure; NaN where truth and segmentation are empty.

    Args:
        segmentation, truth: label maps of one shape.
        ignored: voxels that do not count, or None.
        structures: name to label value or values.
    """
    scores = {}
    for name, value in structures.items():
        masks = [region_or_label_to_mask(labels, value) for labels in (truth, segmentation)]
        tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks, ignored)
        scores[name] = float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else math.nan
    return scores
