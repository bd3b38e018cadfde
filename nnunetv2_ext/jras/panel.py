"""The picture of J-RAS at work: a patch, the guides it retrieved and their weights, prediction and truth.

It shows image patches of patients: as private as the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.style
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels, target_to_labels
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.jras.network import JRASNetwork
from nnunetv2_ext.parts.consistency import valid_mask

if TYPE_CHECKING:
    from nnunetv2_ext.jras.training import JRASTraining

Array = npt.NDArray[Any]


class Guide(NamedTuple):
    """A guide in a picture: its row of the bank, weight w, cosine, first channel `(*L)` and label map `(*L)`."""

    row: int
    weight: float
    cosine: float
    image: Array
    labels: Array


class GuideView(NamedTuple):
    """One patch `(*P)`, its first channel, of a case or file, and what it retrieved: the valid guides, nearest first.

    Label maps are numbered as in core/labelmaps.py; `null_cosine` is b0.
    """

    name: str
    image: Array
    truth: Array | None
    prediction: Array
    guides: Sequence[Guide]
    null_weight: float
    null_cosine: float


def view_of_patch(
    network: JRASNetwork, logits: Tensor, x: Tensor, name: str, labels: LabelManager, truth: Array | None = None
) -> GuideView:
    """What the forward that gave `logits` (1, M, *P) of `x` (1, C_in, *P) retrieved."""
    last, bank = network.last, network.bank
    assert last is not None  # with a bank every forward retrieves
    ids = last.ids[0, last.valid[0]]  # the valid ones come first, so that the others' weights fall off the end
    numbers = zip(ids.tolist(), last.weights[0, :-1].tolist(), last.similarities[0].tolist())
    images = bank.stored_images(ids)[:, 0].cpu().numpy()
    # half a unit off: a mask is a region's logit, or the class that is largest
    maps = [logits_to_labels(mask - 0.5, labels) for mask in bank.masks(ids)]
    guides = [Guide(*own, *drawn) for own, drawn in zip(numbers, zip(images, maps))]
    image, prediction = x[0, 0].float().cpu().numpy(), logits_to_labels(logits[0].float(), labels)
    null = float(last.weights[0, -1]), float(network.null_logit.detach())
    return GuideView(name, image, truth, prediction, guides, *null)


@torch.no_grad()
def view_of_batch(trainer: JRASTraining, batch: Batch) -> GuideView:
    """The sample of `batch` with the most foreground; guides of its own subject are excluded, as in training."""
    network, labels = trainer.retrieval_network, trainer.label_manager
    assert network is not None
    valid = valid_mask(batch.top_target, labels.ignore_label, labels.has_regions)
    foreground = batch.top_target > 0 if valid is None else (batch.top_target > 0) & valid
    sample = batch.select([int(foreground.flatten(1).sum(1).argmax())])
    was_training = network.training
    network.eval()
    try:
        with torch.autocast("cuda", enabled=trainer.device.type == "cuda"):
            output = trainer.forward(sample, network)
    finally:
        network.train(was_training)
    logits = output[0] if isinstance(output, (list, tuple)) else output
    truth = target_to_labels(sample.top_target[0], labels)
    return view_of_patch(network, logits, sample.data, sample.keys[0], labels, truth)


def draw_guides(
    view: GuideView, path: Path, title: str, dataset_json: dict, labels: LabelManager, spacing: Sequence[float]
) -> None:
    """Write the picture: the patch with truth and prediction, then each guide with its mask, weight and cosine.

    Guides are drawn as they are stored, at low resolution, each at its own fullest slice: they need not lie where the
    patch does. The title continues with the patch's name and the null weight; `spacing` is in mm per patch axis.
    """
    classes = class_names(dataset_json, labels)
    ignored = [value for value, name in classes.items() if name == "ignore"]
    size, ndim, mm = view.image.shape, view.image.ndim, np.asarray(spacing, dtype=float)
    organs = view.prediction if view.truth is None else np.where(np.isin(view.truth, ignored), 0, view.truth)
    # name, image, labels, mm per voxel, labels whose fullest slice is drawn, opacity
    columns = [("prediction", view.image, view.prediction, mm, organs, 0.35)]
    if view.truth is not None:
        columns.insert(0, ("truth", view.image, view.truth, mm, organs, 0.35))
    for row, weight, cosine, image, label in view.guides:
        name = f"guide {row}: w {weight:.2f}, cos {cosine:.2f}"
        columns.append((name, image, label, mm * size / image.shape, label, 0.0))
    cuts = [None] if ndim == 2 else [0, 1, 2]
    with matplotlib.style.context("default"):  # nnU-Net's progress plot changes the fonts of the whole process
        figure = Figure(figsize=(2.35 * len(columns), 2.5 * len(cuts) + 1.0), layout="constrained")
        figure.suptitle(
            f"{title}: {view.name}, patch {' x '.join(map(str, size))}, no guide: w {view.null_weight:.2f} "
            f"(b0 {view.null_cosine:.2f})"
        )
        for cells, axis in zip(figure.subplots(len(cuts), len(columns), squeeze=False), cuts):
            turned = view_across(axis)
            for cell, (name, image, label, scale, where, fill) in zip(cells, columns):
                index = None if axis is None else fullest_slice(where, axis)
                shown, mask = (turned.cut(part, index) for part in (image, label))
                text = name if index is None else f"{name}\naxis {axis}, slice {index}"
                draw_slice(cell, shown, mask, classes, fill=fill, spacing=turned.spacing(scale), title=text)
        add_legend(figure, classes, (int(value) for _, _, label, *_ in columns for value in np.unique(label)))
        figure.savefig(path, dpi=110)
