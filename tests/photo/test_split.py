"""One binary dataset a label, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import io

from nnunetv2_ext.cli import main
from nnunetv2_ext.photo.split import combine, merge_labels
from tests.photo.test_enhance import raw  # noqa: F401  # a fixture


def test_overlaps_by_hand() -> None:
    claims = np.array([[[1, 1, 0], [0, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 1, 0], [0, 0, 1]]], bool)
    assert combine(claims, [3, 5]).tolist() == [[3, 5, 5], [0, 5, 0], [0, 0, 5]]
    assert combine(claims[::-1], [5, 3]).tolist() == [[3, 3, 5], [0, 3, 0], [0, 0, 5]]
    scores = np.array([[[0.9, 0.9, 0], [0, 0.6, 0], [0, 0, 0]], [[0.4, 0.7, 0.8], [0, 0.6, 0], [0, 0, 0.5]]])
    assert combine(claims, [3, 5], scores).tolist() == [[3, 3, 5], [0, 5, 0], [0, 0, 5]]  # the later of equals


def predict(folder: Path, dataset: Path, probability: float | None = None) -> Path:
    """What nnUNetv2_predict leaves, if it were perfect."""
    folder.mkdir()
    (folder / "dataset.json").write_bytes((dataset / "dataset.json").read_bytes())
    for file in (dataset / "labelsTr").iterdir():
        label = io.imread(file)
        io.imsave(folder / file.name, label, check_contrast=False)
        if probability is not None:
            foreground = np.where(label == 1, probability, 0.1)[None].astype(np.float32)
            np.savez(folder / f"{file.stem}.npz", probabilities=np.stack([1 - foreground, foreground]))
    return folder


@pytest.fixture
def parts(raw: Path, tmp_path: Path) -> list[Path]:  # noqa: F811
    assert main(["split-labels", "-d", "8", "-o", "81", "82"]) == 0
    names = ["Dataset081_eye_MA", "Dataset082_eye_HE"]
    return [predict(tmp_path / f"p{i}", raw.with_name(name), 0.9) for i, name in enumerate(names)]


@pytest.mark.parametrize("by", ["probability", "order"])
def test_split_and_merged_is_the_truth(raw: Path, parts: list[Path], tmp_path: Path, by: str) -> None:  # noqa: F811
    content = json.loads((raw.with_name("Dataset082_eye_HE") / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "HE": 1} and content["name"] == "Dataset082_eye_HE"
    folders = [str(p) for p in parts]
    assert main(["merge-labels", "-i", *folders, "-labels", "1", "2", "-o", str(tmp_path / "out"), "--by", by]) == 0
    for file in (raw / "labelsTr").iterdir():
        assert np.array_equal(io.imread(tmp_path / "out" / file.name), io.imread(file))


def test_the_later_in_the_order_wins_and_losses_are_counted(parts: list[Path], tmp_path: Path) -> None:
    for file in parts[1].glob("*.png"):  # HE claims MA's voxels too
        io.imsave(file, np.maximum(io.imread(file), io.imread(parts[0] / file.name)), check_contrast=False)
    he = merge_labels(parts, [1, 2], tmp_path / "he", "order", ["MA", "HE"])
    ma = merge_labels(parts, [1, 2], tmp_path / "ma", "order", ["2", "1"])
    assert (he.overlap, he.lost) == (3 * 100, {1: 3 * 100, 2: 0}) and ma.lost == {1: 0, 2: 3 * 100}
    assert set(np.unique(io.imread(tmp_path / "he" / "eye0.png"))) == {0, 2}
    assert set(np.unique(io.imread(tmp_path / "ma" / "eye0.png"))) == {0, 1, 2}


def test_below_the_threshold_nobody_claims(parts: list[Path], tmp_path: Path) -> None:
    merged = merge_labels(parts, [1, 2], tmp_path / "out", thresholds=[0.95, 0.5])
    assert set(np.unique(io.imread(tmp_path / "out" / "eye0.png"))) == {0, 2} and merged.overlap == 0


def test_an_ignore_label_stays_ignored(raw: Path) -> None:  # noqa: F811
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"]["ignore"] = 3
    (raw / "dataset.json").write_text(json.dumps(content))
    label = io.imread(raw / "labelsTr" / "eye0.png")
    label[:5] = 3
    io.imsave(raw / "labelsTr" / "eye0.png", label, check_contrast=False)
    assert main(["split-labels", "-d", "8", "-o", "81", "82"]) == 0
    new = io.imread(raw.with_name("Dataset081_eye_MA") / "labelsTr" / "eye0.png")
    assert (new[:5] == 2).all() and (new[50:60, 60:70] == 1).all() and set(np.unique(new[5:])) == {0, 1}


def _break(parts: list[Path], how: str, tmp_path: Path) -> dict[str, Any]:
    if how == "case":
        (parts[1] / "eye2.png").unlink()
    elif how == "probabilities":
        (parts[0] / "eye1.npz").unlink()
    elif how == "shape":
        io.imsave(parts[0] / "eye1.png", np.zeros((5, 5), np.uint8), check_contrast=False)
        return {"by": "order"}
    elif how == "order":
        return {"by": "order", "order": ["MA", "EX"]}
    elif how == "taken":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.png").touch()
    elif how == "json":
        (parts[1] / "dataset.json").unlink()
    elif how == "threshold":
        return {"thresholds": [0.5, 2]}
    return {}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("case", "no prediction of case eye2"),
        ("probabilities", r"no probabilities of case eye1 .*--by order"),
        ("shape", "case eye1: the predictions have different shapes"),
        ("order", r"by name \(MA, HE\)"),
        ("taken", "is not empty"),
        ("json", "has no dataset.json"),
        ("threshold", "from 0 to 1"),
    ],
)
def test_what_does_not_fit_is_named(parts: list[Path], tmp_path: Path, how: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge_labels(parts, [1, 2], tmp_path / "out", **_break(parts, how, tmp_path))


@pytest.mark.parametrize(
    ("ids", "words"), [(["81"], "2 labels"), (["81", "81"], "2 labels"), (["81", "8"], "is taken")]
)
def test_split_needs_a_free_id_for_each(raw: Path, capsys: Any, ids: list[str], words: str) -> None:  # noqa: F811
    assert main(["split-labels", "-d", "8", "-o", *ids]) == 2
    assert words in capsys.readouterr().err
    assert [p.name for p in raw.parent.iterdir()] == [raw.name]
