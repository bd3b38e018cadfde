"""Segmentations of new images with their expected Dice, worst first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nnunetv2_ext.core.files import require_writable
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import read_label_map
from nnunetv2_ext.data.folders import cases_of_images, require_channels
from nnunetv2_ext.data.raw import declared_values
from nnunetv2_ext.estimate.calibration import alarm, is_outside, local_correction, set_interval
from nnunetv2_ext.estimate.features import of_case
from nnunetv2_ext.estimate.fit import Fitted
from nnunetv2_ext.parts.dice import dice
from nnunetv2_ext.parts.prediction import FoldPredictor

NOT_FOUND = "not found"


@dataclass(frozen=True)
class Estimate:
    """One structure of one case.

    Attributes:
        estimate: expected Dice; NaN where the structure was not found.
        low, high: of the interval; NaN where there is none.
        flag: ``look`` where the estimate or the lower end is below the threshold, or nothing was found.
        why: for people.
        measured: Dice, where a local label exists.
    """

    case: str
    structure: str
    estimate: float
    low: float
    high: float
    flag: str = ""
    why: str = ""
    measured: float | None = None


@dataclass(frozen=True)
class Result:
    """What `apply` found.

    Attributes:
        estimates: worst first.
        sets: by structure: mean estimate, lower and upper end of the mean's interval, number of cases.
        unlike: structures whose features lie outside of the calibration more often than chance allows.
        local: number of local labels.
        folds: of the ensemble.
        threshold: below which a case is flagged.
    """

    estimates: list[Estimate]
    sets: dict[str, tuple[float, float, float, int]]
    unlike: list[str]
    local: int
    folds: list[int]
    threshold: float


def apply(
    model: Path,
    images: Path,
    output: Path,
    local_labels: Path | None = None,
    threshold: float = 0.7,
    device: str = "cpu",
) -> Result:
    """Segment every case of a folder as ``nnUNetv2_predict`` does, and estimate the Dice of each structure.

    Args:
        model: folder with a fit (`estimate.fit.fit`); its folds are used, as an ensemble if there are several.
        images: as for ``nnUNetv2_predict``.
        output: new or empty folder for the segmentations.
        local_labels: true segmentations of some of the cases, at least three.
        threshold: Dice below which a case is to be looked at.

    Raises:
        ValueError: no fit or another checkpoint, no images, a damaged one (named), or labels that do not fit.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold is a Dice above 0 and up to 1, got {threshold}")
    fitted = Fitted.load(model)
    predictor = FoldPredictor(model, [int(fold) for fold in fitted.hashes], fitted.checkpoint, device)
    axes = list(predictor.predictor.allowed_mirroring_axes or ())
    if axes != fitted.mirrored:
        raise ValueError(f"predictions are mirrored along {axes}, in the fit along {fitted.mirrored}: fit again")
    ending = str(predictor.predictor.dataset_json["file_ending"])
    files = _images(images, predictor.predictor.dataset_json)
    labels = _labels(local_labels, ending, files) if local_labels else {}
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty, and nothing is overwritten: name another folder")
    output.mkdir(parents=True, exist_ok=True)
    require_writable(output)

    found: list[dict[str, Any]] = []
    for case, own in progress_bar(list(files.items()), "estimating"):
        found += _of_case(case, own, predictor, fitted, output / case, labels.get(case))
    return _judged(found, fitted, predictor.folds, threshold, len(labels))


def _images(folder: Path, dataset_json: dict[str, Any]) -> dict[str, list[Path]]:
    ending = str(dataset_json["file_ending"])
    found = cases_of_images(folder, ending)
    if not found:
        raise ValueError(f"{folder} holds no image CASE_0000{ending}")
    return {case: require_channels(case, files, dataset_json) for case, files in found.items()}


def _labels(folder: Path, ending: str, files: dict[str, list[Path]]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"--local-labels {folder} is not a folder")
    found = {p.name.removesuffix(ending): p for p in sorted(folder.glob(f"*{ending}")) if p.is_file()}
    if unknown := [case for case in found if case not in files]:
        raise ValueError(f"{folder} has a label of {unknown[0]}, and no image of that case is among those given")
    if len(found) < 3:
        raise ValueError(f"{folder} holds {len(found)} labels; at least 3 are needed, five are a good start")
    return found


