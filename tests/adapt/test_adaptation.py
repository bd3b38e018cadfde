"""The whole adaptation on small models: what comes out, what it was scored on, and that nothing is lost."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_ext.adapt.adaptation import Job, adapt
from nnunetv2_ext.adapt.segments import Segments
from nnunetv2_ext.adapt.training import AdaptTraining
from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.core.settings import PLANS_KEY
from tests.adapt.conftest import train
from tests.contract.commands import BLOCKER
from tests.contract.data import CASCADE, cascade, residual, write_first_stage


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], set[str]]]:
    """New and old cases of every training that is started."""
    seen: list[tuple[set[str], set[str]]] = []
    start = AdaptTraining.on_train_start

    def on_train_start(self: Any) -> None:
        start(self)
        seen.append((set(self.settings.train_cases), set(self.settings.adapt.old_cases or ())))

    monkeypatch.setattr(AdaptTraining, "on_train_start", on_train_start)
    return seen


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "adaptation" / "dice.csv").open() as file:
        return list(csv.DictReader(file))


def relabel(file: Path, change: dict[int, int]) -> None:
    image = sitk.ReadImage(str(file))
    labels = sitk.GetArrayFromImage(image)
    changed = labels.copy()
    for old, new in change.items():
        changed[labels == old] = new
    out = sitk.GetImageFromArray(changed)
    out.CopyInformation(image)
    sitk.WriteImage(out, str(file))


def test_the_result_is_a_stock_model_that_predicts_without_this_package(request_for, site, tmp_path) -> None:
    output = adapt(request_for(folds=()))
    assert not (tmp_path / "adapted.adapting").exists()
    for fold in ("0", "1"):
        checkpoint = read(output / f"fold_{fold}" / "checkpoint_final.pth")
        assert checkpoint["trainer_name"] == "nnUNetTrainer" and EXTENSION_KEY not in checkpoint
        assert PLANS_KEY not in checkpoint["init_args"]["plans"] and "optimizer_state" not in checkpoint
    assert PLANS_KEY not in json.loads((output / "plans.json").read_text())
    command = ["-i", str(site / "imagesTs"), "-o", str(tmp_path / "out"), "-m", str(output), "-f", "0", "1"]
    command += ["-npp", "1", "-nps", "1", "--disable_tta", "-device", "cpu"]
    code = f"{BLOCKER}\nfrom nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder\n"
    code += f"import sys; sys.argv = ['predict', *{command!r}]\n"
    code += "if __name__ == '__main__':\n    predict_entry_point_modelfolder()\n"
    script = tmp_path / "predict.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1


def test_every_weight_has_learnt_and_the_source_is_as_it_was(request_for, model) -> None:
    before = read(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    kept = {name: value.clone() for name, value in before.items()}
    after = read(adapt(request_for()) / "fold_0" / "checkpoint_final.pth")["network_weights"]
    assert after.keys() == kept.keys()
    same = {name for name in kept if torch.equal(after[name], kept[name])}
    assert all("seg_layers.0" in name for name in same)  # deep supervision's lowest, whose loss has no weight
    again = read(model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_no_given_case_is_scored_by_a_model_that_was_trained_on_it(request_for, trained, monkeypatch) -> None:
    scored: list[tuple[str, set[str]]] = []
    new = Segments.new

    def spied(self: Any, what: str, case: str, weights: Any = None):
        if what == "left_out" and weights is not None:
            scored.append((case, trained[-1][0]))
        return new(self, what, case, weights)

    monkeypatch.setattr(Segments, "new", spied)
    output = adapt(request_for(report="first"))
    assert len(scored) == 3 and all(case not in cases and len(cases) == 2 for case, cases in scored)
    new_rows = [row for row in rows(output) if row["cases"].startswith("new")]
    assert len(new_rows) == 6 and all(row["after"] for row in new_rows)


def test_cases_of_a_subject_are_left_out_together(request_for, own_site, trained) -> None:
    for old, name in (("000", "p1_a"), ("001", "p1_b"), ("002", "p2_a")):
        (own_site / "imagesTr" / f"phantom_{old}_0000.nii.gz").rename(own_site / "imagesTr" / f"{name}_0000.nii.gz")
        (own_site / "labelsTr" / f"phantom_{old}.nii.gz").rename(own_site / "labelsTr" / f"{name}.nii.gz")
    adapt(request_for(own_site, report="first", group_regex="^(p[0-9])"))
    assert [cases for cases, _ in trained[1:]] == [{"p2_a"}, {"p1_a", "p1_b"}]


def test_replay_takes_the_folds_training_cases(request_for, trained, tiny) -> None:
    adapt(request_for(steps=1))
    splits = json.loads((tiny.preprocessed / tiny.name / "splits_final.json").read_text())
    assert trained[0][1] == set(splits[0]["train"])


def test_a_subject_that_validates_is_not_replayed(request_for, tiny, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "preprocessed"
    shutil.copytree(tiny.preprocessed, copy)
    monkeypatch.setenv("nnUNet_preprocessed", str(copy))
    file = copy / tiny.name / "dataset.json"
    content = json.loads(file.read_text())
    content["nnunetv2_ext"] = {"subjects": {"phantom_000": "a", "phantom_005": "a"}}
    file.write_text(json.dumps(content))
    job = Job(request_for(), print)
    replayed, validation, _ = job.old.split("0")
    assert "phantom_000" in validation and "phantom_005" not in replayed and len(replayed) == 3


def test_forgetting_is_measured_on_the_folds_validation_cases(request_for, tiny) -> None:
    output = adapt(request_for(report="all", folds=("0", "1")))
    splits = json.loads((tiny.preprocessed / tiny.name / "splits_final.json").read_text())
    for fold in ("0", "1"):
        old = [row for row in rows(output) if row["cases"] == f"old site, fold {fold}"]
        assert {row["case"] for row in old} == set(splits[int(fold)]["val"])
        assert all(row["after"] for row in old)
    assert (output / "adaptation" / "cases_fold_1.png").stat().st_size > 5000
    assert list((output / "adaptation" / "fold_0").glob("training_log_*.txt"))


def test_scores_are_those_of_nnunets_predictor_on_the_files(request_for, model, site, tiny) -> None:
    """Of the new site before, and of the old site after, by the model that was written; Dice by counting."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    output = adapt(request_for(report="first", head_only=True))
    old = tiny.raw / tiny.name
    for folder, raw, cases, column in ((model, site, "new", "before"), (output, old, "old", "after")):
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), (0,))
        reader = predictor.plans_manager.image_reader_writer_class()
        several = [row for row in rows(output) if row["cases"] == f"{cases} site, fold 0"]
        assert several
        for row in several:
            images, properties = reader.read_images([str(raw / "imagesTr" / f"{row['case']}_0000.nii.gz")])
            found = predictor.predict_single_npy_array(images, properties)
            truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / f"{row['case']}.nii.gz")))
            masks = [labels == int(row["structure"][-1]) for labels in (found, truth)]
            wanted = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
            assert float(row[column]) == pytest.approx(wanted, abs=1e-5)


