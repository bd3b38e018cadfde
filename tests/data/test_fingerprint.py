"""CT intensities are measured on annotated foreground, not on what is ignored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.data.fingerprint import (
    MARK,
    PROPERTIES,
    fix_fingerprint,
    measure_intensities,
    needs_fix,
    stale_intensities,
    uses_ct,
)
from nnunetv2_ext.data.raw import open_raw

ORGAN, AIR = 110.0, -1000.0


@pytest.fixture
def ct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``ct(channel=, ignore=)``: three sparse scans, planned as far as this module reads; returns the plans' folder."""

    def make(channel: str = "CT", ignore: bool = True, planned: bool = True) -> Path:
        for name in ("raw", "preprocessed", "results"):
            monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        folder, base = tmp_path / "raw" / "Dataset001_CT", tmp_path / "preprocessed" / "Dataset001_CT"
        for sub in (folder / "imagesTr", folder / "labelsTr", base):
            sub.mkdir(parents=True)
        random = np.random.RandomState(0)
        for case in range(3):
            organ = np.zeros((16, 16, 16), dtype=bool)
            organ[4:12, 4:12, 4:12] = True
            image = np.where(organ, random.normal(ORGAN, 5, organ.shape), AIR)
            label = np.full(organ.shape, 2, dtype=np.uint8)
            if case < 2:
                label[8] = organ[8]
            sitk.WriteImage(
                sitk.GetImageFromArray(image.astype(np.float32)), str(folder / f"imagesTr/c{case}_0000.nii.gz")
            )
            sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / f"labelsTr/c{case}.nii.gz"))
        labels = {"background": 0, "organ": 1, "ignore" if ignore else "other": 2}
        content = {"channel_names": {"0": channel}, "labels": labels, "numTraining": 3, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(content))
        if planned:
            _plan(base, channel)
        return base

    return make


