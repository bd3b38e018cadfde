"""The commands: plans for a dataset that fits, a line of why not for one that does not, zeros for what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.cli import main
from nnunetv2_ext.pemma import prepare as module
from nnunetv2_ext.pemma.base import read_base
from tests.conftest import TinyDataset, run_command
from tests.pemma.conftest import PLANS, plans_of


@pytest.fixture
def there(extended: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDataset:
    """A raw dataset of one's own, to be changed."""
    raw = tmp_path / "raw" / extended.name
    shutil.copytree(extended.raw / extended.name, raw)
    (tmp_path / "preprocessed").mkdir()
    dataset = replace(extended, root=tmp_path)
    for key, value in dataset.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)
    return dataset


def prepare(dataset: TinyDataset, *options: str, step: str = "prepare") -> int:
    return main(["add-channel", step, "-d", "7", "-base", str(dataset.model), *options])


def image(dataset: TinyDataset, case: int, channel: int) -> Path:
    return dataset.raw / dataset.name / "imagesTr" / f"phantom_{case:03d}_{channel:04d}.nii.gz"


def change_json(dataset: TinyDataset, change: Callable[[dict[str, Any]], Any]) -> None:
    file = dataset.raw / dataset.name / "dataset.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_plans_are_the_bases_with_a_channel_behind(extended: TinyDataset) -> None:
    new, base = plans_of(extended), json.loads((extended.model / "plans.json").read_text())  # type: ignore[operator]
    ours, theirs = new["configurations"]["2d"], base["configurations"]["2d"]
    assert list(new["configurations"]) == ["2d"] and new["plans_name"] == PLANS
    assert new["dataset_name"] == extended.name and ours["data_identifier"] == f"{PLANS}_2d"
    for key in ("architecture", "spacing", "patch_size", "batch_size", "resampling_fn_data"):
        assert ours[key] == theirs[key]
    assert ours["normalization_schemes"] == [*theirs["normalization_schemes"], "ZScoreNormalization"]
    assert ours["use_mask_for_norm"] == theirs["use_mask_for_norm"] * 2
    intensities = new["foreground_intensity_properties_per_channel"]
    assert set(intensities) == {"0", "1"}
    assert intensities["0"] == base["foreground_intensity_properties_per_channel"]["0"]


def test_a_new_dataset_is_prepared_and_one_of_before_is_not_overwritten(there: TinyDataset, capsys) -> None:
    file = there.preprocessed / there.name / f"{PLANS}.json"
    assert prepare(there, step="inspect") == 0
    said = capsys.readouterr().out
    assert "T2: 4 of 6 cases have it, 2 lack it (all zeros)" in said and not file.parent.exists()
    assert prepare(there) == 0 == prepare(there)
    said = capsys.readouterr().out
    assert "next: nnUNetv2_extract_fingerprint -d 007\n" in said
    assert f"next: nnUNetv2_preprocess -d 007 -plans_name {PLANS} -c 2d" in said and "pemma.base=" in said
    assert json.loads((file.parent / "dataset.json").read_text())["channel_names"] == {"0": "T1", "1": "T2"}
    before = file.read_text()
    assert prepare(there, "--normalization", "NoNormalization") == 2
    assert "exists with another plan" in capsys.readouterr().err and file.read_text() == before
    assert prepare(there, "--normalization", "NoNormalization", "-p", "other") == 0


def test_cases_that_the_base_was_trained_on_and_that_would_validate_are_warned_of(
    there: TinyDataset, capsys, monkeypatch
) -> None:
    cases = [f"phantom_{number:03d}" for number in range(6)]
    folder = there.preprocessed / there.name
    folder.mkdir(parents=True)
    splits = folder / "splits_final.json"
    splits.write_text(json.dumps([{"train": cases[2:], "val": cases[:2]}]))
    assert prepare(there) == 0 and "WARNING" not in capsys.readouterr().out
    plans = json.loads((there.model / "plans.json").read_text()) | {"dataset_name": "Dataset009_Other"}  # type: ignore[operator]
    other = folder.with_name("Dataset009_Other")
    other.mkdir()
    (other / "splits_final.json").write_text(json.dumps([{"train": cases[:4], "val": cases[4:]}]))
    monkeypatch.setattr(module, "read_base", lambda *given: replace(read_base(*given), plans=plans))
    assert prepare(there) == 0
    assert "fold 0 was trained on 2 cases that validate here, e.g. phantom_000: copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda j: j.update(channel_names={"0": "T2", "1": "T1"}), "not the first of the dataset's T2, T1"),
        (lambda j: j.update(channel_names={"0": "CT", "1": "T2"}), "names differ"),
        (lambda j: j["labels"].pop("organ_2"), "the label organ_2 is 2 in the base's dataset.json and missing"),
        (lambda j: j["labels"].update(organ_3=3), "organ_3 is missing in the base's dataset.json and 3"),
        (lambda j: j.update(overwrite_image_reader_writer="NibabelIO"), "is read by NibabelIO and the base"),
    ],
)  # fmt: skip
def test_a_dataset_that_does_not_fit_is_refused(there: TinyDataset, change: Any, said: str, capsys) -> None:
    change_json(there, change)
    assert prepare(there) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (there.preprocessed / there.name).exists()


