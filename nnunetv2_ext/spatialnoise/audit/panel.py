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
        image, label, segmentation, error: ``(X, Y, Z)`` in the reader's array order.
        properties: of the image.
        classes: label value to name.
        subtitle: below the name.
        path: PNG to write.
    """
    view = view_across(0, directions_of(properties))
    index = int(error.sum((1, 2)).argmax())
    spacing = spacing_of(properties)
    cut = [view.cut(volume, index) for volume in (image, label, segmentation, error)]
    high = view.height(image.shape, spacing, 3.6)
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(3 * 3.6 + 0.9, high + 1.2), layout="constrained")
        figure.suptitle(f"{case}: {subtitle}", fontsize=11, wrap=True)
        cells = figure.subplots(1, 3)
        common: dict[str, Any] = {"spacing": view.spacing(spacing), "letters": view.letters}
        draw_slice(cells[0], cut[0], cut[1], classes, title=f"label ({view.caption(index)})", **common)
        draw_slice(cells[1], cut[0], cut[2], classes, title="prediction of a model that has not seen it", **common)
        draw_slice(cells[2], cut[0], title="probability that the label is wrong", **common)
        shown = np.ma.masked_less(cut[3], 0.05)
        aspect = cells[2].get_aspect()
        heat = cells[2].imshow(shown, cmap="plasma", vmin=0, vmax=1, origin="upper", aspect=aspect)
        figure.colorbar(heat, ax=cells[2], shrink=0.8)
        add_legend(figure, classes, {int(v) for part in cut[1:3] for v in np.unique(part)})
        figure.savefig(path, dpi=90)
