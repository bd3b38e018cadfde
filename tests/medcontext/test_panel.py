"""The picture of MedContext: written for every kind of dataset, with everything a reader needs to understand it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.medcontext import panel
from nnunetv2_ext.medcontext.diagnosis import Diagnosis
from nnunetv2_ext.medcontext.panel import draw_panel

KINDS = {
    "classes": ({"background": 0, "liver": 1, "spleen": 2}, None),
    "ignore": ({"background": 0, "liver": 1, "spleen": 2, "ignore": 3}, None),
    "regions": ({"background": 0, "whole": [1, 2], "core": [2]}, (1, 2)),
    "regions_ignore": ({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, (1, 2)),
}


def made_up(shape: tuple[int, ...], teacher: bool = True, ignore: int | None = None) -> Diagnosis:
    """A ball with a core around slice 3 of axis 0. Where asked, the last slice of axis 0 is unannotated."""
    centre = (3, *(n // 2 for n in shape[1:]))
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(np.indices(shape), centre, strict=True)))
    label = (distance < 4.1).astype(int) + (distance < 2)
    target = label.copy()
    if ignore is not None:
        target[-1] = ignore
    hidden = np.zeros(shape, dtype=bool)
    hidden[..., : shape[-1] // 2] = True
    image = distance + np.random.default_rng(0).normal(0, 0.2, shape)
    return Diagnosis("case_7", image, hidden, target, label, label, label if teacher else None, 0.1, 0.0)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure that was drawn, kept for inspection; fonts as nnU-Net's progress plot leaves them."""
    drawn: list[Figure] = []
    monkeypatch.setattr(panel, "Figure", lambda *args, **options: drawn.append(Figure(*args, **options)) or drawn[-1])
    with matplotlib.rc_context({"font.size": 30, "axes.titlesize": 30, "legend.fontsize": 27.5}):
        yield drawn


def draw(results: Diagnosis | list[Diagnosis], path: Path, kind: str = "classes", **options) -> None:
    table, order = KINDS[kind]
    draw_panel(
        results if isinstance(results, list) else [results],
        path,
        "nnUNetTrainerX, epoch 3",
        {"labels": table},
        LabelManager(table, order),
        **options,
    )


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def captions(figure: Figure) -> list[str]:
    return [text for axes in figure.axes if (text := axes.get_ylabel())]


