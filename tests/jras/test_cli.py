"""J-RAS through the real commands: train, continue, predict from elsewhere, look at guides, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.cli.dispatch import main as ext_main
from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.jras.strip import without_bank
from tests.conftest import TinyDataset, run_command

SHORT = "num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 panel_every=0 seed=1 save_every=1"


@pytest.fixture(scope="module")
def model(tiny: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for two epochs, the second one after ``--c``, and validated, by the stock command from another folder."""
    from tests.jras.conftest import SMALL_JRAS

    root = tmp_path_factory.mktemp("cli")
    train = ["nnUNetv2_train", "1", "3d_fullres", "0", "-tr", "nnUNetTrainerJRAS", "-p", "tiny", "-device", "cpu"]
    environment = tiny.environment(root / "results", f"{SMALL_JRAS} {SHORT} num_epochs=1")
    run_command(train, environment, root)
    folder = root / "results" / tiny.name / "nnUNetTrainerJRAS__tiny__3d_fullres"
    final = folder / "fold_0" / "checkpoint_final.pth"
    final.rename(final.with_name("checkpoint_latest.pth"))
    environment["nnUNet_ext_settings"] = f"{SMALL_JRAS} {SHORT} num_epochs=2"
    done = run_command([*train, "--c"], environment, root)
    assert "Epoch 1" in done.stdout and "a new one is drawn" not in done.stdout
    assert (folder / "fold_0" / "validation" / "summary.json").is_file()
    return folder


def image_of(dataset: TinyDataset) -> Path:
    return sorted(dataset.images_ts.glob("*_0000.nii.gz"))[0]


def test_guides_draws_a_picture_and_prints_the_attention(model, tiny, tmp_path, capsys):
    label = tiny.raw / tiny.name / "labelsTs" / image_of(tiny).name.replace("_0000", "")
    assert ext_main(["guides", str(model), str(image_of(tiny)), "-o", str(tmp_path / "p.png"), "-l", str(label)]) == 0
    assert (tmp_path / "p.png").stat().st_size > 5000
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["attention", "guide"]  # not where nnU-Net found the trainer
    table = [line for line in lines[1:] if line[0][0].isdigit()]
    assert len(table) == 2 and sum(float(line[0]) for line in table) == pytest.approx(1, abs=0.01)
    trained = {file.name.removesuffix("_0000.nii.gz") for file in tiny.raw.glob("*/imagesTr/*_0000.nii.gz")}
    assert all(line[3] in trained for line in table)


def test_an_export_with_blank_groups_hides_the_cases(model, tiny, tmp_path, capsys):
    blank = tmp_path / model.name
    assert ext_main(["export", str(model), str(blank), "--blank-groups"]) == 0
    capsys.readouterr()
    assert ext_main(["guides", str(blank), str(image_of(tiny)), "-o", str(tmp_path / "p.png")]) == 0
    said = capsys.readouterr().out
    assert "a case that this model does not name" in said and "phantom_" not in said


def test_guides_warns_for_a_case_of_the_bank(model, tiny, tmp_path, capsys):
    [*_, trained] = sorted((tiny.raw / tiny.name / "imagesTr").glob("*_0000.nii.gz"))
    assert ext_main(["guides", str(model), str(trained), "-o", str(tmp_path / "p.png")]) == 0
    case = trained.name.removesuffix("_0000.nii.gz")
    assert capsys.readouterr().out.startswith(f"WARNING: {case}, or another case of its subject, is in the guide bank")


def test_guides_refuses_what_it_cannot_show(model, tiny, tmp_path, capsys):
    image, output = str(image_of(tiny)), str(tmp_path / "p.png")

    def refused(*arguments: str) -> str:
        assert ext_main(["guides", *arguments, "-o", output]) == 2
        return capsys.readouterr().err

    assert "checkpoint_final.pth does not exist" in refused(str(model), image, "-f", "3")
    assert "is not a trained model (plans.json is missing)" in refused(str(tmp_path), image)
    assert "takes 1 channel" in refused(str(model), image, image)
    assert "nowhere.nii.gz is missing" in refused(str(model), "nowhere.nii.gz")
    stripped = tmp_path / "stripped" / "fold_0" / "checkpoint_final.pth"
    stripped.parent.mkdir(parents=True)
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    torch.save(without_bank(checkpoint), stripped)
    for name in ("plans.json", "dataset.json"):
        (tmp_path / "stripped" / name).write_text((model / name).read_text())
    assert "is empty: it was stripped" in refused(str(tmp_path / "stripped"), image)
    checkpoint["network_weights"] = {"a": torch.zeros(1)}
    torch.save(checkpoint, stripped)
    assert "not trained with J-RAS" in refused(str(tmp_path / "stripped"), image)


