"""The picture of RADA: what nobody annotated is hatched, and nothing else."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.rada import panel
from nnunetv2_ext.rada.panel import AGREE, DROPPED, SampleView, draw_panel
from nnunetv2_ext.rada.views import INSIDE

LABELS = {"background": 0, "organ": 1, "ignore": 2}
# of a scan whose rows run from back to front and whose columns run from left to right: both are drawn backwards
BACKWARDS = np.array([[0.0, 0, 1], [0, -1, 0], [-1, 0, 0]])


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    drawn: list[Figure] = []
    monkeypatch.setattr(panel, "Figure", lambda *args, **options: drawn.append(Figure(*args, **options)) or drawn[-1])
    return drawn


def turned_plane() -> SampleView:
    """A plane of axis 0 that augmentation turned: in each row of voxels another slice, the last column is padding."""
    shape = (6, 8, 10)
    label, bits = np.full(shape, 2), np.full(shape, INSIDE)
    for row in range(8):
        label[1 + row // 3, row] = row % 2
        bits[1 + row // 3, row] |= 1
    bits[..., -1] = 0
    states = np.where(label == 2, DROPPED, 0)
    states[2, :2] = AGREE
    image = np.random.default_rng(0).random(shape)
    return SampleView("case_3", image, label, bits, np.zeros((3, *shape), dtype=int), states, BACKWARDS)


def test_what_nobody_annotated_is_hatched_and_nothing_else(figures, tmp_path):
    view, mm = turned_plane(), (5.0, 1.0, 2.0)
    manager = LabelManager(LABELS, None)
    draw_panel([view], tmp_path / "p.png", "Dataset101_X, fold 0", {"labels": LABELS}, manager, mm)
    (figure,) = figures
    ((axis, index),) = panel.cuts(view, 2)
    annotated = (view.label != 2) & (view.bits & INSIDE != 0)
    expected = ~annotated[index, ::-1, ::-1]
    stripes = figure.axes[0].images[-1]
    rows, columns = expected.shape
    assert (axis, stripes.get_extent()) == (0, [-0.5, columns - 0.5, rows - 0.5, -0.5])
    fine = stripes.get_array()[..., 3] > 0
    per_voxel = fine.reshape(rows, fine.shape[0] // rows, columns, fine.shape[1] // columns)
    assert np.array_equal(per_voxel.any((1, 3)), expected) and not per_voxel.all((1, 3)).any()
    kept = [image.get_array()[..., 3] > 0 for image in figure.axes[-1].images[1:]]
    assert np.array_equal(kept[list(panel._STATES).index(AGREE)], (view.states == AGREE)[index, ::-1, ::-1])
    assert figure.axes[0].get_ylabel() == f"augmented patch\naxis 0, slice {index}"
    assert figure.get_suptitle() == "Dataset101_X, fold 0" and not any(axes.texts for axes in figure.axes)
    assert {axes.get_aspect() for axes in figure.axes} == {0.5}
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries[:2] == ["organ", "not annotated"] and "kept, teachers agree" in entries


def test_states_have_colours_that_no_class_has():
    from nnunetv2_ext.core.figures import label_colours

    classes = {tuple(round(c, 2) for c in colour) for colour in label_colours({k: str(k) for k in range(22)}).values()}
    from matplotlib.colors import to_rgb

    assert not classes & {tuple(round(c, 2) for c in to_rgb(colour)) for _, colour in panel._STATES.values()}