@pytest.mark.parametrize("shape", [(12, 16, 14), (20, 24)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_picture_says_what_it_shows(figures, tmp_path, kind, shape):
    draw(made_up(shape, ignore=3 if "ignore" in kind else None), tmp_path / "p.png", kind)
    pixels = matplotlib.image.imread(tmp_path / "p.png")
    assert pixels.shape[0] > 250 and pixels.shape[1] > 1200 and pixels[..., :3].std() > 0.1
    (figure,) = figures
    size = " x ".join(map(str, shape))
    rows = len(shape) if len(shape) == 3 else 1
    first, *second = figure.get_suptitle().splitlines()
    assert first == "nnUNetTrainerX, epoch 3"
    assert second == [f"case_7, patch {size}, 50% hidden"]
    assert captions(figure)[0] == ("augmented patch\naxis 0, slice 3" if rows == 3 else "augmented patch")
    assert len(figure.axes) == 6 * rows
    assert titles(figure)[:6] == [
        "image",
        "what the student sees",
        "target",
        "student, whole patch",
        "student, masked patch",
        "teacher, whole patch",
    ]
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    organs = ["whole", "core"] if "regions" in kind else ["liver", "spleen"]
    assert entries == [*organs, *(["ignore"] if "ignore" in kind else []), "hidden from the student"]


def test_fonts_are_readable_whatever_the_process_has_set(figures, tmp_path):
    draw(made_up((12, 16, 14)), tmp_path / "p.png")
    (figure,) = figures
    sizes = {axes.title.get_fontsize() for axes in figure.axes}
    sizes |= {text.get_fontsize() for text in figure.legends[0].get_texts()} | {figure._suptitle.get_fontsize()}
    assert all(8 <= size <= 13 for size in sizes), sizes
    assert matplotlib.rcParams["font.size"] == 30, "the process' own fonts are left as they were"


def test_texts_do_not_overlap(figures, tmp_path):
    draw(made_up((12, 16, 14)), tmp_path / "p.png")
    (figure,) = figures
    figure.canvas.draw()
    texts = (
        [axes.title for axes in figure.axes]
        + [axes.yaxis.label for axes in figure.axes]
        + [figure._suptitle, *figure.legends[0].get_texts()]
    )
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i].get_text()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height


def test_an_unannotated_part_does_not_choose_the_slice(figures, tmp_path):
    draw(made_up((12, 16, 14), ignore=3), tmp_path / "p.png", "ignore")
    assert captions(figures[0])[0] == "augmented patch\naxis 0, slice 3"


def test_without_a_teacher_there_is_no_column_for_it(figures, tmp_path):
    draw(made_up((12, 16, 14), teacher=False), tmp_path / "p.png")
    assert len(figures[0].axes) == 15
    assert not any("teacher" in title for title in titles(figures[0]))


def test_slices_have_their_proportions_in_millimetres(figures, tmp_path):
    """Also the one with the mask over it: each further image drawn into an axes would reset its aspect."""
    draw(made_up((12, 16, 14)), tmp_path / "p.png", spacing=(5.0, 1.0, 2.0))
    aspects = [axes.get_aspect() for axes in figures[0].axes]
    # rows of the picture cut axis 0, 1, 2; the earlier of the other two axes runs down: (1, 2), (0, 2), (0, 1)
    assert aspects == [0.5] * 6 + [2.5] * 6 + [5.0] * 6


def test_the_mask_covers_exactly_the_hidden_voxels(figures, tmp_path):
    result = made_up((20, 24))
    draw(result, tmp_path / "p.png")
    cover = figures[0].axes[1].images[-1].get_array()
    assert np.array_equal(cover[..., 3] == 1, result.hidden)
    assert np.array_equal(figures[0].axes[0].images[0].get_array(), result.image)


def test_the_patch_is_drawn_as_its_case_stands_upright_without_letters(figures, tmp_path):
    """Of a scan whose rows run from back to front: turned, but nnU-Net may have mirrored it, so no letters."""
    backwards = np.array([[0.0, 0, 1], [0, -1, 0], [-1, 0, 0]])
    result = made_up((12, 16, 14))
    draw(result, tmp_path / "p.png", directions=[backwards])
    first = figures[0].axes[0]
    assert np.array_equal(first.images[0].get_array(), result.image[3, ::-1, ::-1])
    assert not first.texts


def test_the_legend_names_only_what_is_in_the_picture(figures, tmp_path):
    table = {"background": 0, **{f"organ_{i}": i for i in range(1, 105)}}
    draw_panel([made_up((12, 16, 14))], tmp_path / "p.png", "t", {"labels": table}, LabelManager(table, None))
    entries = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert entries == ["organ_1", "organ_2", "hidden from the student"]


@pytest.mark.parametrize("kind", ["classes", "ignore", "regions"])
def test_a_column_without_foreground_says_so(figures, tmp_path, kind):
    result = made_up((12, 16, 14), ignore=3 if kind == "ignore" else None)
    nothing = np.zeros_like(result.masked)
    draw(dataclasses.replace(result, masked=nothing, teacher=nothing), tmp_path / "p.png", kind)
    written = {axes.get_title() for axes in figures[0].axes if [t.get_text() for t in axes.texts] == ["no foreground"]}
    assert written == {"student, masked patch", "teacher, whole patch"}
    assert sum(len(axes.texts) for axes in figures[0].axes) == 6, "once in each of three cuts"


def test_a_patch_without_any_structure_is_drawn(figures, tmp_path):
    flat = np.zeros((6, 6, 6))
    none, empty = np.zeros((6, 6, 6), dtype=bool), np.zeros((6, 6, 6), dtype=int)
    draw(Diagnosis("empty", flat, none, empty, empty, empty, empty, 0.0, 0.0), tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()


def test_an_unlabelled_patch_is_drawn_below_without_a_target(figures, tmp_path):
    labelled = made_up((20, 24))
    unlabelled = dataclasses.replace(labelled, case="new_3", target=None, image=labelled.image[::-1].copy())
    draw([labelled, unlabelled], tmp_path / "p.png")
    (figure,) = figures
    assert figure.get_suptitle().splitlines()[2].startswith("new_3, unlabelled, patch ")
    assert len(figure.axes) == 12
    assert figure.axes[6].get_title() == "image, unlabelled"
    assert np.array_equal(figure.axes[6].images[0].get_array(), unlabelled.image)
    assert [text.get_text() for text in figure.axes[8].texts] == ["no label"]
    assert len(figure.axes[8].images) == 1, "nothing lies over the scan"
    assert sum(len(axes.texts) for axes in figure.axes) == 1
