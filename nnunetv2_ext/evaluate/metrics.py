"""The metrics and their definitions, and what they are worth when a structure is empty.

Choices follow Metrics Reloaded (Maier-Hein et al., Nature Methods 2024, doi:10.1038/s41592-023-02151-z) and its
companion on pitfalls (Reinke et al. 2024, doi:10.1038/s41592-023-02150-0). Public implementations of HD95 differ
(Podobnik and Vrtovec, arXiv:2410.02630), so the definition is written into every output.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.evaluate.structures import Structure
from nnunetv2_ext.parts.surface import Distances, Mask, drop_thin_axes, hd95, surface_distances

_SLACK = 1e-6  # mm; 3 x 0.3 mm must count as within 0.9 mm


@dataclass(frozen=True)
class Metric:
    """A metric: the name in tables, its unit, which direction is better, and its definition in one sentence."""

    name: str
    unit: str
    higher_is_better: bool
    definition: str

    @property
    def title(self) -> str:
        return f"{self.name} [{self.unit}]" if self.unit else self.name


METRICS: dict[str, Metric] = {
    "dice": Metric("Dice", "", True, "2 |P and T| / (|P| + |T|), in voxels"),
    "hd95": Metric("HD95", "mm", False, "the larger of the two directed 95th percentiles of surface distances (not the "
                   "percentile of both pooled), numpy's linear interpolation"),
    "nsd": Metric("NSD", "", True, "normalised surface distance (surface Dice): share of the surface voxels of both "
                  "that lie within the tolerance of the other surface; every surface voxel counts the same, whatever "
                  "area it stands for"),
}  # fmt: skip

# What a structure is in one case; the names used in every output.
FOUND, ABSENT, MISSED, INVENTED = "found", "absent", "missed", "invented"
WORST, LEAVE_OUT = "worst", "leave-out"
EMPTY_POLICIES: dict[str, str] = {
    WORST: "A structure empty in truth and prediction has no value and is left out of all means (as in nnU-Net); one "
    "that only one of them has counts as the worst there is: Dice 0, NSD 0, HD95 = the image's diagonal.",
    LEAVE_OUT: "A structure empty in truth and prediction has no value and is left out of all means (as in nnU-Net); "
    "one that only one of them has counts as Dice 0 and NSD 0, but has no HD95, which flatters a method that misses "
    "structures.",
}


@dataclass(frozen=True)
class Rules:
    """How cases are scored."""

    metrics: tuple[str, ...]  # keys of METRICS
    tolerance: Mapping[str, float]  # of NSD in mm, by structure name
    empty: str = WORST  # a key of EMPTY_POLICIES

    def __post_init__(self) -> None:
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown or not self.metrics:
            raise ValueError(f"unknown metric {', '.join(unknown) or '(none given)'}; there are {', '.join(METRICS)}")
        if self.empty not in EMPTY_POLICIES:
            raise ValueError(f"unknown policy {self.empty!r} for empty structures; it is {' or '.join(EMPTY_POLICIES)}")
        for name, value in self.tolerance.items():
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"the tolerance of {name} must be 0 mm or more, but it is {value}")


@dataclass(frozen=True)
class Score:
    """One structure of one case; volumes in millilitres (square centimetres in 2-D files), without ignored voxels."""

    state: str  # found, absent (empty in both), missed (empty in the prediction) or invented (empty in the truth)
    values: dict[str, float]  # by key of METRICS; NaN where there is none
    truth_ml: float
    prediction_ml: float


def dice(prediction: Mask, truth: Mask) -> float:
    """2 |P and T| / (|P| + |T|); NaN if both are empty."""
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(prediction & truth)) / total if total else math.nan


def nsd(to_truth: Distances, to_prediction: Distances, tolerance: float) -> float:
    """Share of the surface voxels of both within ``tolerance`` mm of the other surface; NaN without distances.

    Not weighted by area. DeepMind's ``surface-distance`` (https://github.com/google-deepmind/surface-distance) weights
    each surface element by its area, so that our value is 0 to 0.16 lower on the same inputs: compare like with like.
    """
    total = len(to_truth) + len(to_prediction)
    within = np.count_nonzero(to_truth <= tolerance + _SLACK) + np.count_nonzero(to_prediction <= tolerance + _SLACK)
    return float(within / total) if total else math.nan


def score_case(
    prediction: npt.NDArray[Any],
    truth: npt.NDArray[Any],
    spacing: Sequence[float],
    structures: Sequence[Structure],
    rules: Rules,
    ignore_label: int | None = None,
) -> list[Score]:
    """All structures of one case, in their order.

    ``prediction`` and ``truth`` are (X, Y, Z) label maps, (X, Y) in 2-D; voxels where the truth has ``ignore_label``
    are left out. ``spacing`` is in mm along each axis.
    """
    # of all axes: a volume of one slice has a thickness. Millilitres, of a pixel square centimetres
    voxel_ml = float(np.prod(spacing)) / (1000 if len(spacing) > 2 else 100)
    (prediction, truth), spacing = drop_thin_axes(spacing, prediction, truth)
    unknown = truth == ignore_label if ignore_label is not None and ignore_label in truth else None
    scores = []
    for structure in structures:
        masks = structure.mask(prediction), structure.mask(truth)
        ours, theirs = masks if unknown is None else (mask & ~unknown for mask in masks)
        state, values = _score(ours, theirs, spacing, rules, rules.tolerance.get(structure.name, 0.0), unknown)
        volumes = (int(np.count_nonzero(mask)) * voxel_ml for mask in (theirs, ours))
        scores.append(Score(state, {metric: values[metric] for metric in rules.metrics}, *volumes))
    return scores


def _score(
    ours: Mask, theirs: Mask, spacing: Sequence[float], rules: Rules, tolerance: float, unknown: Mask | None
) -> tuple[str, dict[str, float]]:
    """State and all values of a structure; those of the surface are NaN where ``rules`` asks for none of them."""
    if ours.any() and theirs.any():
        needed = any(metric != "dice" for metric in rules.metrics)
        distances = surface_distances(ours, theirs, spacing, unknown) if needed else (np.empty(0), np.empty(0))
        return FOUND, {"dice": dice(ours, theirs), "hd95": hd95(*distances), "nsd": nsd(*distances, tolerance)}
    if not ours.any() and not theirs.any():
        return ABSENT, dict.fromkeys(METRICS, math.nan)
    # between the centres of the voxels in opposite corners
    diagonal = float(np.linalg.norm([(n - 1) * s for n, s in zip(theirs.shape, spacing)]))
    values = {"dice": 0.0, "hd95": diagonal if rules.empty == WORST else math.nan, "nsd": 0.0}
    return MISSED if theirs.any() else INVENTED, values
