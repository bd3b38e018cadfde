"""SPE: a reverse segmenter learns from the model's segmentations of new images, and is scored on labelled ones.

Zou et al., arXiv 2504.15667: its score stands for the quality of the segmentations it learnt from. One score a set. The
paper maps scores to Dice by a line over the model's checkpoints; nnU-Net keeps none, so that the scores of the model's
own validation cases stand beside it: with the model's masks, and with perfect ones, the control.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.core.randomness import drawing_from
from nnunetv2_ext.estimate.features import masks_of
from nnunetv2_ext.estimate.universeg import SIZE, SUPPORT, UniverSeg
from nnunetv2_ext.estimate.validation import Source, previous_stage
from nnunetv2_ext.parts.prediction import FoldPredictor

Array = npt.NDArray[Any]

LICENCE = "UniverSeg's released weights are under OpenRAIL++-M, for research; they are yours to obtain."
HOME_CASES = 10  # to learn from, and as many to be scored on
_SLICES = 8  # of a case
_STEPS, _BATCH, _RATE = 200, 8, 3e-3


@dataclass(frozen=True)
class Slices:
    """Images ``(N, C, SIZE, SIZE)`` with masks ``(N, structures, SIZE, SIZE)`` of 0 and 1, and whose they are."""

    images: Tensor
    masks: Tensor
    cases: Sequence[str]


Segmenter = Callable[[Slices, Tensor], Tensor]  # learn from these, segment (M, C, SIZE, SIZE): (M, structures, ..) bool


@dataclass(frozen=True)
class Scores:
    """Of a structure; NaN where nothing is there to learn from.

    Attributes:
        new: score of the segmentations of the new images.
        home: of the model's segmentations of its own validation cases, whose true mean Dice is `home_dice`.
        perfect: control: of the true labels of those cases.
        local: control: of the local labels, if there are any.
    """

    new: float
    home: float
    perfect: float
    local: float
    home_dice: float


def slices_of(case: str, image: Array, masks: Tensor) -> Slices:
    """Up to eight slices along the first axis that have a structure, evenly spread, brought to one size.

    Args:
        image: ``(C, Z, Y, X)`` preprocessed.
        masks: ``(structures, Z, Y, X)`` bool.
    """
    there = torch.nonzero(masks.flatten(2).any(-1).any(0)).ravel()
    chosen = there[torch.linspace(0, len(there) - 1, min(_SLICES, len(there))).round().long()]
    pieces = torch.from_numpy(np.asarray(image, dtype=np.float32))[:, chosen].transpose(0, 1)
    drawn = masks[:, chosen].transpose(0, 1).float()
    size = (SIZE, SIZE)
    if len(chosen):
        pieces = functional.interpolate(pieces, size, mode="bilinear", align_corners=False, antialias=True)
        drawn = functional.interpolate(drawn, size, mode="nearest")
    return Slices(pieces, drawn, [case] * len(chosen))


def joined(parts: Sequence[Slices]) -> Slices | None:
    """All slices of several cases; None if there are none."""
    parts = [part for part in parts if part.cases]
    if not parts:
        return None
    images, masks = torch.cat([p.images for p in parts]), torch.cat([p.masks for p in parts])
    return Slices(images, masks, [case for part in parts for case in part.cases])


def open_segmenter(name: str, device: str) -> tuple[Segmenter, str]:
    """The segmenter of ``tiny-unet`` or ``universeg:FILE``, and its licence notice. ValueError: another, a bad file."""
    kind, _, file = name.partition(":")
    if name == "tiny-unet":
        return lambda support, images: tiny_unet(support, images, device), ""
    if kind == "universeg" and file:
        network = UniverSeg(Path(file), device)
        return lambda support, images: by_universeg(network, support, images), LICENCE
    raise ValueError(f"--reverse is tiny-unet or universeg:FILE, got {name}")


def tiny_unet(support: Slices, images: Tensor, device: str, steps: int = _STEPS) -> Tensor:
    """Train a U-Net of 8, 16 and 32 channels on the support for a moment; the same in every run on a CPU."""
    x, y = (t.to(device) for t in (_standardised(support.images), support.masks))
    with drawing_from(0):
        network = PlainConvUNet(
            x.shape[1], 3, (8, 16, 32), nn.Conv2d, 3, (1, 2, 2), 2, y.shape[1], 1, True, nn.InstanceNorm2d,
            {"affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
        ).to(device)  # fmt: skip
        network.apply(PlainConvUNet.initialize)
        optimizer = torch.optim.Adam(network.parameters(), _RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * _RATE, steps)
        for _ in progress_bar(range(steps), "reverse segmenter"):
            chosen = torch.randint(len(x), (_BATCH,)).to(device)
            logits, truth = network(x[chosen]), y[chosen]
            p = logits.sigmoid()
            overlap = (2 * (p * truth).sum((0, 2, 3)) + 1) / ((p + truth).sum((0, 2, 3)) + 1)
            loss = functional.binary_cross_entropy_with_logits(logits, truth) + 1 - overlap.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        return torch.cat([network(piece.to(device)).cpu() > 0 for piece in _standardised(images).split(_BATCH)])


def by_universeg(network: UniverSeg, support: Slices, images: Tensor) -> Tensor:
    """UniverSeg's answer from up to 64 slices of the support, a structure at a time, on the first channel."""
    chosen = torch.linspace(0, len(support.cases) - 1, min(SUPPORT, len(support.cases))).round().long()
    known, asked = (_within_0_and_1(t[:, :1]) for t in (support.images[chosen], images))
    found = []
    for structure in range(support.masks.shape[1]):
        pairs = torch.cat((known, support.masks[chosen, structure : structure + 1]), 1)
        found.append(
            torch.cat([network(one[None], pairs) > 0 for one in progress_bar(list(asked), "reverse segmenter")])
        )
    return torch.cat(found, 1)


