"""Segmentations of new images with their expected Dice, worst first."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunetv2_ext.core.files import read_json, require_writable
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import read_label_map
from nnunetv2_ext.data.find import as_model
from nnunetv2_ext.data.folders import cases_of_images, require_channels
from nnunetv2_ext.data.preprocessed import open_preprocessed
from nnunetv2_ext.data.raw import declared_values
from nnunetv2_ext.estimate.calibration import MIN_LOCAL, is_outside
from nnunetv2_ext.estimate.features import Features, agreement, masks_of, of_case, with_agreement
from nnunetv2_ext.estimate.fit import Fitted, validation_cases
from nnunetv2_ext.estimate.mirroring import agreement_of_passes, open_predictor
from nnunetv2_ext.estimate.result import Result, judged
from nnunetv2_ext.estimate.reverse import (
    Slices,
    open_segmenter,
    read_home,
    scores,
    slices_of,
    structure_masks,
)
from nnunetv2_ext.estimate.validation import Source, read_saved
from nnunetv2_ext.parts.dice import dice
from nnunetv2_ext.parts.prediction import FoldPredictor

Array = npt.NDArray[Any]


def apply(
    model: Path,
    images: Path,
    output: Path,
    local_labels: Path | None = None,
    threshold: float = 0.7,
    device: str = "cpu",
    previous: Path | None = None,
    saved: Path | None = None,
    reverse: str | None = None,
) -> Result:
    """Segment every case of a folder as ``nnUNetv2_predict`` does, and estimate the Dice of each structure.

    Args:
        model: folder with a fit (`estimate.fit.fit`); its folds are used, as an ensemble if there are several.
        images: as for ``nnUNetv2_predict``.
        output: new or empty folder for the segmentations.
        local_labels: true segmentations of some of the cases, at least three.
        threshold: Dice below which a case is to be looked at.
        previous: for the last stage of a cascade: segmentations by its previous stage.
        saved: probabilities that ``nnUNetv2_predict --save_probabilities`` left; no model is run.
        reverse: also SPE's score by this segmenter, ``tiny-unet`` or ``universeg:FILE``.

    Raises:
        ValueError: no fit or another checkpoint, no images, a damaged one (named), or labels that do not fit.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold is a Dice above 0 and up to 1, got {threshold}")
    if reverse and saved:
        raise ValueError("--reverse needs the preprocessed images, which --npz does not read: leave one of them away")
    segmenter, licence = open_segmenter(reverse, device) if reverse else (None, "")
    fitted = Fitted.load(model)
    if (saved is not None) != fitted.saved:
        raise ValueError(
            f"the fit of {model} was made {'with' if fitted.saved else 'without'} --npz, on another grid: give the "
            "option to both or to none"
        )
    folds = [int(fold) for fold in fitted.hashes]
    predictor = open_predictor(model, folds, fitted.checkpoint, device, "tta" in fitted.optional)
    if predictor.mirrored != fitted.mirrored:
        raise ValueError(
            f"predictions are mirrored along {predictor.mirrored}, in the fit along {fitted.mirrored}: fit again"
        )
    ending = str(predictor.dataset_json["file_ending"])
    files = _images(images, predictor.dataset_json)
    labels = _labels(local_labels, ending, files) if local_labels else {}
    stages = {} if saved else _stages(previous, ending, files, predictor.previous_stage)
    if saved:
        _require_same_model(saved, model)
    source, cases = _validation(model, fitted, predictor) if segmenter else (None, {})
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty, and nothing is overwritten: name another folder")
    output.mkdir(parents=True, exist_ok=True)
    require_writable(output)

    rows: list[dict[str, Any]] = []
    drawn: set[str] = set()
    slices: list[Slices] = []
    truths: list[Slices] = []
    for case, own in progress_bar(list(files.items()), "estimating"):
        target = output / f"{case}{ending}"
        if saved:
            remedy = f"predict {images} with nnUNetv2_predict --save_probabilities into {saved}"
            probabilities, segmentation = read_saved(saved, case, predictor, remedy)
            shutil.copyfile(saved / target.name, target)
            by_fold = [of_case(probabilities, predictor.has_regions)]
        else:
            by_fold, logits, data, properties = _predicted(case, own, stages.get(case), predictor, fitted)
            segmentation = predictor.segmentation(logits, properties)
            if segmenter:
                image = data[: len(own)]  # without a previous stage
                masks = masks_of(predictor.probabilities(logits), predictor.has_regions)
                slices.append(slices_of(case, image, masks))
            predictor.reader().write_seg(segmentation, str(target), properties)
        measured, own_drawn = _measured(case, segmentation, labels.get(case), predictor)
        drawn |= own_drawn
        if segmenter and case in labels:  # after its values were looked at
            truths.append(
                slices_of(case, image, structure_masks(predictor.label_on_grid(own, labels[case]), predictor))
            )
        rows += _rows(case, by_fold, segmentation, measured, predictor, fitted)
    # a site that never draws a structure has not measured its Dice as 0
    rows = [row if row["structure"] in drawn else {**row, "measured": None} for row in rows]
    result = judged(rows, fitted, folds, threshold)
    if segmenter is None or source is None:
        return result
    home = read_home(source, cases, fitted.calibration.rows)
    return replace(result, reverse=scores(segmenter, home, slices, truths), licence=licence)


