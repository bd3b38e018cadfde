import ast
import subprocess
import sys
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import nnunetv2_ext
from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice, hatch, label_colours, shade
from nnunetv2_ext.core.orientation import view_across

CLASSES = {0: "background", 1: "liver", 2: "spleen", 3: "ignore"}


@pytest.fixture
def axes():
    # nnU-Net's progress plot, drawn by other tests, changes matplotlib's defaults for the whole process
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(2, 2), dpi=50)
        yield figure.add_axes((0, 0, 1, 1))


def _pixels(axes):
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_colours_are_distinct_stable_and_one_of_its_own_for_ignore():
    colours = label_colours(CLASSES)
    assert 0 not in colours and len(set(colours.values())) == 3
    assert colours[3] != label_colours({3: "lesion"})[3]
    assert label_colours({1: "liver"})[1] == colours[1]
    assert len(set(label_colours({k: str(k) for k in range(22)}).values())) == 21


def test_fullest_slice_and_its_fallback():
    label = np.zeros((4, 5, 6), dtype=np.uint8)
    assert fullest_slice(label, 2) == 3
    label[:, 1, 4] = 2
    assert [fullest_slice(label, axis) for axis in range(3)] == [0, 1, 4]


def test_fullest_slice_prefers_all_organs_to_much_of_one():
    label = np.zeros((1, 8, 3), dtype=np.uint8)
    label[0, :8, 0] = 1
    label[0, :6, 1] = 1  # less of organ 1, all of organ 2
    label[0, 6, 1] = 2
    assert fullest_slice(label, 2) == 1


def test_image_alone_is_grey(axes):
    draw_slice(axes, np.random.default_rng(0).random((8, 8)))
    pixels = _pixels(axes)
    assert (pixels.max(-1) == pixels.min(-1)).all()
    assert len(np.unique(pixels)) > 10


def test_the_first_row_of_an_image_alone_is_on_top(axes):
    image = np.zeros((8, 8))
    image[:4] = 1
    draw_slice(axes, image)
    pixels = _pixels(axes)
    assert (pixels[25, 50] == 255).all() and (pixels[75, 50] == 0).all()


def test_fill_colours_the_labelled_half_only_and_the_first_rows_are_on_top(axes):
    label = np.zeros((8, 8), dtype=int)
    label[:4] = 2
    draw_slice(axes, np.zeros((8, 8)), label, CLASSES, fill=1.0)
    pixels = _pixels(axes)
    expected = np.round(255 * np.array(label_colours(CLASSES)[2]))
    assert np.abs(pixels[25, 50] - expected).max() <= 1  # pixel rows count from the top
    assert (pixels[75, 50] == 0).all()


def test_outline_follows_the_border(axes):
    label = np.zeros((20, 20), dtype=int)
    label[5:15, 5:15] = 1
    draw_slice(axes, np.zeros((20, 20)), label, CLASSES, fill=0)
    pixels = _pixels(axes).sum(-1)
    assert pixels[50, 50] == 0 and pixels[50, 5] == 0  # centre and outside stay black
    assert pixels[50, 20:30].max() > 100  # left border of the square


def test_values_without_a_class_are_not_drawn(axes):
    draw_slice(axes, np.zeros((8, 8)), np.full((8, 8), 9), CLASSES)
    assert _pixels(axes).sum() == 0


def test_constant_and_anisotropic_slices_draw(axes):
    draw_slice(axes, np.ones((4, 8)), np.ones((4, 8), dtype=int), spacing=(4.0, 1.0), title="thick")
    assert axes.get_aspect() == 4.0 and axes.get_title() == "thick"


# a scan whose array (z, y, x) grows towards head, front and right, as RAS files do, and the same on its side
RAS = np.array([[0.0, 0, 1], [0, -1, 0], [-1, 0, 0]])