def test_a_dataset_without_a_new_channel_is_refused(there: TinyDataset, capsys) -> None:
    for file in (there.raw / there.name / "imagesTr").glob("*_0001*"):
        file.unlink()
    change_json(there, lambda j: j.update(channel_names={"0": "T1"}))
    assert prepare(there) == 2 and "has the base's channels T1 and no further one" in capsys.readouterr().err


def test_a_normalisation_that_moves_zero_is_refused(there: TinyDataset, capsys) -> None:
    assert prepare(there, "--normalization", "CTNormalization") == 2
    error = capsys.readouterr().err
    assert "CTNormalization does not leave a missing channel at zero (it subtracts the mean" in error
    assert prepare(there, "--normalization", "Nonsense") == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-base", "/nowhere"], "-base=/nowhere does not exist: give a model folder"),
        (
            ["-base", "{raw}"],
            "-base={raw}: fold 0 starts from fold 0 there, and {raw}/fold_0/checkpoint_final.pth does",
        ),
        (["-base", "{raw}/dataset.json"], "{raw}/dataset.json"),
        (["-f", "3"], "give one of its files, fold_0/checkpoint_final.pth, fold_1/checkpoint_final.pth"),
        (["-f", "first"], "-f 'first' is neither a number nor all"),
        (["-d", "99"], "99"),
    ],
)
def test_arguments_that_name_nothing_are_refused(there: TinyDataset, options: list[str], said: str, capsys) -> None:
    raw = str(there.raw / there.name)
    assert prepare(there, *(option.replace("{raw}", raw) for option in options)) == 2
    error = capsys.readouterr().err
    assert said.replace("{raw}", raw) in error and error.count("\n") == 1
    assert not (there.preprocessed / there.name).exists()


def test_a_missing_file_is_named_with_the_command_that_writes_it(there: TinyDataset, capsys) -> None:
    image(there, 1, 1).unlink()
    assert prepare(there) == 2
    error = capsys.readouterr().err
    assert "case phantom_001 of Dataset007_Phantom has 1 image files" in error and "add-channel zeros -i" in error
    assert main(["add-channel", "zeros", "-i", str(image(there, 1, 1).parent), "--channels", "2"]) == 0
    assert capsys.readouterr().out == f"wrote {image(there, 1, 1)}\n"
    assert prepare(there, step="inspect") == 0


def test_a_constant_channel_is_warned_of(there: TinyDataset, capsys) -> None:
    constant = sitk.ReadImage(str(image(there, 0, 1))) * 0 + 7
    sitk.WriteImage(constant, str(image(there, 0, 1)))
    assert prepare(there) == 0
    assert "WARNING: T2 is constant but not zero in 1 cases, e.g. phantom_000" in capsys.readouterr().out


def test_if_all_cases_lack_the_channel_there_is_nothing_to_train(there: TinyDataset, capsys) -> None:
    for case in range(6):
        sitk.WriteImage(sitk.ReadImage(str(image(there, case, 1))) * 0, str(image(there, case, 1)))
    assert prepare(there) == 2
    assert "T2 is missing (all zeros) in each of the 6 cases: there is nothing to train" in capsys.readouterr().err


def change_header(file: Path, change: Callable[[sitk.Image], Any]) -> None:
    image = sitk.ReadImage(str(file))
    change(image)
    sitk.WriteImage(image, str(file))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1)), "differ in direction"),
        (lambda i: i.SetOrigin((0.6, 0, 0)), "differ in origin"),
        (lambda i: i.SetSpacing((1, 1, 1.1)), "differ in spacing"),
        (lambda i: i.SetOrigin((0.4, 0, 0)), ""),  # the voxels of one index are the nearest ones
    ],
)
def test_channels_of_a_case_that_lie_in_different_places_are_refused(there, change, said, capsys) -> None:
    change_header(image(there, 1, 1), change)
    assert prepare(there, step="inspect") == (2 if said else 0)
    error = capsys.readouterr().err
    if said:
        assert said in error and error.count("\n") == 1
        assert "case phantom_001" in error and "channel phantom_001_0001.nii.gz" in error
        if "resample the second" in error:  # the remedy passes
            change_header(image(there, 1, 1), lambda i: i.CopyInformation(sitk.ReadImage(str(image(there, 1, 0)))))
            assert prepare(there, step="inspect") == 0


def all_headers(dataset: TinyDataset, cases: range, change: Callable[[sitk.Image], Any]) -> None:
    for case in cases:
        for channel in (0, 1):
            change_header(image(dataset, case, channel), change)


MIRRORED, SAGITTAL = (-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0)


