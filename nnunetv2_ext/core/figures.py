"""Drawing an image slice with labels over it, for every picture of this package.

Uses matplotlib's Figure objects and never pyplot: no window, no global state, safe inside a training process.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch

Array = npt.NDArray[Any]

# Okabe and Ito's palette, told apart by colour-blind readers too (https://jfly.uni-koeln.de/color/), without its black.
_PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
_IGNORE_COLOUR = "#FF2FD0"


def label_colours(classes: Mapping[int, str]) -> dict[int, tuple[float, float, float]]:
    """RGB per label value, by its rank among `classes` (label value -> name); 0 has none, `ignore` is pink.

    Each further round through the seven colours is darker; from the fourth round on they repeat.
    """
    colours = {}
    for rank, value in enumerate(sorted(v for v in classes if v != 0)):
        shade = (1.0, 0.65, 0.4)[rank // len(_PALETTE) % 3]
        red, green, blue = to_rgb(_PALETTE[rank % len(_PALETTE)])
        colours[value] = (shade * red, shade * green, shade * blue)
        if classes[value] == "ignore":
            colours[value] = to_rgb(_IGNORE_COLOUR)
    return colours


def take_slice(volume: Array, axis: int | None, index: int | None) -> Array:
    """Cut (X, Y, Z) at `index` of `axis`: 2-D (rows, columns), the later of the two remaining axes as rows.

    Drawn by `draw_slice` with the origin at the lower left, so array axes grow to the right and upwards. A 2-D image
    has no axis to cut (None) and is turned alike.
    """
    return volume.T if axis is None or index is None else np.take(volume, index, axis=axis).T


def fullest_slice(label: Array, axis: int) -> int:
    """Index along `axis` of the slice that shows most of all classes; the middle if there is no label > 0.

    Each class counts by the share of its voxels that lie in the slice, so that a large organ does not hide small ones.
    """
    others = tuple(a for a in range(label.ndim) if a != axis)
    shares = np.zeros(label.shape[axis])
    for value in np.unique(label[label > 0]):
        counts = (label == value).sum(axis=others)
        shares += counts / counts.sum()
    return int(np.argmax(shares)) if shares.any() else label.shape[axis] // 2


def draw_slice(
    axes: Axes,
    image: Array,
    label: Array | None = None,
    classes: Mapping[int, str] | None = None,
    *,
    fill: float = 0.35,
    window: tuple[float, float] | None = None,
    spacing: Sequence[float] = (1.0, 1.0),
    title: str = "",
) -> None:
    """Draw a grey slice and, over it, each class as a transparent area with an outline.

    Args:
        axes, title: Where to draw, and what to write above.
        image: (rows, columns).
        label: (rows, columns) of label values, or None for the image alone. Values not in `classes` are not drawn.
        classes: Label value -> name; it fixes the colours. By default the values that occur.
        fill: Opacity of the areas, 0 for outlines only.
        window: Intensities shown black and white; by default the slice's 1st and 99.5th percentiles.
        spacing: Voxel size along rows and columns in mm; a voxel is drawn in this proportion.

    Raises:
        ValueError: `image` is not 2-D or `label` has another shape.
    """
    if image.ndim != 2:
        raise ValueError(f"draw_slice needs a 2-D image, got shape {image.shape}: cut the volume with take_slice")
    if label is not None and label.shape != image.shape:
        raise ValueError(f"image {image.shape} and label {label.shape} differ in shape: cut both at the same slice")
    low, high = np.percentile(image, (1, 99.5)) if window is None else window
    aspect = float(spacing[0]) / float(spacing[1])
    axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", aspect=aspect)
    if label is not None:
        names = {int(v): str(v) for v in np.unique(label)} if classes is None else classes
        for value, colour in label_colours(names).items():
            mask = label == value
            if not mask.any():
                continue
            if fill > 0:
                area = np.zeros((*mask.shape, 4))
                area[mask] = (*colour, fill)
                axes.imshow(area, origin="lower", aspect=aspect, interpolation="nearest")
            if not mask.all():
                axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)


def add_legend(
    figure: Figure, classes: Mapping[int, str], present: Iterable[int] | None = None, further: Sequence[Patch] = ()
) -> Legend:
    """Write one legend below the whole figure: a patch and the name of each class but the background.

    Args:
        figure: Where to write.
        classes: Label value -> name; it fixes the colours.
        present: Values that are named; None: all of `classes`.
        further: Written behind the classes.
    """
    shown = set(classes if present is None else present)
    colours = {value: colour for value, colour in label_colours(classes).items() if value in shown}
    handles = [*(Patch(color=colour, label=classes[value]) for value, colour in colours.items()), *further]
    return figure.legend(handles=handles, loc="outside lower center", ncols=min(7, max(1, len(handles))), frameon=False)