def test_one_case_is_adapted_and_the_gain_stays_unknown(request_for, own_site, trained, capsys) -> None:
    for name in ("001", "002"):
        (own_site / "imagesTr" / f"phantom_{name}_0000.nii.gz").unlink()
        (own_site / "labelsTr" / f"phantom_{name}.nii.gz").unlink()
    output = adapt(request_for(own_site, report="first"))
    assert trained == [({"phantom_000"}, trained[0][1])]
    assert "after is unknown: no case can be left out" in capsys.readouterr().out
    assert all(not row["after"] for row in rows(output) if row["cases"].startswith("new"))


@pytest.mark.parametrize("head_only", [False, True])
def test_a_class_that_is_not_drawn_is_neither_scored_nor_forgotten(request_for, own_site, head_only) -> None:
    for file in (own_site / "labelsTr").iterdir():
        relabel(file, {1: 0})
    output = adapt(request_for(own_site, not_drawn=("organ_1",), report="first", head_only=head_only, steps=2))
    assert {row["structure"] for row in rows(output) if row["cases"].startswith("new")} == {"organ_2"}
    assert {row["structure"] for row in rows(output) if row["cases"].startswith("old")} == {"organ_1", "organ_2"}


def test_a_class_only_the_left_out_case_has_is_spared_while_it_is_out(request_for, own_site, monkeypatch) -> None:
    for name in ("001", "002"):
        relabel(own_site / "labelsTr" / f"phantom_{name}.nii.gz", {2: 0})
    seen = []
    start = AdaptTraining.on_train_start

    def on_train_start(self: Any) -> None:
        start(self)
        seen.append((len(self.settings.train_cases), list(self.settings.adapt.not_drawn)))

    monkeypatch.setattr(AdaptTraining, "on_train_start", on_train_start)
    adapt(request_for(own_site, report="first"))
    assert seen == [(3, []), (2, ["organ_2"]), (2, []), (2, [])]