@pytest.fixture
def base_preprocessed(there: TinyDataset, extended: TinyDataset) -> TinyDataset:
    """The images of the base's training are known, as on the machine that trained it."""
    plans = json.loads((there.model / "plans.json").read_text())  # type: ignore[operator]
    identifier = plans["configurations"]["2d"]["data_identifier"]
    shutil.copytree(extended.preprocessed / extended.name / identifier, there.preprocessed / there.name / identifier)
    return there


def test_images_that_lie_otherwise_than_the_bases_are_named(base_preprocessed: TinyDataset, capsys) -> None:
    there = base_preprocessed
    assert prepare(there, step="inspect") == 0 and "WARNING" not in capsys.readouterr().out
    all_headers(there, range(2), lambda i: i.SetDirection(MIRRORED))
    assert prepare(there, step="inspect") == 0
    said = capsys.readouterr().out
    assert "WARNING: 2 cases are mirrored against all images that the base was trained on, e.g. case" in said
    assert f"phantom_000: {image(there, 0, 0)}, whose axes run to SAR; there to SPL" in said
    all_headers(there, range(5), lambda i: i.SetDirection(SAGITTAL))
    assert prepare(there, step="inspect") == 0
    assert "WARNING: 5 cases have their axes in another order than all" in capsys.readouterr().out
    all_headers(there, range(6), lambda i: i.SetDirection(SAGITTAL))
    assert prepare(there) == 2
    error = capsys.readouterr().err
    assert f"case phantom_000: {image(there, 0, 0)}, whose axes run R-L, I-S, A-P; there I-S, A-P, R-L." in error
    assert error.count("\n") == 1 and not (there.preprocessed / there.name / f"{PLANS}.json").exists()


def test_where_only_the_bases_spacing_is_known_thick_slices_tell(there: TinyDataset, capsys, monkeypatch) -> None:
    plans = json.loads((there.model / "plans.json").read_text())  # type: ignore[operator]
    plans |= {"original_median_spacing_after_transp": [5.0, 1, 1], "transpose_backward": [1, 0, 2]}
    monkeypatch.setattr(module, "read_base", lambda *given: replace(read_base(*given), plans=plans))
    assert prepare(there, step="inspect") == 0, "isotropic images tell nothing"
    all_headers(there, range(6), lambda i: i.SetSpacing((1, 5, 1)))
    assert prepare(there, step="inspect") == 0 and "WARNING" not in capsys.readouterr().out
    all_headers(there, range(6), lambda i: i.SetSpacing((1, 1, 5)))
    assert prepare(there, step="inspect") == 2
    said = f"{image(there, 0, 0)}, with voxels of (5, 1, 1) mm in the array's order; there (1, 5, 1)"
    assert said in capsys.readouterr().err


def test_zeros_lie_on_the_grid_of_the_first_channel_and_overwrite_nothing(tmp_path: Path, capsys) -> None:
    first = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32))
    first.SetSpacing((0.5, 0.7, 3))
    first.SetOrigin((1, 2, 3))
    first.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    for case in ("a", "b"):
        sitk.WriteImage(first, str(tmp_path / f"{case}_0000.nii.gz"))
    sitk.WriteImage(first, str(tmp_path / "a_0001.nii.gz"))
    kept = (tmp_path / "a_0001.nii.gz").read_bytes()
    assert main(["add-channel", "zeros", "-i", str(tmp_path), "--channels", "3"]) == 0
    names = {"a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "b_0002.nii.gz"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "a_0001.nii.gz").read_bytes() == kept
    made = sitk.ReadImage(str(tmp_path / "b_0002.nii.gz"))
    assert not sitk.GetArrayFromImage(made).any() and made.GetSize() == first.GetSize()
    for of in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(made, of)(), getattr(first, of)())
    capsys.readouterr()
    assert main(["add-channel", "zeros", "-i", str(tmp_path), "--channels", "3"]) == 0
    assert capsys.readouterr().out == "every case has all of its channels\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--channels", "1"], "--channels 1: a new channel is the second or a later one"),
        (["--ending", ".png"], "holds no image that ends in .png"),
    ],
)
def test_zeros_that_make_no_sense_are_refused(there: TinyDataset, options: list[str], said: str, capsys) -> None:
    folder = there.raw / there.name / "imagesTr"
    assert main(["add-channel", "zeros", "-i", str(folder), *options]) == 2 and said in capsys.readouterr().err


def test_zeros_do_not_stand_for_the_first_channel(tmp_path: Path, capsys) -> None:
    sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkFloat32), str(tmp_path / "a_0001.nii.gz"))
    assert main(["add-channel", "zeros", "-i", str(tmp_path)]) == 2
    assert "case a has no first channel" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_command(there: TinyDataset) -> None:
    command = ["nnUNetv2_ext", "add-channel", "prepare", "-d", "7", "-base", str(there.model)]
    assert "wrote" in run_command(command, there.environment(there.root / "results"), there.root).stdout
