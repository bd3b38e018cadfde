"""``overlay``: pictures of segmentations over their images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.figure import Figure
from skimage import io

from nnunetv2_ext.cli import main


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two colour images with a lesion, their segmentations and truth."""
    for name in ("images", "predictions", "truth"):
        (tmp_path / name).mkdir()
    image = np.zeros((40, 60, 3), np.uint8)
    image[:20] = (250, 10, 10)  # red on top
    image[20:] = (10, 10, 250)
    for n in range(2):
        io.imsave(tmp_path / "images" / f"p{n}_0000.png", image, check_contrast=False)
        label = np.zeros((40, 60), np.uint8)
        label[5:15, 10 : 20 + n] = 1
        io.imsave(tmp_path / "predictions" / f"p{n}.png", label, check_contrast=False)
        io.imsave(tmp_path / "truth" / f"p{n}.png", label, check_contrast=False)
    names = {"channel_names": dict.fromkeys("012", "rgb_to_0_1"), "labels": {"background": 0, "lesion": 1}}
    (tmp_path / "predictions" / "dataset.json").write_text(json.dumps(names | {"file_ending": ".png"}))
    return tmp_path


def run(folder: Path, *options: str) -> int:
    places = ["-i", str(folder / "images"), "-p", str(folder / "predictions"), "-o", str(folder / "out")]
    return main(["overlay", *places, *options])


def test_photographs_keep_their_colours_and_their_top(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[np.ndarray] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(np.asarray(figure.axes[0].images[0].get_array()))
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    assert run(photographs, "--truth", str(photographs / "truth")) == 0
    assert sorted(p.name for p in (photographs / "out").iterdir()) == ["p0.png", "p1.png"]
    assert drawn[0].shape == (40, 60, 3)
    assert np.allclose(drawn[0][0, 0], np.array([250, 10, 10]) / 255, atol=1e-3)
    assert np.allclose(drawn[0][-1, 0], np.array([10, 10, 250]) / 255, atol=1e-3)


def test_volumes_are_shown_across_three_axes_with_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images", "predictions"):
        (tmp_path / name).mkdir()
    label = np.zeros((8, 20, 24), np.uint8)
    label[3, 4:9, 5:11] = 1
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=label.shape).astype(np.float32))
    sitk.WriteImage(image, str(tmp_path / "images" / "a_0000.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(label), str(tmp_path / "predictions" / "a.nii.gz"))
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "predictions" / "dataset.json").write_text(json.dumps(content))
    titles: list[str] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        titles.extend(axes.get_title() for axes in figure.axes)
        titles.extend(text.get_text() for axes in figure.axes for text in axes.texts)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    assert run(tmp_path) == 0
    assert "image, axial, slice 3" in titles and titles.count("segmentation") == 3 and "R" in titles


def _break(folder: Path, how: str) -> list[str]:
    if how == "image":
        (folder / "images" / "p1_0000.png").unlink()
    elif how == "json":
        (folder / "predictions" / "dataset.json").unlink()
    elif how == "grid":
        io.imsave(folder / "predictions" / "p0.png", np.zeros((5, 5), np.uint8), check_contrast=False)
    elif how == "damaged":
        (folder / "images" / "p0_0000.png").write_bytes(b"no picture")
    elif how == "output":
        (folder / "out").mkdir()
        (folder / "out" / "mine").touch()
    elif how == "truth":
        (folder / "truth" / "p1.png").unlink()
        return ["--truth", str(folder / "truth")]
    elif how == "case":
        return ["--cases", "p7"]
    return []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("image", "case p1 has no image p1_0000.png"),
        ("json", "give -d DATASET, -djfile FILE"),
        ("grid", "case p0: the segmentation has"),
        ("damaged", "case p0: the image"),
        ("output", "is not empty"),
        ("truth", "case p1 has no truth"),
        ("case", "case p7 has no segmentation"),
    ],
)
def test_what_does_not_fit_is_one_line(photographs: Path, capsys: Any, how: str, words: str) -> None:
    options = _break(photographs, how)
    assert run(photographs, *options) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1]
