"""What a prediction says of a label: a probability of error a voxel, expected errors a class, flagged regions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from nnunetv2_ext.parts.dice import dice
from nnunetv2_ext.spatialnoise.posterior import (
    axis_correlations,
    clean_distribution,
    error_field,
    evidence,
    region_evidence,
    trust,
)

Array = npt.NDArray[Any]

FLAGGED = 0.5  # a voxel whose label is more probably wrong than right
SMALLEST_REGION = 10  # voxels; smaller ones are slivers along a contour
MOST_REGIONS = 20  # listed of a case, the largest first
_GRID = 4097  # probabilities at which the pointwise posterior is tabulated


@dataclass(frozen=True)
class Verdict:
    """Of one case.

    Attributes:
        error: ``(X, Y, Z)`` float32, the probability that the voxel's label is wrong; 0 where it is ignored.
        summary: ``expected`` wrong voxels, their share of all voxels with a structure in label or prediction
            (``score``), the same of the control 1 - p(label), mean Dice, number of flagged voxels.
        classes: a row a structure.
        regions: a row a connected region above `FLAGGED`, the largest first.
    """

    error: Array
    summary: dict[str, float]
    classes: list[dict[str, Any]]
    regions: list[dict[str, Any]]


def judge(
    probabilities: Array,
    segmentation: Array,
    label: Array,
    ignore: int | None,
    structures: Mapping[str, Any],
    names: Mapping[int, str],
    has_regions: bool,
    spacing: Array,
    rho: float = 0.0,
) -> Verdict:
    """Judge one label.

    Args:
        probabilities: ``(heads, X, Y, Z)``, softmax with the background, or sigmoid of regions.
        segmentation: ``(X, Y, Z)``, of these probabilities.
        label: ``(X, Y, Z)``.
        ignore: label value that says nothing, or None.
        structures: name to label value, or to the values of a region, in the order of the heads.
        names: label value in a file to name.
        has_regions: what the heads are.
        spacing: mm along the axes.
        rho: correlation of errors between neighbours along the finest axis; 0 judges every voxel by itself.
    """
    valid = np.ones(label.shape, bool) if ignore is None else label != ignore
    inside = [np.isin(label, value) for value in structures.values()]
    # missing[k]: probability that a voxel, labelled otherwise, is of structure k
    p = torch.from_numpy(np.asarray(probabilities, dtype=np.float32))[None]
    correlations = axis_correlations(rho, spacing.tolist())
    if has_regions:
        observed = torch.from_numpy(np.stack(inside))[None]
        a, b = region_evidence(p, observed)
        w = _trust(a, b, 2, valid, correlations)
        each, control = (1 - w[0].numpy()) * valid, ((1 - a[0].numpy()) * valid).max(0)
        error, missing = each.max(0), [np.where(at, 0, own) for at, own in zip(inside, each)]
        wrong = [np.where(at, own, 0) for at, own in zip(inside, each)]
    else:
        observed = torch.from_numpy(np.where(valid, label, 0).astype(np.int64))[None, None]
        a, b = evidence(p, observed)
        w = _trust(a, b, p.shape[1], valid, correlations)
        error, control = (1 - w[0, 0].numpy()) * valid, (1 - a[0, 0].numpy()) * valid
        q = clean_distribution(p, observed, w)[0].numpy()
        missing = [np.where(at, 0, q[value] * valid) for at, value in zip(inside, structures.values())]
        wrong = [np.where(at, error, 0) for at in inside]
    area = float(np.prod([mm for mm, n in zip(spacing, label.shape) if n > 1]))
    flagged, number = ndimage.label(error > FLAGGED)
    sizes = np.bincount(flagged.ravel(), minlength=number + 1)
    sizes[0] = 0
    boxes = ndimage.find_objects(flagged)
    largest = [int(i) for i in np.argsort(-sizes, kind="stable") if sizes[i] >= SMALLEST_REGION]
    regions = []
    for index in largest[:MOST_REGIONS]:
        box = boxes[index - 1]
        at = flagged[box] == index
        regions.append(
            {
                "voxels": int(sizes[index]),
                "mm3": float(sizes[index] * area),
                "expected_wrong_voxels": float(error[box][at].sum()),
                **_confused(label[box][at], segmentation[box][at], names),
                "box": [[side.start, side.stop - 1] for side in reversed(box)],  # x, y, z of the file
            }
        )
    scores = dice(segmentation, label, None if ignore is None else label == ignore, structures)
    rows = []
    for k, (name, score) in enumerate(scores.items()):
        expected = float(wrong[k].sum() + missing[k].sum())
        rows.append(
            {
                "class": name,
                "labelled_voxels": int((inside[k] & valid).sum()),
                "expected_wrong_voxels": expected,
                "expected_wrong_mm3": expected * area,
                "of_these_labelled": float(wrong[k].sum()),
                "of_these_missing": float(missing[k].sum()),
                "dice_label_prediction": score,
            }
        )
    structure = (np.logical_or.reduce(inside) | (segmentation > 0)) & valid
    size = max(1, int(structure.sum()))
    known = [score for score in scores.values() if not math.isnan(score)]
    summary = {
        "expected_wrong_voxels": float(error.sum()),
        "expected_wrong_mm3": float(error.sum() * area),
        "score": float(error.sum() / size),
        "control": float(control.sum() / size),
        "dice": float(np.mean(known)) if known else math.nan,
        "flagged_voxels": int((error > FLAGGED).sum()),
        "labelled_voxels": int((np.logical_or.reduce(inside) & valid).sum()),
        "judged_voxels": int(valid.sum()),
    }
    return Verdict(error.astype(np.float32), summary, rows, regions)


def _trust(
    a: torch.Tensor, b: torch.Tensor, classes: int, valid: Array, correlations: tuple[float, ...]
) -> torch.Tensor:
    """w of the shape of a; of one volume, since a field may not reach into another."""
    if any(correlations):
        eta = error_field(a, b, torch.from_numpy(valid), correlations)
        return trust(eta, a, b)
    # b follows from a, so that the pointwise posterior is a curve, and a volume of any size costs one look-up
    grid = torch.linspace(0, 1, _GRID).clamp(1e-6, 1 - 1e-6)
    other = (1 - grid) / (classes - 1)
    curve = trust(error_field(grid, other, torch.ones_like(grid), (0.0,)), grid, other)
    return torch.from_numpy(np.interp(a.numpy(), grid.numpy(), curve.numpy()).astype(np.float32))


def _confused(labels: Array, predictions: Array, names: Mapping[int, str]) -> dict[str, str]:
    """Names of the most frequent pair of label and prediction."""
    pairs, counts = np.unique(np.stack((labels, predictions)), axis=1, return_counts=True)
    one, other = (names.get(int(v), "background" if v == 0 else str(v)) for v in pairs[:, counts.argmax()])
    return {"labelled": one, "predicted": other}