def logits(folder: Path, data: torch.Tensor) -> np.ndarray:
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor.predict_sliding_window_return_logits(data).float().numpy()


def test_the_exported_model_is_plain_and_predicts_like_the_stripped_one(model, tmp_path, capsys):
    export_model(model, tmp_path / "plain")
    assert "nnunetv2_ext" not in json.loads((tmp_path / "plain" / "plans.json").read_text())
    data = torch.randn(1, 20, 28, 20, generator=torch.Generator().manual_seed(0))
    assert ext_main(["export", str(model), str(tmp_path / "stripped"), "--strip-bank"]) == 0
    assert "earching" not in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "stripped" / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainerJRAS" and "nnunetv2_ext" not in checkpoint
    assert len(checkpoint["network_weights"]["bank.images"]) == 0
    plain = logits(tmp_path / "plain", data)
    assert np.array_equal(plain, logits(tmp_path / "stripped", data))
    assert not np.array_equal(plain, logits(model, data))  # the guides do something


def test_2d_regions_and_an_ignore_label_at_once(tiny, tmp_path):
    """Trained, validated alone and predicted with, by the stock commands."""
    from tests.jras.conftest import SMALL_JRAS

    dataset = relabelled(tiny, tmp_path / "data")
    environment = dataset.environment(tmp_path / "results", f"{SMALL_JRAS} {SHORT} num_epochs=1")
    train = ["nnUNetv2_train", "2", "2d", "0", "-tr", "nnUNetTrainerJRAS", "-p", "tiny", "-device", "cpu"]
    run_command(train, environment, tmp_path)
    fold = tmp_path / "results" / dataset.name / "nnUNetTrainerJRAS__tiny__2d" / "fold_0"
    state = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    labels, masks = state["bank.labels"], state["bank.lut"][state["bank.labels"].int()]
    assert masks.shape[-1] == 2 and torch.equal(masks[..., 0].bool(), (labels == 1) | (labels == 2))
    assert torch.equal(masks[..., 1].bool(), labels == 2) and (labels == 2).any()
    assert (labels == 255).any() and not (labels == 3).any()  # ignored cells belong to no mask

    summary = json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]
    shutil.rmtree(fold / "validation")
    run_command([*train, "--val"], environment, tmp_path)
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"] == summary

    predict = ["nnUNetv2_predict", "-d", "2", "-i", str(dataset.images_ts), "-o", str(tmp_path / "out"), "-c", "2d"]
    predict += ["-f", "0", "-tr", "nnUNetTrainerJRAS", "-p", "tiny", "-device", "cpu", "--disable_tta"]
    run_command([*predict, "-npp", "0", "-nps", "0"], environment, tmp_path)
    found = [sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted((tmp_path / "out").glob("*.nii.gz"))]
    assert len(found) == 2 and all(set(np.unique(labels)) <= {0, 1, 2} for labels in found)


def relabelled(tiny: TinyDataset, root: Path) -> TinyDataset:
    """The tiny dataset with overlapping regions, every fourth slice and one side ignored, preprocessed for 2d."""
    dataset = TinyDataset(root, 2, "Dataset002_Phantom")
    shutil.copytree(tiny.raw / tiny.name, dataset.raw / dataset.name)
    base = dataset.preprocessed / dataset.name
    base.mkdir(parents=True)
    labels = {"background": 0, "whole": [1, 2], "organ_2": 2, "ignore": 3}
    description = tiny.dataset_json() | {"labels": labels, "regions_class_order": [1, 2]}
    for folder in (dataset.raw / dataset.name, base):
        (folder / "dataset.json").write_text(json.dumps(description))
    for path in (dataset.raw / dataset.name / "labelsTr").iterdir():
        image = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(image)
        array[::4], array[..., :6] = 3, 3
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(path))
    (base / "tiny.json").write_text(json.dumps(tiny.plans() | {"dataset_name": dataset.name}))
    for name in ("splits_final.json", "dataset_fingerprint.json"):
        shutil.copy(tiny.preprocessed / tiny.name / name, base / name)
    command = ["nnUNetv2_preprocess", "-d", "2", "-plans_name", "tiny", "-c", "2d", "-np", "1"]
    run_command(command, dataset.environment(root / "results"), root)
    return dataset