def _validation(folder: Path, fitted: Fitted, predictor: FoldPredictor) -> tuple[Source, dict[str, list[str]]]:
    """The model's own labelled cases, by the fold that validates on them."""
    model = as_model(folder.resolve())
    assert model is not None  # a fit lies there
    data = open_preprocessed(
        model.dataset, model.configuration, str(read_json(model.folder / "plans.json")["plans_name"])
    )
    return Source(model, data, predictor, False, (), False), validation_cases(data, list(fitted.hashes))


def _images(folder: Path, dataset_json: dict[str, Any]) -> dict[str, list[Path]]:
    ending = str(dataset_json["file_ending"])
    found = cases_of_images(folder, ending)
    if not found:
        raise ValueError(f"{folder} holds no image CASE_0000{ending}")
    return {case: require_channels(case, files, dataset_json) for case, files in found.items()}


def _labels(folder: Path, ending: str, files: Mapping[str, Any]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"--local-labels {folder} is not a folder")
    found = {p.name.removesuffix(ending): p for p in sorted(folder.glob(f"*{ending}")) if p.is_file()}
    if unknown := [case for case in found if case not in files]:
        raise ValueError(f"{folder} has a label of {unknown[0]}, and no image of that case is among those given")
    if len(found) < MIN_LOCAL:
        raise ValueError(f"{folder} holds {len(found)} labels; at least {MIN_LOCAL} are needed, five are a good start")
    return found


def _stages(folder: Path | None, ending: str, files: Mapping[str, Any], stage: str | None) -> dict[str, Path]:
    if stage is None:
        if folder is not None:
            raise ValueError("the model is not the last stage of a cascade: leave --previous-stage away")
        return {}
    if folder is None:
        raise ValueError(
            f"the model is the last stage of a cascade: predict the images with {stage}, and give that folder with "
            "--previous-stage"
        )
    found = {case: folder / f"{case}{ending}" for case in files}
    if missing := [file for file in found.values() if not file.is_file()]:
        raise ValueError(f"{missing[0]} is missing: predict every image with {stage} into {folder}")
    return found


def _require_same_model(saved: Path, model: Path) -> None:
    """ValueError if nnU-Net left the plans of another model beside the probabilities."""
    theirs, ours = saved / "plans.json", model / "plans.json"
    if theirs.is_file() and read_json(theirs) != read_json(ours):
        raise ValueError(f"{saved} holds predictions of another model ({theirs} differs from {ours}): predict again")


