"""CLAHE and the blank surround, and the commands around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import color, io

from nnunetv2_ext.cli import main
from nnunetv2_ext.photo.enhancement import Enhancement, field_of_view


def photograph(seed: int, scale: int = 1) -> np.ndarray:
    """A bright disc with vessels and dots on a nearly black surround."""
    rng, size = np.random.default_rng(seed), (120 * scale, 160 * scale)
    y, x = np.mgrid[: size[0], : size[1]] / scale
    radius = np.hypot(y - 60, x - 80)
    base = 0.55 + 0.25 * np.cos(radius / 40)
    base += 0.08 * np.sin(x / 3 + seed) * np.cos(y / 5) + rng.normal(0, 0.03, size)
    image = np.stack([base, 0.6 * base, 0.35 * base], -1)
    image[radius > 55] = rng.uniform(0, 0.02, (int((radius > 55).sum()), 3))  # JPEG never is exactly black
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lightness_follows_opencvs_and_keeps_its_range(seed: int) -> None:
    cv2 = pytest.importorskip("cv2", reason="the oracle")
    image = photograph(seed, scale=4)
    enhanced = Enhancement(blank_outside=False).apply(image)
    inside = field_of_view(image)
    before, after = color.rgb2lab(image), color.rgb2lab(enhanced)
    lightness = np.round(before[..., 0] * 2.55).astype(np.uint8)
    theirs = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(lightness)
    assert np.corrcoef(after[..., 0][inside], theirs[inside])[0, 1] >= 0.98
    assert after[..., 0].max() <= before[..., 0].max() + 1 and after[..., 0].min() >= before[..., 0].min() - 1
    assert not np.array_equal(enhanced, image)
    unclipped = (enhanced[inside] < 255).all(1) & (enhanced[inside] > 0).all(1)
    assert np.abs(after[inside] - before[inside])[unclipped][:, 1:].max() < 2  # a and b, but for the rounding


def test_outside_stays_or_is_blank_and_inside_does_not_depend_on_it() -> None:
    image = photograph(3)
    inside = field_of_view(image)
    assert 0.4 < inside.mean() < 0.6
    kept, blank = (Enhancement(blank_outside=b).apply(image) for b in (False, True))
    assert np.array_equal(kept[~inside], image[~inside])
    assert (blank[~inside] == 0).all() and np.array_equal(kept[inside], blank[inside])
    only = Enhancement(clahe="off").apply(image)
    assert np.array_equal(only[inside], image[inside]) and (only[~inside] == 0).all()


def test_the_field_of_view_is_the_largest_part_with_its_holes() -> None:
    image = np.zeros((20, 20), np.uint8)
    image[2:12, 2:12] = 100
    image[5:7, 5:7] = 0  # a hole
    image[15:17, 15:17] = 255  # a label in the corner
    expected = np.zeros((20, 20), bool)
    expected[2:12, 2:12] = True
    assert np.array_equal(field_of_view(image), expected)
    image[:] = 20
    with pytest.raises(ValueError, match="no pixel is brighter"):
        field_of_view(image)


def test_a_constant_image_stays_and_sixteen_bits_stay_sixteen() -> None:
    constant = np.full((40, 40, 3), 90, np.uint8)
    assert np.abs(Enhancement().apply(constant).astype(int) - 90).max() <= 1  # the rounding of CIELAB
    grey = np.random.default_rng(0).integers(9000, 40000, (64, 64)).astype(np.uint16)
    enhanced = Enhancement(clahe="grey").apply(grey)
    assert enhanced.dtype == np.uint16 and enhanced.min() >= 9000 - 1 and enhanced.max() <= 40000
    assert not np.array_equal(enhanced, grey)


@pytest.mark.parametrize(
    ("image", "clahe"),
    [
        (np.zeros((4, 4, 4), np.uint8), "L"),
        (np.zeros((4, 4, 2), np.uint8), "off"),
        (np.zeros((4, 4), np.uint8), "L"),
        (np.zeros((4, 4, 3), np.uint16), "L"),
        (np.zeros((4, 4, 3), np.uint8), "grey"),
    ],
)
def test_other_kinds_of_images_are_refused(image: np.ndarray, clahe: Any) -> None:
    with pytest.raises(ValueError, match="convert the image"):
        Enhancement(clahe=clahe).apply(image)


# ---- commands


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dataset008 of three photographs with two lesions that overlap nowhere."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    folder = tmp_path / "raw" / "Dataset008_eye"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        io.imsave(folder / "imagesTr" / f"eye{i}_0000.png", photograph(i), check_contrast=False)
        label = np.zeros((120, 160), np.uint8)
        label[50:60, 60:70], label[70:75, 90:99] = 1, 2
        io.imsave(folder / "labelsTr" / f"eye{i}.png", label, check_contrast=False)
    io.imsave(folder / "imagesTs" / "new_0000.png", photograph(9), check_contrast=False)
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "MA": 1, "HE": 2},
        "numTraining": 3,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_new_images_get_what_the_dataset_got(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in raw.rglob("*") if p.is_file()}
    assert main(["enhance", "-d", "8", "-o", "108", "--clip", "3", "-np", "1"]) == 0
    new = raw.with_name("Dataset108_eye")
    assert {p.name: p.read_bytes() for p in raw.rglob("*") if p.is_file()} == before
    assert (new / "labelsTr" / "eye0.png").read_bytes() == before["eye0.png"]
    record = json.loads((new / "enhance.json").read_text())
    assert record["parameters"] == {"clahe": "L", "clip": 3.0, "grid": 8, "blank_outside": True}
    assert len(record["sha256"]) == 4
    assert not np.array_equal(io.imread(new / "imagesTr" / "eye1_0000.png"), photograph(1))
    notices = json.loads((new / "dataset.json").read_text())["nnunetv2_ext"]["notices"]
    assert "--like 108" in notices[0]
    out = tmp_path / "out"
    assert main(["enhance", "-i", str(raw / "imagesTs"), "-o", str(out), "--like", "108", "-np", "1"]) == 0
    assert (out / "new_0000.png").read_bytes() == (new / "imagesTs" / "new_0000.png").read_bytes()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["-i", "IN", "-o", "OUT", "--like", "8"], "was not made by"),
        (["-i", "IN", "-o", "OUT"], "needs --like"),
        (["-d", "8", "-o", "8"], "is taken"),
        (["-d", "8", "-o", "name"], "a number"),
        (["-d", "8", "-o", "9", "--clip", "0"], "--clip above 0"),
        (["-d", "8", "-o", "9", "--like", "8"], "--like goes with -i"),
    ],
)
def test_wrong_uses_are_one_line(raw: Path, tmp_path: Path, capsys: Any, command: list[str], words: str) -> None:
    places = {"IN": str(raw / "imagesTs"), "OUT": str(tmp_path / "out")}
    assert main(["enhance", *(places.get(c, c) for c in command)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["rgba", "damaged"])
def test_a_bad_image_is_named_and_nothing_is_left(raw: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    file = raw / "imagesTr" / "eye1_0000.png"
    if kind == "rgba":
        io.imsave(file, np.zeros((120, 160, 4), np.uint8), check_contrast=False)
    else:
        file.write_bytes(b"not a picture")
    assert main(["enhance", "-d", "8", "-o", "108", "-np", "1"]) == 2
    assert "case eye1" in capsys.readouterr().err
    assert [p.name for p in raw.parent.iterdir()] == [raw.name]


def test_the_crop_of_nnunet_is_the_field_of_view(raw: Path) -> None:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    image = photograph(4)
    inside = field_of_view(image)
    blank = Enhancement().apply(image).transpose(2, 0, 1)[:, None].astype(np.float32)
    _, _, box = crop_to_nonzero(blank)
    rows, columns = np.where(inside)
    assert box[1:] == [[rows.min(), rows.max() + 1], [columns.min(), columns.max() + 1]]
