"""The picture of J-RAS at work: a patch, the mask its cells read of the guides, truth, prediction, and the guides.

It shows image patches of patients: as private as the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
from nnunetv2_ext.core.labelmaps import class_names, logits_to_labels
from nnunetv2_ext.core.orientation import view_across
from nnunetv2_ext.jras.network import JRASNetwork

Array = npt.NDArray[Any]


class Guide(NamedTuple):
    """A guide in a picture: its row of the bank and its case, its share of the attention, first channel and label map
    `(*P)`.
    """

    row: int
    case: str | None  # None: the checkpoint does not say, after an export or `bank`
    attention: float
    image: Array
    labels: Array

    @property
    def title(self) -> str:
        """As people name it."""
        return f"guide {self.row} (case hidden)" if self.case is None else f"guide {self.case}"


class ReadingView(NamedTuple):
    """One patch `(*P)`, its first channel, of a case or file; what its cells read, and the valid guides, nearest first.

    Label maps are numbered as in core/labelmaps.py; that of `read` is the likeliest class of the transported masks.
    """

    name: str
    image: Array
    truth: Array | None
    prediction: Array
    read: Array
    guides: Sequence[Guide]
    directions: Array | None = None  # of the case, see core/orientation.py


@torch.no_grad()
def view_of_patch(
    network: JRASNetwork,
    logits: Tensor,
    x: Tensor,
    name: str,
    labels: LabelManager,
    truth: Array | None = None,
    cases: Sequence[str] | None = None,
) -> ReadingView:
    """What the forward that gave `logits` (1, M, *P) of `x` (1, C_in, *P) read of the bank; `cases` of its rows."""
    last, bank = network.last, network.bank
    assert last is not None and last.ids is not None and last.valid is not None
    ids = last.ids[0, last.valid[0]]
    guides = network.bank_features(x.shape[1]).select(ids[None], torch.ones_like(ids[None], dtype=torch.bool))
    attention = network.reader.masses(last.keys[:1], last.vectors[:1], guides)[0].tolist()
    images = bank.stored_images(ids)[:, 0].cpu().numpy()
    # half a unit off: a mask is a region's logit, or the class that is largest
    maps = [logits_to_labels(mask - 0.5, labels) for mask in bank.masks(ids)[0]]
    names = [None if cases is None else cases[row] for row in ids.tolist()]
    drawn = [Guide(*one) for one in zip(ids.tolist(), names, attention, images, maps)]
    read = F.interpolate(last.transported[:1], x.shape[2:], mode="bilinear" if x.ndim == 4 else "trilinear")[0]
    image, prediction = x[0, 0].float().cpu().numpy(), logits_to_labels(logits[0].float(), labels)
    return ReadingView(name, image, truth, prediction, logits_to_labels(read.float() - 0.5, labels), drawn)


def draw_reading(
    view: ReadingView,
    path: Path,
    title: str,
    dataset_json: dict,
    labels: LabelManager,
    spacing: Sequence[float],
    augmented: bool = False,
) -> None:
    """Write the picture: the patch with truth, read and prediction, then each guide with its mask and attention.

    Guides are drawn each at its own fullest slice. `spacing` is in mm per patch axis; the patch is `augmented` or not.
    """
    classes = class_names(dataset_json, labels)
    ignored = [value for value, name in classes.items() if name == "ignore"]
    size, ndim, mm = view.image.shape, view.image.ndim, np.asarray(spacing, dtype=float)
    organs = view.prediction if view.truth is None else np.where(np.isin(view.truth, ignored), 0, view.truth)
    # name, image, labels, labels whose fullest slice is drawn, opacity
    columns = [("read of the guides", view.image, view.read, organs, 0.35)]
    columns.append(("prediction", view.image, view.prediction, organs, 0.35))
    if view.truth is not None:
        columns.insert(0, ("truth", view.image, view.truth, organs, 0.35))
    for guide in view.guides:
        title_of_guide = f"{guide.title}: {100 * guide.attention:.0f} %"
        columns.append((title_of_guide, guide.image, guide.labels, guide.labels, 0.0))
    cuts = [None] if ndim == 2 else [0, 1, 2]
    with matplotlib.style.context("default"):  # nnU-Net's progress plot changes the fonts of the whole process
        figure = Figure(figsize=(2.35 * len(columns), 2.5 * len(cuts) + 1.0), layout="constrained")
        figure.suptitle(f"{title}: {view.name}, patch {' x '.join(map(str, size))}; % of the attention", wrap=True)
        for cells, axis in zip(figure.subplots(len(cuts), len(columns), squeeze=False), cuts):
            turned = view_across(axis, view.directions, augmented)
            for cell, (name, image, label, where, fill) in zip(cells, columns):
                index = None if axis is None else fullest_slice(where, axis)
                shown, mask = (turned.cut(part, index) for part in (image, label))
                text = name if index is None else f"{name}\n{turned.caption(index)}"
                draw_slice(cell, shown, mask, classes, fill=fill, spacing=turned.spacing(mm), title=text)
        add_legend(figure, classes, (int(value) for _, _, label, *_ in columns for value in np.unique(label)))
        figure.savefig(path, dpi=110)
