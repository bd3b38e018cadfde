"""Drawing an image slice with labels over it, for every picture of this package; core/orientation.py cuts the slice.

Uses matplotlib's Figure objects and never pyplot: no window, no global state, safe inside a training process.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

Array = npt.NDArray[Any]

# Okabe and Ito's palette, told apart by colour-blind readers too (https://jfly.uni-koeln.de/color/), without its black.
_PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
_IGNORE_COLOUR = "#FF2FD0"
# where `View.letters` are written: x, y, alignment
_EDGES = (
    (0.02, 0.5, "left", "center"),
    (0.98, 0.5, "right", "center"),
    (0.5, 0.98, "center", "top"),
    (0.5, 0.02, "center", "bottom"),
)
HATCHED: dict[str, Any] = {"facecolor": "0.35", "edgecolor": "white", "hatch": "////"}  # for a legend's patch
_STRIPES, _STRIPE_PIXELS, _STRIPE_OPACITY = 24, 480, 0.45  # of a hatched picture, along its longer side


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
    letters: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw a slice, its first row on top, and over it each class as a transparent area with an outline.

    Args:
        axes, title: Where to draw, and what to write above.
        image: (rows, columns), as core/orientation.py's `View.cut` returns it; or (rows, columns, 3) red, green and
            blue from 0 to 1.
        label: (rows, columns) of label values, or None for the image alone. Values not in `classes` are not drawn.
        classes: Label value -> name; it fixes the colours. By default the values that occur.
        fill: Opacity of the areas, 0 for outlines only.
        window: Intensities shown black and white; by default the slice's 1st and 99.5th percentiles.
        spacing: Voxel size along rows and columns in mm; a voxel is drawn in this proportion.
        letters: The patient's directions at the left, right, top and bottom edge (`View.letters`), or None.

    Raises:
        ValueError: `image` is no slice or `label` has another shape.
    """
    in_colours = image.ndim == 3 and image.shape[2] == 3
    if image.ndim != 2 and not in_colours:
        raise ValueError(f"draw_slice needs a 2-D image, got shape {image.shape}: cut the volume with View.cut")
    if label is not None and label.shape != image.shape[:2]:
        raise ValueError(f"image {image.shape} and label {label.shape} differ in shape: cut both at the same slice")
    aspect = float(spacing[0]) / float(spacing[1])
    if in_colours:
        axes.imshow(np.clip(image, 0, 1), origin="upper", aspect=aspect)
    else:
        low, high = np.percentile(image, (1, 99.5)) if window is None else window
        axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="upper", aspect=aspect)
    if label is not None:
        names = {int(v): str(v) for v in np.unique(label)} if classes is None else classes
        for value, colour in label_colours(names).items():
            mask = label == value
            if not mask.any():
                continue
            if fill > 0:
                shade(axes, mask, colour, fill)
            if not mask.all():
                axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.4)
    for letter, (x, y, across, up) in zip(letters or (), _EDGES):
        text = axes.text(x, y, letter, transform=axes.transAxes, ha=across, va=up, color="white", fontsize=8)
        text.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)


def shade(axes: Axes, mask: Array, colour: tuple[float, float, float] | str, opacity: float) -> None:
    """Lay one colour over the voxels of a drawn slice where `mask`, (rows, columns), is true."""
    area = np.zeros((*mask.shape, 4))
    area[mask] = (*to_rgb(colour), opacity)
    axes.imshow(area, origin="upper", aspect=axes.get_aspect(), interpolation="nearest")


def hatch(axes: Axes, mask: Array, spacing: Sequence[float] = (1.0, 1.0)) -> None:
    """Lay white diagonal stripes over the voxels of a drawn slice where `mask` is true, and nowhere else.

    Matplotlib's own hatches fill contours, which cut the corners of voxels. `mask` and `spacing` as in `draw_slice`.
    """
    size = [n * float(mm) for n, mm in zip(mask.shape, spacing)]
    fine = [math.ceil(_STRIPE_PIXELS * mm / max(size)) for mm in map(float, spacing)]  # pixels of a voxel
    y, x = ((np.arange(n * k) + 0.5) * mm / k for n, k, mm in zip(mask.shape, fine, spacing))
    striped = (y[:, None] + x) % (max(size) / _STRIPES) < max(size) / _STRIPES / 3
    area = np.zeros((*striped.shape, 4))
    area[striped & np.kron(mask, np.ones(fine, dtype=bool))] = (1, 1, 1, _STRIPE_OPACITY)
    rows, columns = mask.shape
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(area, origin="upper", extent=extent, aspect=axes.get_aspect(), interpolation="nearest")


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
    # a character is about 0.09 inches wide, the coloured patch and the gap beside it 0.75
    widest = 0.75 + 0.09 * max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, min(7, len(handles), int(figure.get_figwidth() / widest)))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    return figure.legend(handles=handles, fontsize=10, **place)
