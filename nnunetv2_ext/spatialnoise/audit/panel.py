"""The picture of one audited case: label, prediction, and where the label is probably wrong. It shows a patient."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from nnunetv2_ext.core.figures import add_legend, draw_slice
from nnunetv2_ext.core.orientation import directions_of, view_across
from nnunetv2_ext.data.case import spacing_of

Array = npt.NDArray[Any]


def draw_case(
    case: str,
    image: Array,
    label: Array,
    segmentation: Array,
    error: Array,
    properties: Mapping[str, Any],
    classes: Mapping[int, str],
    subtitle: str,
    path: Path,
) -> None:
    """Draw the slice with the highest sum of error probabilities.

    Args:
        case: its name.
        image: ``(channels, X, Y, Z)`` in the reader's array order; three channels are red, green and blue.
        label, segmentation, error: ``(X, Y, Z)``.
        properties: of the image.
        classes: label value to name.
        subtitle: below the name.
        path: PNG to write.
    """
    view = view_across(0, directions_of(properties))
    index = int(error.sum((1, 2)).argmax())
    spacing = spacing_of(properties)
    channels = [view.cut(channel, index) for channel in image]
    shown = channels[0] if len(channels) < 3 else np.stack(channels, -1) / max(255.0, float(image.max()))
    labelled, predicted, wrong = (view.cut(volume, index) for volume in (label, segmentation, error))
    where = f" ({view.caption(index)})" if len(label) > 1 else ""
    high = view.height(label.shape, spacing, 3.6)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(3 * 3.6 + 0.9, high + 1.2), layout="constrained")
        figure.suptitle(f"{case}: {subtitle}", fontsize=11, wrap=True)
        cells = figure.subplots(1, 3)
        common: dict[str, Any] = {"spacing": view.spacing(spacing), "letters": view.letters}
        draw_slice(cells[0], shown, labelled, classes, title=f"label{where}", **common)
        draw_slice(cells[1], shown, predicted, classes, title="prediction of a model that has not seen it", **common)
        grey = view.cut(image.mean(0), index)  # colours would be taken for probabilities
        draw_slice(cells[2], grey, title="probability that the label is wrong", **common)
        aspect = cells[2].get_aspect()
        doubt = np.ma.masked_less(wrong, 0.05)
        heat = cells[2].imshow(doubt, cmap="plasma", vmin=0, vmax=1, origin="upper", aspect=aspect)
        figure.colorbar(heat, ax=cells[2], shrink=0.8)
        add_legend(figure, classes, {int(v) for part in (labelled, predicted) for v in np.unique(part)})
        figure.savefig(path, dpi=90)