def test_a_bright_front_is_bright_at_the_top_of_the_page_and_the_patients_right_on_the_left(axes):
    volume, label = np.zeros((4, 8, 8)), np.zeros((4, 8, 8), dtype=int)
    volume[:, 4:] = 1  # y grows to the front
    label[:, :, 6:] = 1  # x grows to the patient's right
    view = view_across(0, RAS)
    draw_slice(axes, view.cut(volume, 1), view.cut(label, 1), CLASSES, fill=1.0, letters=view.letters)
    pixels = _pixels(axes)
    assert (pixels[25, 75] == 255).all() and (pixels[75, 75] == 0).all()
    liver = np.round(255 * np.array(label_colours(CLASSES)[1]))
    assert np.abs(pixels[40, 12] - liver).max() <= 1 and np.abs(pixels[90, 12] - liver).max() <= 1
    where = {text.get_text(): text.get_position() for text in axes.texts}
    assert where == {"R": (0.02, 0.5), "L": (0.98, 0.5), "A": (0.5, 0.98), "P": (0.5, 0.02)}


def test_letters_are_inside_the_picture_and_readable_on_white(axes):
    draw_slice(axes, np.ones((40, 40)), window=(0, 1), letters=("R", "L", "A", "P"))
    dark = np.argwhere(_pixels(axes).sum(-1) < 200)  # their outlines
    assert dark.min() > 0 and dark.max() < 99
    for part in (dark[:, 0] < 20, dark[:, 0] > 80, dark[:, 1] < 20, dark[:, 1] > 80):
        assert part.any()


def test_stripes_lie_on_every_masked_voxel_and_on_no_other():
    mask = np.zeros((24, 12), dtype=bool)
    mask[5:9, 2:10] = mask[20, :] = True  # also a plane of one voxel, and up to the border
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(2.4, 2.4), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        draw_slice(axes, np.zeros((24, 12)), spacing=(1.0, 2.0))
        hatch(axes, mask, (1.0, 2.0))
        bright = _pixels(axes).sum(-1).reshape(24, 10, 12, 20) > 100
    assert axes.get_aspect() == 0.5
    assert np.array_equal(bright.any((1, 3)), mask)
    assert 0.2 < bright[mask[:, None, :, None].repeat(10, 1).repeat(20, 3)].mean() < 0.5, "stripes, not an area"


def test_a_shade_covers_its_voxels_in_its_colour(axes):
    mask = np.zeros((4, 4), dtype=bool)
    mask[0, 3] = True
    draw_slice(axes, np.zeros((4, 4)))
    shade(axes, mask, "#FF0000", 1.0)
    red = (_pixels(axes) == (255, 0, 0)).all(-1)
    assert red[:25, 75:].mean() > 0.95 and red.mean() < 0.07


def test_legend_names_the_classes_but_not_the_background():
    figure = Figure(layout="constrained")
    legend = add_legend(figure, CLASSES)
    assert [text.get_text() for text in legend.get_texts()] == ["liver", "spleen", "ignore"]


@pytest.mark.parametrize(
    "name", ["organ", "organ number seven with a long name", "a name as long as " + 4 * "nothing else "]
)
def test_a_legend_of_15_classes_lies_inside_the_figure(name):
    figure = Figure(figsize=(7, 6), layout="constrained")
    figure.subplots(1, 2)
    legend = add_legend(figure, {0: "background", **{k: f"{name} {k}" for k in range(1, 16)}})
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert len(boxes) == 15
    assert all(b.x0 > 0 and b.x1 < figure.bbox.width and b.y0 > 0 and b.y1 < figure.bbox.height for b in boxes)


@pytest.mark.parametrize(
    ("image", "label", "message"), [((4, 4, 4), None, "View.cut"), ((4, 4), (4, 5), "differ in shape")]
)
def test_bad_shapes_are_refused(axes, image, label, message):
    with pytest.raises(ValueError, match=message):
        draw_slice(axes, np.zeros(image), None if label is None else np.zeros(label, dtype=int))


def test_pyplot_is_not_imported():
    code = "import sys, nnunetv2_ext.core.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_title_of_a_figure_leaves_it():
    """matplotlib cuts a title that is wider than its figure, unless it may wrap."""
    calls = [
        (file.name, ast.unparse(node))
        for file in Path(nnunetv2_ext.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "suptitle"
    ]
    assert len(calls) > 10
    assert [call for call in calls if "wrap=True" not in call[1]] == []