def _of_case(
    case: str, files: list[Path], predictor: FoldPredictor, fitted: Fitted, target: Path, label: Path | None
) -> list[dict[str, Any]]:
    try:
        data, properties = predictor.preprocess(files)
    except Exception as error:  # every reader has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(f"case {case}: {files[0]} cannot be read ({reason}): replace the file") from error
    if not np.isfinite(data).all():
        raise ValueError(f"case {case}: {files[0]} holds NaN or infinite values: replace them")
    total: Tensor | None = None
    by_fold = []
    for logits in predictor.logits(data):
        by_fold.append(of_case(predictor.probabilities(logits), predictor.has_regions))
        # in nnU-Net's order, so that bytes agree; outside of its inference mode only a clone can be added to
        total = logits.clone() if total is None else total.add_(logits)
    assert total is not None
    if len(by_fold) > 1:
        total /= len(by_fold)
    predictor.write(total.clone(), properties, target)
    segmentation = predictor.segmentation(total, properties)
    truth = None
    if label is not None:
        reader = predictor.predictor.plans_manager.image_reader_writer_class()
        truth, _ = read_label_map(case, label, reader)
        known = declared_values(predictor.predictor.dataset_json["labels"])
        if unknown := sorted(set(np.unique(truth).tolist()) - known):
            raise ValueError(f"case {case}: {label} holds the value {unknown[0]}, which the model does not know")
        if truth.shape != segmentation.shape:
            raise ValueError(f"case {case}: {label} has shape {truth.shape}, the image {segmentation.shape}")
    ignore, measured = predictor.predictor.label_manager.ignore_label, dict[str, float]()
    if truth is not None:
        measured = dice(segmentation, truth, None if ignore is None else truth == ignore, predictor.structures)
    rows = []
    for i, (name, value) in enumerate(predictor.structures.items()):
        sizes = [own[i][1] for own in by_fold]
        estimates = [fitted.calibration.line.predict(name, own[i][0]) for own in by_fold if own[i][1] > 0]
        outside = [is_outside(fitted.calibration, name, own[i][0]) for own in by_fold if own[i][1] > 0]
        rows.append(
            {
                "case": case,
                "structure": name,
                "found": bool(np.isin(segmentation, value).any()) and any(sizes),
                "estimate": float(np.mean(estimates)) if estimates else math.nan,
                "outside": any(o for o in outside if o is not None),
                "measured": None if math.isnan(measured.get(name, math.nan)) else measured[name],
            }
        )
    return rows


def _judged(rows: Sequence[dict[str, Any]], fitted: Fitted, folds: list[int], threshold: float, local: int) -> Result:
    calibration = fitted.calibration
    estimates: list[Estimate] = []
    sets: dict[str, tuple[float, float, float, int]] = {}
    unlike = []
    for structure in fitted.structures:
        own = [row for row in rows if row["structure"] == structure]
        if structure not in calibration.quantile:
            for row in own:
                why = "the fit has no case with it"
                estimates.append(Estimate(row["case"], structure, math.nan, math.nan, math.nan, "look", why))
            continue
        offset, half = 0.0, calibration.quantile[structure]
        labelled = [r for r in own if r["measured"] is not None and r["found"]]
        if len(labelled) >= 3:
            offset, half = local_correction(
                [r["measured"] for r in labelled], [r["estimate"] for r in labelled], calibration.quantile[structure]
            )
        found = []
        for row in own:
            if not row["found"]:
                estimates.append(
                    Estimate(row["case"], structure, math.nan, math.nan, math.nan, "look", NOT_FOUND, row["measured"])
                )
                continue
            value = float(np.clip(row["estimate"] + offset, 0, 1))
            found.append(value)
            interval = calibration.interval(structure, value, half) or (math.nan, math.nan)
            low = value if math.isnan(interval[0]) else interval[0]
            reasons = []
            if value < threshold:
                reasons.append(f"estimate below {threshold:g}")
            elif low < threshold:
                reasons.append(f"lower end below {threshold:g}")
            if row["outside"]:
                reasons.append("unlike every calibration case")
            flag = "look" if reasons else ""
            text = "; ".join(reasons)
            estimates.append(Estimate(row["case"], structure, value, *interval, flag, text, row["measured"]))
        if found:
            mean = float(np.mean(found))
            error = set_interval(calibration, structure, len(found)) or (math.nan, math.nan)
            sets[structure] = (mean, mean + error[0], mean + error[1], len(found))
        clean = sum(r["structure"] == structure and not r["corrupted"] for r in calibration.rows)
        if alarm([r["outside"] for r in own if r["found"]], clean):
            unlike.append(structure)
    worst = sorted(estimates, key=lambda e: -1.0 if math.isnan(e.estimate) else e.estimate)
    return Result(worst, sets, unlike, local, folds, threshold)
