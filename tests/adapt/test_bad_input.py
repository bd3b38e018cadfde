"""Every mistake ends in one line that names cause and remedy, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.adapt.adaptation import Job, Request, adapt
from nnunetv2_ext.cli.dispatch import main
from nnunetv2_ext.core.checkpoint import read


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """``refused(request)``: the one line; nothing was written."""

    def refuse(request: Request) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=r".+") as error:
            Job(request, lambda line: None)
        assert sorted(tmp_path.iterdir()) == before and "\n" not in str(error.value)
        return str(error.value)

    return refuse


def image(site: Path, case: str = "phantom_000", channel: str = "0000") -> Path:
    return site / "imagesTr" / f"{case}_{channel}.nii.gz"


def label(site: Path, case: str = "phantom_000") -> Path:
    return site / "labelsTr" / f"{case}.nii.gz"


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray], spacing: tuple[float, ...] | None = None) -> None:
    old = sitk.ReadImage(str(file))
    new = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(old)))
    new.SetSpacing(spacing or old.GetSpacing())
    sitk.WriteImage(new, str(file))


def test_a_fold_that_is_not_there(request_for, refused) -> None:
    text = refused(request_for(folds=("4",)))
    assert "fold_4" in text and "fold_0/checkpoint_final.pth" in text and "give another -f or -chk" in text


def test_a_folder_that_is_no_model(request_for, refused, tmp_path, model) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a trained model (plans.json is missing)" in refused(request_for(model=tmp_path / "empty", folds=()))
    shutil.copytree(model, tmp_path / "model")
    for file in (tmp_path / "model").glob("fold_*/checkpoint_final.pth"):
        file.unlink()
    assert "there is no checkpoint" in refused(request_for(model=tmp_path / "model", folds=()))


def test_a_damaged_checkpoint(request_for, refused, tmp_path, model) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:1000])
    assert "is broken or cut short" in refused(request_for(model=tmp_path / "model"))


def test_a_label_value_that_the_model_does_not_know(request_for, refused, own_site, tmp_path) -> None:
    rewrite(label(own_site), lambda labels: np.where(labels == 2, 7, labels))
    text = refused(request_for(own_site))
    assert "case phantom_000" in text and "holds the label 7" in text and "organ_2=2" in text
    assert "say --ignore 7" in text
    Job(request_for(own_site, ignore=7), print)  # the remedy passes


def test_an_ignore_value_that_is_a_label(request_for, refused) -> None:
    assert "--ignore 2 is the label of organ_2" in refused(request_for(ignore=2))


def test_several_unknown_values_have_no_single_ignore_value(request_for, refused, own_site) -> None:
    rewrite(label(own_site), lambda labels: labels + 5)
    text = refused(request_for(own_site))
    assert "holds the label 5, 6, 7" in text and "--ignore" not in text


def test_an_image_without_a_label_and_the_reverse(request_for, refused, own_site) -> None:
    label(own_site).rename(own_site / "kept.nii.gz")
    assert "case phantom_000 has an image and no label" in refused(request_for(own_site))
    (own_site / "kept.nii.gz").rename(label(own_site))
    image(own_site, "phantom_001").unlink()
    assert "case phantom_001 has a label and no image" in refused(request_for(own_site))


def test_channels_that_lack_or_are_too_many(request_for, refused, own_site) -> None:
    shutil.copyfile(image(own_site), image(own_site, channel="0001"))
    text = refused(request_for(own_site))
    assert "case phantom_000 has 2 channels" in text and "phantom_000_0001" in text
    image(own_site).unlink()
    assert "lacks the channel" in refused(request_for(own_site)) and "0000" in refused(request_for(own_site))


def test_a_site_that_declares_other_channels_or_labels(request_for, refused, own_site) -> None:
    file = own_site / "dataset.json"
    content = json.loads(file.read_text())
    for key, value, words in (
        ("channel_names", {"0": "T9"}, "declares the channels T9"),
        ("labels", {"background": 0, "organ_1": 1, "spleen": 2}, "the label spleen, which the model does not know"),
        ("labels", {"background": 0, "organ_1": 2, "organ_2": 1}, "gives organ_1 the label 2, the model 1"),
    ):
        file.write_text(json.dumps(content | {key: value}))
        assert words in refused(request_for(own_site))
    file.write_text(json.dumps(content | {"labels": {"background": 0, "organ_1": 1, "ignore": 9}}))
    Job(request_for(own_site), print)


def test_a_class_that_no_label_has_is_refused_with_its_remedy(request_for, refused, own_site) -> None:
    for file in (own_site / "labelsTr").iterdir():
        rewrite(file, lambda labels: np.where(labels == 1, 0, labels))
    text = refused(request_for(own_site))
    assert "no given label has organ_1" in text and "--not-drawn organ_1" in text
    Job(request_for(own_site, not_drawn=("organ_1",)), print)


def test_a_class_that_is_drawn_is_not_not_drawn(request_for, refused) -> None:
    assert "organ_1 is drawn, in case phantom_000" in refused(request_for(not_drawn=("organ_1",)))
    assert "has no class organ_9; it has organ_1, organ_2" in refused(request_for(not_drawn=("organ_9",)))


def test_a_case_that_nobody_annotated(request_for, refused, own_site) -> None:
    rewrite(label(own_site), lambda labels: np.full_like(labels, 9))
    assert "case phantom_000" in refused(request_for(own_site, ignore=9))
    assert "has no annotated voxel" in refused(request_for(own_site, ignore=9))


def test_a_label_on_another_grid(request_for, refused, own_site) -> None:
    rewrite(label(own_site), lambda labels: labels[:-1])
    assert "case phantom_000" in refused(request_for(own_site)) and "voxels" in refused(request_for(own_site))


def test_a_far_spacing_is_warned_of_with_numbers(request_for, own_site) -> None:
    for file in (image(own_site), label(own_site)):
        rewrite(file, lambda array: array, spacing=(4.0, 1.0, 1.0))
    said: list[str] = []
    Job(request_for(own_site), said.append)
    [warned] = [line for line in said if "spacing" in line]
    assert "WARNING: case phantom_000 has a spacing of (1, 1, 4) mm" in warned and "4.0 times apart" in warned


def test_slices_of_a_2d_model_may_be_as_thick_as_they_like(request_for, own_site) -> None:
    for file in (image(own_site), label(own_site)):
        rewrite(file, lambda array: array, spacing=(1.0, 1.0, 9.0))
    said: list[str] = []
    Job(request_for(own_site), said.append)
    assert not [line for line in said if "spacing" in line]


def test_no_space_for_the_result(request_for, refused, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=1, used=1, free=10))
    text = refused(request_for())
    assert "MB are needed in" in text and "0 MB are free" in text


def test_an_output_that_exists_or_lies_in_the_model(request_for, refused, model, tmp_path) -> None:
    (tmp_path / "adapted").mkdir()
    assert "adapted exists; name a folder that does not" in refused(request_for())
    assert "lies in the model folder" in refused(request_for(output=model / "adapted"))


def test_replay_that_was_asked_for_and_cannot_be(request_for, refused, monkeypatch, tmp_path, tiny) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    text = refused(request_for(replay=0.5))
    assert "--replay needs the model's own preprocessed data" in text and "say --no-replay" in text
    monkeypatch.setenv("nnUNet_preprocessed", str(tiny.preprocessed))
    assert Job(request_for(replay=0.25), print).replay == 0.25


def test_another_plan_is_not_the_models(request_for, tiny, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny.preprocessed / tiny.name, tmp_path / "pre" / tiny.name)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))
    file = tmp_path / "pre" / tiny.name / "tiny.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"]["spacing"] = [3.0, 3.0]
    file.write_text(json.dumps(plans))
    said: list[str] = []
    assert Job(request_for(), said.append).old is None
    assert "is not the plan that the model was preprocessed with" in said[-1]


def test_settings_that_adapt_decides_itself(request_for, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_ext_settings", "train_cases=2")
    with pytest.raises(ValueError, match="sets train_cases, which adapt decides"):
        adapt(request_for())
    monkeypatch.setenv("nnUNet_ext_settings", "weight_decay=0.001")
    assert read(adapt(request_for(), continued=True) / "fold_0" / "checkpoint_final.pth")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps 0: give a number above 0"),
        (["--rate", "1.5"], "--rate 1.5: give a number above 0 below 1"),
        (["--replay", "1"], "--replay 1.0: the share of old cases is 0 or more and below 1"),
    ],
)
def test_the_command_says_it_in_one_line(request_for, capsys, options: list[str], words: str) -> None:
    request = request_for()
    where = [str(request.model), "-i", str(request.images), "-l", str(request.labels), "-o", str(request.output)]
    assert main(["adapt", *where, "-device", "cpu", *options]) == 2
    assert words in capsys.readouterr().err


def test_the_command_adapts(request_for, capsys) -> None:
    request = request_for()
    where = [str(request.model), "-i", str(request.images), "-l", str(request.labels), "-o", str(request.output)]
    options = ["-f", "0", "--steps", "2", "--report", "none", "--no-replay", "-device", "cpu"]
    assert main(["adapt", *where, *options]) == 0
    assert "nnUNetv2_predict_from_modelfolder -m" in capsys.readouterr().out
    assert (request.output / "fold_0" / "checkpoint_final.pth").is_file()