def _predicted(
    case: str, files: Sequence[Path], stage: Path | None, predictor: FoldPredictor, fitted: Fitted
) -> tuple[list[list[tuple[Features, int]]], Tensor, Array, dict[str, Any]]:
    """Features of each fold's prediction, the ensemble's logits, and the preprocessed image with its properties."""
    try:
        data, properties = predictor.preprocess(files, stage)
    except Exception as error:  # every reader has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        shown = files[0] if stage is None else f"{files[0]} or {stage}"
        raise ValueError(f"case {case}: {shown} cannot be read ({reason}): replace the file") from error
    if not np.isfinite(data).all():
        raise ValueError(f"case {case}: {files[0]} holds NaN or infinite values: replace them")
    total: Tensor | None = None
    by_fold, agreements, masks = [], [], []
    for logits in predictor.logits(data):
        probabilities = predictor.probabilities(logits)
        by_fold.append(of_case(probabilities, predictor.has_regions))
        agreements.append(agreement_of_passes(predictor))
        if "ens" in fitted.optional:
            masks.append(masks_of(probabilities, predictor.has_regions))
        with torch.inference_mode():  # in nnU-Net's order, so that bytes agree
            total = logits if total is None else total.add_(logits)
    assert total is not None
    if len(by_fold) > 1:
        with torch.inference_mode():
            total /= len(by_fold)
    ens: list[list[float] | None] = [agreement(own, masks[:i] + masks[i + 1 :]) for i, own in enumerate(masks)]
    ens = ens or [None] * len(by_fold)
    found = [with_agreement(*one) for one in zip(by_fold, agreements, ens, strict=True)]
    return found, total, data, properties


def _measured(
    case: str, segmentation: Array, label: Path | None, predictor: FoldPredictor
) -> tuple[dict[str, float], set[str]]:
    """Dice by structure, and the structures that are drawn in the label; nothing without a label."""
    if label is None:
        return {}, set()
    truth, _ = read_label_map(case, label, predictor.reader())
    known = declared_values(predictor.dataset_json["labels"])
    if unknown := sorted(set(np.unique(truth).tolist()) - known):
        raise ValueError(f"case {case}: {label} holds the value {unknown[0]}, which the model does not know")
    if truth.shape != segmentation.shape:
        raise ValueError(f"case {case}: {label} has shape {truth.shape}, the image {segmentation.shape}")
    ignore = predictor.labels.ignore_label
    scores = dice(segmentation, truth, None if ignore is None else truth == ignore, predictor.structures)
    drawn = {name for name, value in predictor.structures.items() if np.isin(truth, value).any()}
    return {name: score for name, score in scores.items() if not math.isnan(score)}, drawn


def _rows(
    case: str,
    by_fold: Sequence[Sequence[tuple[Features, int]]],
    segmentation: Array,
    measured: Mapping[str, float],
    predictor: FoldPredictor,
    fitted: Fitted,
) -> list[dict[str, Any]]:
    rows = []
    for i, (name, value) in enumerate(predictor.structures.items()):
        own = [found[i][0] for found in by_fold if found[i][1] > 0]
        known = name in fitted.calibration.quantile and bool(own)
        mean = {key: float(np.mean([features[key] for features in own])) for key in own[0]} if own else {}
        ranks = fitted.calibration.ranks
        rows.append(
            {
                "case": case,
                "structure": name,
                "found": bool(np.isin(segmentation, value).any()) and bool(own),
                "estimate": float(np.mean([fitted.calibration.line.dice(name, features) for features in own]))
                if known
                else math.nan,
                # one verdict a case, as the binomial test of the alarm wants
                "outside": bool(known and is_outside(fitted.calibration, name, mean)),
                "boundary": ranks.rank(name, mean) if known and ranks else "",
                "measured": measured.get(name),
            }
        )
    return rows
