"""The picture of J-RAS at work: a patch, the guides it retrieved and their weights, prediction and truth.

It shows image patches of patients: as private as the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.core.figures import draw_slice, fullest_slice, label_colours, take_slice
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels, target_to_labels
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.jras.network import JRASNetwork

if TYPE_CHECKING:
    from nnunetv2_ext.jras.training import JRASTraining

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GuideView:
    """One patch and what it retrieved, on the CPU; label maps numbered as in core/labelmaps.py.

    Attributes:
        name: case id or file of the patch.
        image: first channel `(*P)`.
        truth: `(*P)`, or None if unknown.
        prediction: `(*P)`.
        guide_images: first channel of each valid guide, `(k, *L)`.
        guide_labels: `(k, *L)`.
        guide_ids: k rows of the bank.
        weights: k weights w_j.
        similarities: k cosines.
        null_weight: w of the null guide.
        null_similarity: the cosine b0 a guide has to exceed.
    """

    name: str
    image: Array
    truth: Array | None
    prediction: Array
    guide_images: Array
    guide_labels: Array
    guide_ids: tuple[int, ...]
    weights: tuple[float, ...]
    similarities: tuple[float, ...]
    null_weight: float
    null_similarity: float


def view_of_patch(
    network: JRASNetwork, logits: Tensor, x: Tensor, name: str, labels: LabelManager, truth: Array | None = None
) -> GuideView:
    """What the forward that gave `logits` (1, M, *P) of `x` (1, C_in, *P) retrieved.

    Raises:
        ValueError: it retrieved nothing, the bank being empty.
    """
    last = network.last
    if last is None:
        raise ValueError("this network has no guides: its bank is empty (was it exported with --strip-bank?)")
    valid = last.valid[0].cpu()
    ids = last.ids[0].cpu()[valid]
    on_device = ids.to(network.bank.keys.device)
    masks = network.bank.masks(on_device)
    return GuideView(
        name=name,
        image=x[0, 0].float().cpu().numpy(),
        truth=truth,
        prediction=logits_to_labels(logits[0].float(), labels),
        guide_images=network.bank.stored_images(on_device)[:, 0].cpu().numpy(),
        # half a unit off: a mask is a region's logit, or the class that is largest
        guide_labels=np.stack([logits_to_labels(mask - 0.5, labels) for mask in masks])
        if len(masks)
        else np.zeros((0, *network.low_shape), dtype=np.int64),
        guide_ids=tuple(ids.tolist()),
        weights=tuple(last.weights[0, :-1].cpu()[valid].tolist()),
        similarities=tuple(last.similarities[0].cpu()[valid].tolist()),
        null_weight=float(last.weights[0, -1]),
        null_similarity=float(network.null_logit.detach()),
    )


@torch.no_grad()
def view_of_batch(trainer: JRASTraining, batch: Batch) -> GuideView:
    """The sample of `batch` with the most foreground; guides of its own subject are excluded, as in training."""
    network, labels = trainer.retrieval_network, trainer.label_manager
    assert network is not None
    foreground = batch.top_target > 0
    if labels.ignore_label is not None:
        foreground = (
            foreground[:, :-1] if labels.has_regions else foreground & (batch.top_target != labels.ignore_label)
        )
    sample = batch.select([int(foreground.flatten(1).sum(1).argmax())])
    was_training = network.training
    network.eval()
    try:
        with torch.autocast("cuda") if trainer.device.type == "cuda" else nullcontext():
            output = trainer.forward(sample, network)
    finally:
        network.train(was_training)
    logits = output[0] if isinstance(output, (list, tuple)) else output
    truth = target_to_labels(sample.top_target[0], labels)
    return view_of_patch(network, logits, sample.data, sample.keys[0], labels, truth)


def draw_guides(
    view: GuideView,
    path: Path,
    title: str,
    dataset_json: dict,
    labels: LabelManager,
    spacing: Sequence[float] | None = None,
) -> None:
    """Write the picture: the patch with truth and prediction, then each guide with its mask, weight and cosine.

    Guides are stored at low resolution and drawn so; each at its own fullest slice, as they need not lie where the
    patch does.

    Args:
        view: what to draw.
        path: PNG to write.
        title: its beginning; the patch's name and the null weight follow.
        dataset_json: names of the classes.
        labels: their order.
        spacing: voxel size per patch axis in mm; None for cubes.
    """
    classes = class_names(dataset_json, labels)
    ignored = [value for value, name in classes.items() if name == "ignore"]
    mm = np.ones(view.image.ndim) if spacing is None else np.asarray(spacing, dtype=float)
    cells = mm * view.image.shape / view.guide_images.shape[1:] if len(view.guide_images) else mm
    columns = [("truth", view.image, view.truth, mm)] if view.truth is not None else []
    columns.append(("prediction", view.image, view.prediction, mm))
    for image, label, number, weight, similarity in zip(
        view.guide_images, view.guide_labels, view.guide_ids, view.weights, view.similarities
    ):
        columns.append((f"guide {number}: w {weight:.2f}, cos {similarity:.2f}", image, label, cells))
    cuts = [None] if view.image.ndim == 2 else [0, 1, 2]
    with matplotlib.style.context("default"):  # nnU-Net's progress plot changes the fonts of the whole process
        figure = Figure(figsize=(2.35 * len(columns), 2.5 * len(cuts) + 1.0), layout="constrained")
        figure.suptitle(
            f"{title}: {view.name}, patch {' x '.join(map(str, view.image.shape))}, no guide: w {view.null_weight:.2f} "
            f"(b0 {view.null_similarity:.2f})"
        )
        for row, axis in zip(figure.subplots(len(cuts), len(columns), squeeze=False), cuts):
            organs = view.prediction if view.truth is None else np.where(np.isin(view.truth, ignored), 0, view.truth)
            for number, (cell, (name, image, label, size)) in enumerate(zip(row, columns)):
                own = number >= len(columns) - len(view.guide_images)
                index = None if axis is None else fullest_slice(label if own else organs, axis)
                rest = [a for a in range(image.ndim) if a != axis]
                draw_slice(
                    cell,
                    _cut(image, axis, index),
                    _cut(label, axis, index),
                    classes,
                    fill=0.0 if own else 0.35,
                    spacing=(size[rest[1]], size[rest[0]]),
                    title=name if index is None else f"{name}\naxis {axis}, slice {index}",
                )
        present = {int(value) for _, _, label, _ in columns for value in np.unique(label)}
        handles = [
            Patch(color=colour, label=classes[value])
            for value, colour in label_colours(classes).items()
            if value in present
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
        figure.savefig(path, dpi=110)


def _cut(volume: Array, axis: int | None, index: int | None) -> Array:
    return volume.T if axis is None or index is None else take_slice(volume, axis, index)
