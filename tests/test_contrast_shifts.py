"""Synthetic contrast shifts, by hand on small arrays and on files."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

FILE = Path(__file__).resolve().parents[1] / "examples" / "contrast_shifts.py"


@pytest.fixture(scope="module")
def shifts():
    spec = importlib.util.spec_from_file_location("contrast_shifts", FILE)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Drawn:
    """A generator whose draws are known."""

    def __init__(self, **values) -> None:
        self.values = values

    def __getattr__(self, name: str):
        return lambda *_: self.values[name]


def test_inversion_by_hand(shifts) -> None:
    image = np.array([[1.0, 2.0], [4.0, 9.0]])
    result, _ = shifts.inversion(image, None)
    assert result.tolist() == [[9, 8], [6, 1]]


def test_gamma_by_hand(shifts) -> None:
    image = np.array([10.0, 15.0, 20.0])
    assert shifts.gamma(image, Drawn(uniform=2.0, choice=1))[0].tolist() == [10, 12.5, 20]
    darker, told = shifts.gamma(image, Drawn(uniform=2.0, choice=-1))
    assert darker == pytest.approx([10, 10 + 10 * 0.5**0.5, 20]) and told == "gamma=0.5000"


def test_bias_field_by_hand(shifts) -> None:
    """Normal draws of 1 for x, x^2, x^3: at -1, 0, 1 the sum is -1, 0, 3, scaled to -1, -0.5, 1."""
    image = np.array([7.0, 1.0, 4.0])
    result, _ = shifts.bias_field(image, Drawn(normal=1.0))
    assert result == pytest.approx([1 + 6 / 3, 1, 1 + 3 * 3])
    flat = np.ones((4, 5, 6))
    flat[0, 0, 0] = 0
    ratio = shifts.bias_field(flat, np.random.default_rng(0))[0].ravel()[1:]
    assert ratio.min() >= 1 / 3 - 1e-9 and ratio.max() <= 3 + 1e-9 and ratio.max() / ratio.min() > 4
    assert np.abs(np.diff(np.log(ratio.reshape(-1)[4:9]))).max() < 1  # smooth along an axis


def test_tissue_order_by_hand(shifts) -> None:
    image = np.array([0.0, 10.0, 20.0, 30.0, 40.0])
    rising = [o for o in shifts.itertools.permutations(range(5)) if len({*np.sign(np.diff(o))}) > 1]
    at = rising.index((0, 3, 2, 1, 4))
    result, told = shifts.tissue_order(image, Drawn(integers=at))
    assert result.tolist() == [0, 30, 20, 10, 40] and told == "order=03214"
    assert (0, 1, 2, 3, 4) not in rising and (4, 3, 2, 1, 0) not in rising and len(rising) == 118
    many = np.arange(0.0, 41.0)  # the same knots: a curve without steps, 0 -> 0, 5 -> 15, 10 -> 30
    result, _ = shifts.tissue_order(many, Drawn(integers=at))
    assert result[[0, 5, 10, 15]].tolist() == [0, 15, 30, 25] and np.abs(np.diff(result)).max() == 3


def test_a_shift_depends_on_seed_name_and_shift_only(shifts) -> None:
    image = np.random.default_rng(0).integers(0, 255, (5, 6, 7)).astype(np.uint8)
    one, _ = shifts.shifted(image, "gamma", "a.nii.gz", 3)
    assert one.dtype == np.uint8 and one.shape == image.shape
    assert (one == shifts.shifted(image, "gamma", "a.nii.gz", 3)[0]).all()
    for other in (("gamma", "b.nii.gz", 3), ("gamma", "a.nii.gz", 4), ("tissue_order", "a.nii.gz", 3)):
        assert (one != shifts.shifted(image, *other)[0]).any()
    for shift in shifts.SHIFTS:  # a constant image has no contrast to change
        assert (shifts.shifted(np.full((3, 4), 7.0), shift, "c.nii.gz")[0] == 7).all()
    bright = np.full((20, 20), 255, np.uint8)
    bright[0, 0] = 0
    clipped = shifts.shifted(bright, "bias_field", "d.png")[0].ravel()[1:]
    assert clipped.max() == 255 and clipped.min() >= 85  # 255 / 3 or more: nothing wraps around
    with pytest.raises(ValueError, match="holds values that are not finite"):
        shifts.shifted(np.array([np.nan, 1.0]), "gamma", "e.nii.gz")


def write(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array, **options)
    image.SetSpacing((0.5, 2.0, 3.0)[: image.GetDimension()])
    image.SetOrigin((1.0, -2.0, 3.0)[: image.GetDimension()])
    sitk.WriteImage(image, str(path))


def test_a_folder(shifts, tmp_path: Path, capsys) -> None:
    generator = np.random.default_rng(0)
    for name in ("a_0000.nii.gz", "b_0000.nii.gz"):
        write(tmp_path / "in" / name, generator.integers(0, 1000, (4, 5, 6)).astype(np.int16))
    (tmp_path / "in" / "notes.txt").touch()
    assert shifts.main([str(tmp_path / "in"), str(tmp_path / "out"), "--seed", "5"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / shift) for shift in shifts.SHIFTS]
    for shift in shifts.SHIFTS:
        assert sorted(p.name for p in (tmp_path / "out" / shift).iterdir()) == ["a_0000.nii.gz", "b_0000.nii.gz"]
        before, after = (sitk.ReadImage(str(tmp_path / f / "a_0000.nii.gz")) for f in ("in", f"out/{shift}"))
        assert after.GetSpacing() == before.GetSpacing() and after.GetOrigin() == before.GetOrigin()
        assert after.GetPixelID() == before.GetPixelID()
        expected, _ = shifts.shifted(sitk.GetArrayFromImage(before), shift, "a_0000.nii.gz", 5)
        assert (sitk.GetArrayFromImage(after) == expected).all() and (expected != sitk.GetArrayFromImage(before)).any()
    rows = list(csv.DictReader((tmp_path / "out" / "shifts.csv").open()))
    assert [r["shift"] for r in rows] == [*shifts.SHIFTS] * 2 and rows[1]["drawn"].startswith("gamma=")


def test_mistakes_are_one_line_and_overwrite_nothing(shifts, tmp_path: Path, capsys) -> None:
    def told(*arguments: str) -> str:
        assert shifts.main([str(tmp_path / arguments[0]), *map(str, arguments[1:])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    out = tmp_path / "out"
    assert "nowhere, does not exist" in told("nowhere", out)
    (tmp_path / "empty").mkdir()
    assert "has no image" in told("empty", out)
    write(tmp_path / "rgb" / "a_0000.png", np.zeros((4, 4, 3), np.uint8), isVector=True)
    assert "is a colour image" in told("rgb", out)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a_0000.nii.gz").write_text("no image")
    assert "a_0000.nii.gz" in told("bad", out)
    write(tmp_path / "in" / "a_0000.nii.gz", np.eye(4, dtype=np.float32)[None])
    (out / "gamma").mkdir(parents=True)
    assert "is there already" in told("in", out) and not list((out / "gamma").iterdir())
    assert shifts.main([str(tmp_path / "in"), str(out), "--shifts", "inversion"]) == 0
