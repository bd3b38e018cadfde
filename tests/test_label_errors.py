"""Errors of labels: connected, repeatable, of the stated size; and nothing else changes."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

FILE = Path(__file__).resolve().parents[1] / "examples" / "label_errors.py"


@pytest.fixture(scope="module")
def errors() -> Any:
    spec = importlib.util.spec_from_file_location("label_errors", FILE)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def label() -> np.ndarray:
    found = np.zeros((16, 24, 24), np.uint8)
    found[3:13, 6:18, 4:12] = 1
    found[3:13, 6:18, 12:20] = 2
    return found


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float(((one > 0) & (one == other)).sum()) / float((one > 0).sum() + (other > 0).sum())


@pytest.mark.parametrize("kind", ["boundary", "missing", "shift", "swap"])
def test_a_higher_level_is_worse_and_a_case_repeats(errors, label, kind) -> None:
    names = [f"case_{n}.nii.gz" for n in range(4)]
    dice = [
        np.mean([agreement(label, errors.corrupted(label, kind, level, n)) for n in names]) for level in errors.LEVELS
    ]
    assert 1 > dice[0] > dice[1] > dice[2] >= 0
    first, again, seed, other = (
        errors.corrupted(label, kind, "mid", name, seed) for name, seed in (("a", 0), ("a", 0), ("a", 1), ("b", 0))
    )
    assert np.array_equal(first, again) and first.dtype == label.dtype
    assert not (np.array_equal(first, seed) and np.array_equal(first, other))
    pieces, number = ndimage.label(first != label)
    assert np.bincount(pieces.ravel())[1:].max() > 20 or number < 5  # errors hang together


def test_what_each_kind_does(errors, label) -> None:
    generator = np.random.default_rng(0)
    mid = errors.LEVELS["mid"]
    gone = errors.missing(label, mid, generator)
    [value] = np.unique(label[gone != label])
    assert (gone[gone != label] == 0).all() and (gone == value).sum() == 480  # half of 960
    moved = errors.shift(label, mid, generator)
    touched = np.flatnonzero((moved != label).any((1, 2)))
    assert len(touched) == 5 and np.ptp(touched) == 4
    assert (moved > 0).sum() == (label > 0).sum()  # it stayed inside the image
    swapped = errors.swap(label, mid, generator)
    assert set(np.unique(swapped[swapped != label])) == {1, 2} and (swapped != label).sum() == 960
    bent = errors.boundary(label, mid, generator)
    far = ndimage.distance_transform_edt(ndimage.binary_erosion(label == 1)) > 6
    assert (bent[far] == 1).all() and (bent != label).any()


def test_an_empty_label_and_ignored_voxels_stay(errors, label) -> None:
    assert not errors.corrupted(np.zeros_like(label), "missing", "high", "a").any()
    with_ignore = label.copy()
    with_ignore[:, :10] = 3
    for kind in errors.ERRORS:
        found = errors.corrupted(with_ignore, kind, "high", "a", ignore=3)
        assert np.array_equal(found == 3, with_ignore == 3)
    assert set(np.unique(errors.corrupted((label > 0).astype(np.uint8), "swap", "mid", "a"))) == {0, 1}


def write(folder: Path, label: np.ndarray, number: int = 8) -> None:
    folder.mkdir()
    for n in range(number):
        image = sitk.GetImageFromArray(np.roll(label, n % 3, 0))
        image.SetSpacing((1.0, 1.5, 3.0))
        sitk.WriteImage(image, str(folder / f"case_{n}.nii.gz"))


def test_a_folder(errors, label, tmp_path, capsys) -> None:
    write(tmp_path / "labels", label)
    arguments = [str(tmp_path / "labels"), str(tmp_path / "out"), "--share", "0.5", "--level", "high"]
    assert errors.main(arguments) == 0
    assert "4 label maps with errors" in capsys.readouterr().out
    with (tmp_path / "out" / "label_errors.csv").open() as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream)}
    assert sorted(row["kind"] for row in rows.values()) == sorted(errors.ERRORS)
    for file in sorted((tmp_path / "labels").iterdir()):
        after = tmp_path / "out" / file.name
        if file.name not in rows:
            assert after.read_bytes() == file.read_bytes()
            continue
        before, image = sitk.ReadImage(str(file)), sitk.ReadImage(str(after))
        assert image.GetSpacing() == before.GetSpacing()
        changed = (sitk.GetArrayFromImage(image) != sitk.GetArrayFromImage(before)).sum()
        assert changed == int(rows[file.name]["changed_voxels"]) > 0
    assert errors.main(arguments) == 2 and "is not empty" in capsys.readouterr().err
    assert errors.main([str(tmp_path / "none"), str(tmp_path / "b")]) == 2
    assert errors.main([*arguments[:1], str(tmp_path / "c"), "--share", "0"]) == 2