def test_a_value_that_marks_the_unknown_becomes_the_ignore_label(request_for, own_site, monkeypatch) -> None:
    for file in (own_site / "labelsTr").iterdir():
        image = sitk.ReadImage(str(file))
        labels = sitk.GetArrayFromImage(image)
        labels[:, :8] = 77
        out = sitk.GetImageFromArray(labels)
        out.CopyInformation(image)
        sitk.WriteImage(out, str(file))
    seen = []
    step = AdaptTraining.train_step

    def train_step(self: Any, batch: dict) -> dict:
        seen.append((self.label_manager.ignore_label, {int(v) for v in batch["target"][0].unique()}))
        return step(self, batch)

    monkeypatch.setattr(AdaptTraining, "train_step", train_step)
    output = adapt(request_for(own_site, ignore=77, report="first"))
    assert all(ignore == 3 for ignore, _ in seen) and {v for _, values in seen for v in values} == {0, 1, 2, 3}
    assert "ignore" not in json.loads((output / "dataset.json").read_text())["labels"]


def test_without_the_old_data_it_says_so_and_adapts(request_for, trained, monkeypatch, capsys) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    output = adapt(request_for(report="first"))
    said = capsys.readouterr().out
    assert "no replay: nnUNet_preprocessed is not set" in said
    assert trained[0][1] == set() and not [row for row in rows(output) if row["cases"].startswith("old")]


def test_no_replay_is_not_mistaken_for_no_data(request_for, trained, capsys) -> None:
    output = adapt(request_for(replay=0.0, report="first"))
    assert trained[0][1] == set() and [row for row in rows(output) if row["cases"].startswith("old")]
    assert "no replay:" not in capsys.readouterr().out


# ---- interruptions ---------------------------------------------------------------------------------------------------
def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return read(output / "fold_0" / "checkpoint_final.pth")["network_weights"]


def test_stopped_and_continued_it_is_the_one_that_never_stopped(request_for, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("nnUNet_ext_settings", "seed=3")
    whole = weights_of(adapt(request_for(report="first", output=tmp_path / "whole")))
    step, done = AdaptTraining.train_step, []

    def train_step(self: Any, batch: dict) -> dict:
        done.append(1)
        if len(done) == 3:
            Path(self.output_folder, "stop").touch()
        return step(self, batch)

    request = request_for(report="first")
    monkeypatch.setattr(AdaptTraining, "train_step", train_step)
    with pytest.raises(SystemExit):
        adapt(request)
    assert len(done) == 3 and not request.output.exists()
    with pytest.raises(ValueError, match=r"adapted.adapting holds an interrupted adaptation: continue it with --c"):
        adapt(request)
    with pytest.raises(ValueError, match=r"was started with steps=4, and now it is 5"):
        adapt(request_for(report="first", steps=5), continued=True)
    output = adapt(request, continued=True)
    assert len(done) == 4 + 3 * 4  # one of the final training was left, then the three without a case
    found = weights_of(output)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_what_was_trained_and_predicted_is_not_done_again(request_for, monkeypatch, trained) -> None:
    request = request_for(report="first")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_draw", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            adapt(request)
    assert len(trained) == 4
    adapt(request, continued=True)
    assert len(trained) == 4


# ---- kinds of models -------------------------------------------------------------------------------------------------
def works(output: Path, network_class: str, trainer: str = "nnUNetTrainer") -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(output), (0,))
    assert type(predictor.network).__name__ == network_class and predictor.trainer_name == trainer


