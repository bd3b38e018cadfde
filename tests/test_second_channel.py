"""The made-up channel of examples/second_channel.py: what it shows, and whose cases lack it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.phantom import write_phantom_dataset

FILE = Path(__file__).resolve().parents[1] / "examples" / "second_channel.py"


@pytest.fixture(scope="module")
def second():
    spec = importlib.util.spec_from_file_location("second_channel", FILE)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "expected"), [("pet", (2 / 3, 1)), ("pet-b", (1, 2 / 3))])
def test_a_structure_has_its_uptake_or_the_backgrounds_in_half_of_the_cases(second, kind, expected) -> None:
    label = np.zeros((8, 80, 80), np.int64)
    label[:, 4:34, 4:34], label[:, 44:74, 44:74], label[:, :2, :2] = 1, 2, 3  # 3: ignored
    drawn = [second.uptake(label, 2, (2.0, 1.0, 1.0), kind, np.random.default_rng(n)) for n in range(40)]
    assert min(image.min() for image in drawn) >= 0.01
    for value, level in enumerate(expected, 1):
        middle = slice(16, 22) if value == 1 else slice(56, 62)  # out of the blur's reach
        inside = np.array([image[:, middle, middle].mean() for image in drawn])
        hot = inside > (level + 1 / 3) / 2
        assert 10 <= hot.sum() <= 30 and inside[hot].mean() == pytest.approx(level, rel=0.15)
        assert inside[~hot].mean() == pytest.approx(1 / 3, rel=0.15)
    rough = [image[:, 60:, :20].std() for image in drawn]  # background, far from both
    assert np.mean(rough) == pytest.approx(second.NOISE[kind], rel=0.4)


def test_a_dataset_with_a_channel_more(second, tmp_path, monkeypatch, capsys) -> None:
    source = write_phantom_dataset(tmp_path, 4, num_train=5, num_test=0, shape=(16, 18, 14), spacing=(1.0, 1.0, 2.0))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    assert second.main(["4", "-o", "204", "--missing", "0.4"]) == 0
    folder = tmp_path / "Dataset204_Phantom_pet"
    content = json.loads((folder / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "T1", "1": "pet"} and content["numTraining"] == 5
    files = sorted((folder / "imagesTr").glob("*_0001.nii.gz"))
    present = [bool(sitk.GetArrayFromImage(sitk.ReadImage(str(file))).any()) for file in files]
    assert len(files) == 5 and sum(present) == 3
    for file in sorted((source / "imagesTr").iterdir()):
        assert (folder / "imagesTr" / file.name).read_bytes() == file.read_bytes()
        first, new = (sitk.ReadImage(str(folder / "imagesTr" / f"{file.name[:-11]}000{n}.nii.gz")) for n in (0, 1))
        assert first.GetSpacing() == new.GetSpacing() and first.GetSize() == new.GetSize()
    assert second.main(["4", "-o", "205", "--kind", "copy"]) == 0
    assert second.main(["4", "-o", "206", "--kind", "noise"]) == 0
    arrays = [
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "imagesTr" / files[0].name)))
        for name in ("Dataset205_Phantom_copy", "Dataset206_Phantom_noise")
    ]
    assert np.array_equal(arrays[0], sitk.GetArrayFromImage(sitk.ReadImage(str(source / "imagesTr" / files[0].name.replace("1.nii", "0.nii")))))  # fmt: skip  # noqa: E501
    assert abs(arrays[1].mean()) < 0.1 and arrays[1].std() == pytest.approx(1, rel=0.1)
    capsys.readouterr()
    assert second.main(["4", "-o", "204"]) == 2 and "is taken by" in capsys.readouterr().err
    assert second.main(["4", "-o", "207", "--missing", "1"]) == 2 and "--missing" in capsys.readouterr().err
