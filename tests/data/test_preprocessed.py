"""Opening what nnU-Net preprocessed: what there is instead, damaged cases, and what caches go by."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_ext.data.preprocessed import Preprocessed, open_preprocessed
from tests.conftest import TinyDataset


@pytest.fixture
def base(tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The preprocessed dataset's folder, copied."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    shutil.copytree(tiny.preprocessed / tiny.name, tmp_path / tiny.name)
    return tmp_path / tiny.name


@pytest.fixture
def data(base: Path) -> Preprocessed:
    return open_preprocessed(1, "3d_fullres", "tiny")


def test_cases_arrays_and_properties(data: Preprocessed, base: Path) -> None:
    assert data.base == base and data.configuration_name == "3d_fullres" and data.plans.plans_name == "tiny"
    assert data.cases == [f"phantom_{n:03d}" for n in range(6)]
    image, label, properties = data.read_case("phantom_001")
    assert image.shape[0] == label.shape[0] == 1 and image.shape[1:] == label.shape[1:]
    assert set(np.unique(label[:]).tolist()) <= {-1, 0, 1, 2} and len(properties["spacing"]) == 3
    assert data.key()["plans"] == "tiny" and "batch_size" not in data.key()


def test_the_state_changes_with_the_case_only(data: Preprocessed) -> None:
    one, two = data.file_state("phantom_000"), data.file_state("phantom_001")
    assert json.loads(json.dumps(one)) == one and one != two
    (data.folder / "phantom_000.npy").touch()  # as a training unpacks
    assert data.file_state("phantom_000") == one
    os.utime(data.folder / "phantom_000_seg.b2nd", ns=(1, 1))
    assert data.file_state("phantom_000") != one and data.file_state("phantom_001") == two


def test_a_case_that_is_missing_or_damaged_is_named(data: Preprocessed) -> None:
    again = "preprocess the dataset again .nnUNetv2_preprocess -d 001 -plans_name tiny -c 3d_fullres"
    with pytest.raises(ValueError, match=f"case nobody is not in .*: {again}"):
        data.file_state("nobody")
    for name in ("phantom_000.b2nd", "phantom_001_seg.b2nd", "phantom_002.pkl"):
        file = data.folder / name
        file.write_bytes(file.read_bytes()[:40])
        case = name[:11]
        with pytest.raises(ValueError, match=f"case {case} cannot be read from .*: {again}") as error:
            data.read_case(case)
        assert "\n" not in str(error.value)
    (data.folder / "notes.txt").touch()
    with pytest.raises(ValueError, match="does not hold preprocessed cases only"):
        _ = open_preprocessed(1, "3d_fullres", "tiny").cases


def test_what_there_is_instead(base: Path) -> None:
    with pytest.raises(ValueError, match=r"no dataset 9 in .*run nnUNetv2_plan_and_preprocess -d 9"):
        open_preprocessed(9, "3d_fullres")
    with pytest.raises(ValueError, match=r"no plans other in .* \(-p takes nnUNetPlans, tiny\): run"):
        open_preprocessed(1, "3d_fullres", "other")
    with pytest.raises(ValueError, match="the plans tiny have no configuration '3d_lowres': -c takes 2d, 3d_fullres"):
        open_preprocessed(1, "3d_lowres", "tiny")
    content = json.loads((base / "dataset.json").read_text())
    (base / "dataset.json").write_text(json.dumps(content | {"labels": {"background": 0, "organ": 2}}))
    with pytest.raises(ValueError, match="are 0, 2, but nnU-Net needs consecutive"):
        open_preprocessed(1, "2d", "tiny")
    (base / "dataset.json").write_text(json.dumps(content))
    shutil.rmtree(base / "nnUNetPlans_3d_fullres")
    with pytest.raises(ValueError, match=r"nnUNetPlans_3d_fullres is missing: run nnUNetv2_plan_and_preprocess -d 001"):
        open_preprocessed(1, "3d_fullres", "tiny")


@pytest.mark.parametrize("key", ["patch_size", "spacing", "data_identifier", "batch_size", "transpose_forward"])
def test_damaged_plans_are_named(base: Path, key: str) -> None:
    plans = json.loads((base / "tiny.json").read_text())
    block = plans if key == "transpose_forward" else plans["configurations"]["3d_fullres"]
    block.pop(key)
    (base / "tiny.json").write_text(json.dumps(plans))
    with pytest.raises(ValueError, match=rf"tiny\.json is damaged \(KeyError: '{key}'\): run nnUNetv2_plan") as error:
        open_preprocessed(1, "3d_fullres", "tiny")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", ["x", [0, 1], [0, 1, 1]])
def test_an_order_of_axes_that_is_none(base: Path, order: object) -> None:
    plans = json.loads((base / "tiny.json").read_text())
    (base / "tiny.json").write_text(json.dumps(plans | {"transpose_backward": order}))
    with pytest.raises(ValueError, match=r"tiny\.json is damaged \(transpose_backward is"):
        open_preprocessed(1, "3d_fullres", "tiny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not an object: copy that of nnUNet_raw, or run nnUNetv2_plan_and_preprocess -d 1"),
        ('{"labels": {"background": 0, "a": 1}}', "has no file_ending"),
        ("{}", "has no file_ending and no labels"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_an_unusable_dataset_json(base: Path, text: str, message: str) -> None:
    (base / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=f"dataset.json {message}"):
        open_preprocessed(1, "3d_fullres", "tiny")