def _standardised(images: Tensor) -> Tensor:
    spread, mean = torch.std_mean(images, (2, 3), keepdim=True)
    return (images - mean) / spread.clamp(min=1e-6)


def _within_0_and_1(images: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-6)


def score(segmenter: Segmenter, support: Slices | None, query: Slices) -> list[float]:
    """Of each structure the mean Dice over the query's cases; NaN: no support, or no case has the structure."""
    structures = query.masks.shape[1]
    if support is None:
        return [math.nan] * structures
    found, truth = segmenter(support, query.images), query.masks.bool()
    names = np.asarray(query.cases)
    dice = np.full((len(set(query.cases)), structures), np.nan)
    for row, case in zip(dice, dict.fromkeys(query.cases), strict=True):
        own = torch.from_numpy(names == case)
        both = (found[own] & truth[own]).sum((0, 2, 3))
        size = found[own].sum((0, 2, 3)) + truth[own].sum((0, 2, 3))
        drawn = truth[own].any(0).flatten(1).any(-1)
        row[drawn.numpy()] = (2 * both / size.clamp(min=1))[drawn].numpy()
    return [float(np.nanmean(column)) if np.isfinite(column).any() else math.nan for column in dice.T]


@dataclass(frozen=True)
class Home:
    """The model's validation cases: those to be scored on, and others to learn from, of other subjects."""

    query: Slices
    predicted: Slices | None
    perfect: Slices | None
    dice: Mapping[str, float]


def read_home(source: Source, folds: Mapping[str, Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> Home:
    """Read and predict them; ten of every second subject to be scored on, ten of the others to learn from.

    Args:
        source: of validation cases.
        folds: to the cases that each validates on.
        rows: of the calibration.

    Raises:
        ValueError: a case is damaged, or none has a structure.
    """
    predictor = source.predictor
    fold_of = {case: fold for fold, cases in folds.items() for case in cases}
    subject_of = {r["case"]: r["subject"] for r in rows if r["case"] in fold_of}
    subjects = sorted(set(subject_of.values()))
    parts: dict[str, list[Slices]] = {"query": [], "predicted": [], "perfect": []}
    learnt = []
    for n, cases in enumerate((set(subjects[::2]), set(subjects[1::2]))):
        own = sorted(case for case, subject in subject_of.items() if subject in cases)
        for case in progress_bar(own[:: max(1, len(own) // HOME_CASES)][:HOME_CASES], "labelled cases"):
            image, label, _ = source.data.read_case(case)
            array = np.asarray(image[:], dtype=np.float32)
            truth = structure_masks(np.asarray(label[0]), predictor)
            parts["perfect" if n else "query"].append(slices_of(case, array, truth))
            if n:
                learnt.append(case)
                logits = predictor.logits_of(
                    int(fold_of[case]), predictor.with_stage(array, previous_stage(case, source))
                )
                masks = masks_of(predictor.probabilities(logits), predictor.has_regions)
                parts["predicted"].append(slices_of(case, array, masks))
    query = joined(parts["query"])
    if query is None:
        raise ValueError("no labelled validation case has a structure: --reverse has nothing to be scored on")
    values = {s: [r["dice"] for r in rows if r["structure"] == s and r["case"] in learnt and not r["corrupted"]]
              for s in predictor.structures}  # fmt: skip
    dice = {s: float(np.mean(v)) if v else math.nan for s, v in values.items()}
    return Home(query, joined(parts["predicted"]), joined(parts["perfect"]), dice)


def structure_masks(label: Array, predictor: FoldPredictor) -> Tensor:
    """``(structures, *S)`` bool of a label map."""
    return torch.from_numpy(np.stack([np.isin(label, value) for value in predictor.structures.values()]))


def scores(segmenter: Segmenter, home: Home, new: Sequence[Slices], local: Sequence[Slices]) -> dict[str, Scores]:
    """By structure, of the new images' segmentations and of the controls."""
    supports = (joined(new), home.predicted, home.perfect, joined(local))
    columns = zip(*(score(segmenter, support, home.query) for support in supports), strict=True)
    found = zip(home.dice.items(), columns, strict=True)
    return {s: Scores(new, own, perfect, labelled, dice) for (s, dice), (new, own, perfect, labelled) in found}