def _plan(base: Path, channel: str) -> None:
    wrong = {"0": dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), -500.0)}
    scheme = "CTNormalization" if channel == "CT" else "ZScoreNormalization"
    configuration = {"data_identifier": "plans_3d", "normalization_schemes": [scheme]}
    for name in ("nnUNetPlans", "tiny"):
        plans: dict[str, Any] = {"plans_name": name, "configurations": {"3d_fullres": configuration}, PROPERTIES: wrong}
        (base / f"{name}.json").write_text(json.dumps(plans))
    (base / "dataset_fingerprint.json").write_text(json.dumps({"spacings": [], PROPERTIES: wrong}))
    (base / "splits_final.json").write_text("[]")


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_statistics_are_those_of_the_annotated_organ(ct) -> None:
    """Against numpy on the voxels themselves; nnU-Net's own measure on the same files is dominated by air."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    ct()
    raw = open_raw(1)
    properties, mark = measure_intensities(raw)
    voxels = []
    for case in ("c0", "c1"):
        image = raw.reader.read_images(raw.files[case]["images"])[0][0]
        voxels.append(image[raw.read_label(case)[0] == 1])
    truth = np.concatenate(voxels)
    assert mark["cases"] == 2
    assert properties["0"]["mean"] == pytest.approx(truth.mean(), abs=0.1)
    assert properties["0"]["std"] == pytest.approx(truth.std(), rel=0.02)
    assert properties["0"]["min"] == truth.min() and properties["0"]["max"] == truth.max()
    assert properties["0"]["percentile_00_5"] == pytest.approx(np.percentile(truth, 0.5), abs=0.5)
    files = raw.files["c0"]
    stock = DatasetFingerprintExtractor.analyze_case(files["images"], files["label"], type(raw.reader))[3][0]
    assert stock["percentile_00_5"] == AIR  # the trap


def test_fingerprint_and_all_plans_are_corrected_and_marked(ct) -> None:
    base = ct()
    assert needs_fix(read(base / "nnUNetPlans.json"), base)
    said: list[str] = []
    assert fix_fingerprint(1, said.append)
    for name in ("nnUNetPlans", "tiny", "dataset_fingerprint"):
        content = read(base / f"{name}.json")
        assert content[PROPERTIES]["0"]["mean"] == pytest.approx(ORGAN, abs=2) and MARK in content
    assert not needs_fix(read(base / "nnUNetPlans.json"), base)
    assert read(base / "splits_final.json") == [] and read(base / "nnUNetPlans.json")["plans_name"] == "nnUNetPlans"
    assert any("mean -500.0 -> 1" in line for line in said)


def test_plans_made_again_from_the_corrected_fingerprint_are_fine(ct) -> None:
    base = ct()
    fix_fingerprint(1, lambda text: None)
    plans = read(base / "nnUNetPlans.json")
    del plans[MARK]
    assert not needs_fix(plans, base)
    assert needs_fix(plans | {PROPERTIES: {}}, base)


def test_preprocessed_data_is_said_to_be_stale(ct) -> None:
    base = ct()
    images = [_preprocessed(base / "plans_3d", case) for case in ("c0", "c1")]
    said: list[str] = []
    fix_fingerprint(1, said.append)
    assert "nnUNetv2_preprocess -d Dataset001_CT again" in said[-1]
    for image in images[:1]:  # the other one was forgotten
        os.utime(image)
    plans, again = read(base / "nnUNetPlans.json"), "e.g. c1.b2nd) were preprocessed before"
    (line,) = stale_intensities(plans, base, base / "plans_3d")
    assert "WARNING: 1 of 2 images in plans_3d" in line and again in line
    unmarked = {key: value for key, value in plans.items() if key != MARK}  # planned again
    assert stale_intensities(unmarked, base, base / "plans_3d") == [line]
    os.utime(images[1])
    assert stale_intensities(plans, base, base / "plans_3d") == []
    said.clear()
    fix_fingerprint(1, said.append)  # a second correction changes nothing, so nothing has become older
    assert stale_intensities(read(base / "nnUNetPlans.json"), base, base / "plans_3d") == []
    assert not any("WARNING" in line for line in said)
    assert read(base / "nnUNetPlans.json")[MARK] == plans[MARK]


def _preprocessed(folder: Path, case: str) -> Path:
    """Files as nnU-Net names them; returns the image's. The label's is not touched by a correction."""
    folder.mkdir(exist_ok=True)
    for name in (f"{case}.b2nd", f"{case}_seg.b2nd", f"{case}.pkl"):
        (folder / name).touch()
        os.utime(folder / name, (1e9, 1e9))
    return folder / f"{case}.b2nd"


def test_mr_is_left_alone(ct) -> None:
    base = ct("T1")
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    said: list[str] = []
    assert not fix_fingerprint(1, said.append)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before and "no CT channel" in said[0]
    assert not uses_ct(read(base / "nnUNetPlans.json")) and not needs_fix(read(base / "nnUNetPlans.json"), base)


def test_what_is_refused(ct, tmp_path: Path) -> None:
    base = ct(planned=False)
    with pytest.raises(ValueError, match=r"has not been planned: run nnUNetv2_plan_and_preprocess .* --no_pp"):
        fix_fingerprint(1)
    _plan(base, "CT")
    labels = tmp_path / "raw" / "Dataset001_CT" / "labelsTr"
    for file in labels.iterdir():
        sitk.WriteImage(sitk.ReadImage(str(file)) * 0 + 2, str(file))
    with pytest.raises(ValueError, match="no case of Dataset001_CT has annotated foreground"):
        fix_fingerprint(1)
    dataset_json = tmp_path / "raw" / "Dataset001_CT" / "dataset.json"
    dataset_json.write_text(dataset_json.read_text().replace("ignore", "other"))
    with pytest.raises(ValueError, match="no ignore label"):
        fix_fingerprint(1)


def test_the_command(ct, capsys) -> None:
    from nnunetv2_ext.cli.dispatch import main

    base = ct()
    assert main(["fix-fingerprint", "-d", "1"]) == 0
    assert "tiny.json  channel 0" in capsys.readouterr().out and MARK in read(base / "tiny.json")
    assert main(["fix-fingerprint", "-d", "7"]) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dataset_fingerprint", "{}"),
        ("dataset_fingerprint", "[]"),
        ("dataset_fingerprint", "{"),
        ("second", '{"plans_name": "second"}'),
        ("second", '{"plans_name": "second", "configurations": {}}'),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_written(ct, name: str, text: str) -> None:
    base = ct()
    (base / f"{name}.json").write_text(text)
    before = {file: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(ValueError, match=rf"{name}\.json (has no|cannot be read|does not hold)") as error:
        fix_fingerprint(1)
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in base.iterdir()} == before