def test_three_dimensions_and_residual_encoders(request_for, tiny, tmp_path) -> None:
    plans = residual(tiny.plans())
    other = train(tiny, tmp_path / "models", "3d_fullres", plans=plans)
    output = adapt(request_for(model=other, steps=2, report="first"))
    works(output, "ResidualEncoderUNet")
    assert len([row for row in rows(output) if row["after"]]) == 10


@pytest.mark.parametrize("head_only", [False, True])
def test_regions_with_one_that_is_not_drawn(request_for, regions, tmp_path, monkeypatch, own_site, head_only) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(regions.preprocessed))
    (own_site / "dataset.json").unlink()
    for file in (own_site / "labelsTr").iterdir():
        relabel(file, {2: 1})
    other = train(regions, tmp_path / "models")
    before = read(other / "fold_0" / "checkpoint_final.pth")["network_weights"]
    request = request_for(
        own_site, model=other, report="first", not_drawn=("organ_2",), head_only=head_only, replay=0.0
    )
    output = adapt(request)
    assert {row["structure"] for row in rows(output) if row["cases"].startswith("new")} == {"whole"}
    after = weights_of(output)
    name = "decoder.seg_layers.1.bias"
    changes = (after[name] - before[name]).abs().tolist()
    assert changes[0] > 1e-4 and changes[1] < 1e-6  # weight decay


def test_the_last_stage_of_a_cascade(request_for, tiny, tmp_path, site, monkeypatch) -> None:
    plans = cascade(tiny.plans())
    other = train(
        tiny, tmp_path / "models", CASCADE, plans=plans, prepare=lambda trainer: write_first_stage(trainer, tiny)
    )
    base = tmp_path / "preprocessed"
    shutil.copytree(tiny.preprocessed, base)
    (base / tiny.name / "tiny.json").write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_preprocessed", str(base))
    with pytest.raises(ValueError, match="predict the given images with 3d_lowres"):
        adapt(request_for(model=other))
    output = adapt(request_for(model=other, steps=2, report="first", previous_stage=site / "labelsTr"))
    works(output, "PlainConvUNet")
    assert {row["cases"] for row in rows(output)} == {"new site, fold 0", "old site, fold 0"}
    assert {row["after"] == "" for row in rows(output)} == {False}
    shutil.rmtree(output)
    adapt(request_for(model=other, report="first", head_only=True, previous_stage=site / "labelsTr"))


def test_one_of_nnunets_variants_keeps_its_name_and_network(request_for, tiny, tmp_path) -> None:
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import (
        nnUNetTrainerNoMirroring,
    )
    from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN

    for variant, norm in ((nnUNetTrainerNoMirroring, "InstanceNorm2d"), (nnUNetTrainerBN, "BatchNorm2d")):
        other = train(tiny, tmp_path / "models", trainer=variant)
        output = adapt(request_for(model=other, output=tmp_path / variant.__name__, steps=2))
        works(output, "PlainConvUNet", variant.__name__)
        checkpoint = read(output / "fold_0" / "checkpoint_final.pth")
        assert (checkpoint["inference_allowed_mirroring_axes"] is None) == (norm == "InstanceNorm2d")
        log = next((output / "adaptation" / "fold_0").glob("training_log*.txt")).read_text()
        assert "100.0 % of the" in log


def test_a_model_of_one_of_our_trainers(request_for, make_trainer, tmp_path, tiny, monkeypatch) -> None:
    from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

    trainer = make_trainer(nnUNetTrainerMedContext, "num_epochs=1", "2d", results=tmp_path / "ours")
    trainer.run_training()
    monkeypatch.setenv("nnUNet_ext_settings", "")
    output = adapt(request_for(model=Path(trainer.output_folder_base), steps=2))
    works(output, "PlainConvUNet")


def test_a_model_whose_network_is_not_nnunets_is_refused(request_for, model, tmp_path) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["network_weights"]["bank"] = torch.zeros(2)
    checkpoint["trainer_name"] = "nnUNetTrainerOfNobody"
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=r"of nnUNetTrainerOfNobody, whose network is not plain nnU-Net's \(bank is 2"):
        adapt(request_for(model=tmp_path / "model"))
    assert np.all([not path.name.endswith(".adapting") for path in tmp_path.iterdir()])
