"""The picture of pseudo-labels: cases that were kept and dropped, with what of them is in doubt. It shows patients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_ext.core.figures import HATCHED, add_legend, draw_slice, fullest_slice, hatch
from nnunetv2_ext.core.labelmaps import names_of_values
from nnunetv2_ext.core.orientation import directions_of, view_across
from nnunetv2_ext.data.case import read_image, spacing_of
from nnunetv2_ext.data.channels import are_colours, channel_names
from nnunetv2_ext.data.pool import Pool
from nnunetv2_ext.data.raw import RawDataset
from nnunetv2_ext.pseudo_label.labelling import Labelled
from nnunetv2_ext.pseudo_label.verdict import Ranked

_SHOWN = 4  # cases a row, from the best to the worst
_WIDTH = 3.2  # inches


def draw_panel(
    order: Sequence[Ranked],
    labelled: Mapping[str, Labelled],
    pool: Pool,
    source: RawDataset,
    title: str,
    path: Path,
) -> None:
    """Write a row of kept and, if there are any, a row of dropped cases; doubtful voxels are hatched.

    Args:
        order: all cases, best first.
        labelled: their labels.
        pool: their images.
        source: names of the structures, and nnU-Net's reader.
        title: above all.
        path: PNG to write.
    """
    groups = [[one for one in order if not one.why], [one for one in order if one.why]]
    rows = [_spread(group) for group in groups if group]
    columns = max(2, *map(len, rows))
    present: set[int] = set()
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(_WIDTH * columns + 0.3, (_WIDTH + 0.6) * len(rows) + 1.0), layout="constrained")
        figure.suptitle(title, fontsize=11)
        for cells, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
            for cell, one in zip(cells, row):
                words = f"{one.case}\n{one.why or 'kept'}, agreement {one.agreement:.2f}"
                present |= _draw(cell, one.case, labelled[one.case], pool, source, words)
            for cell in cells[len(row) :]:
                cell.set_axis_off()
        further = [Patch(**HATCHED, label="in doubt: ignored")]
        add_legend(figure, names_of_values(source.json), present, further)
        figure.savefig(path, dpi=100)


def _spread(group: Sequence[Ranked]) -> list[Ranked]:
    """Best, worst and those between."""
    places = np.unique(np.linspace(0, len(group) - 1, _SHOWN).round().astype(int))
    return [group[place] for place in places]


def _draw(cell: Axes, case: str, own: Labelled, pool: Pool, source: RawDataset, words: str) -> set[int]:
    """One slice; returns the label values of the case."""
    image, properties = read_image(case, [Path(file) for file in pool.cases[case].files], source.reader)
    label, doubtful = own.read()
    view = view_across(0, directions_of(properties))
    index = fullest_slice(np.where(label > 0, label, doubtful), 0)
    if are_colours(channel_names(source.json)):
        cut = np.stack([view.cut(channel, index) for channel in image[:3]], -1) / max(255.0, float(image.max()))
    else:
        cut = view.cut(image[0], index)
    spacing = view.spacing(spacing_of(properties))
    common: dict[str, Any] = {"spacing": spacing, "letters": view.letters}
    classes = names_of_values(source.json)
    draw_slice(cell, cut, view.cut(label, index), classes, title=f"{words}\n{view.caption(index)}", **common)
    hatch(cell, view.cut(doubtful, index), spacing)
    return {int(value) for value in np.unique(label)}
