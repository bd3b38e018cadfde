"""audit: corrupted labels come first, whoever has seen a case does not judge it, and no label is touched."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.cli import main
from nnunetv2_ext.phantom import write_phantom_dataset
from nnunetv2_ext.spatialnoise.audit import audit as module_of_audit
from nnunetv2_ext.spatialnoise.audit import panel
from nnunetv2_ext.spatialnoise.audit.audit import Audited
from nnunetv2_ext.spatialnoise.audit.report import markdown
from nnunetv2_ext.spatialnoise.audit.verdict import judge
from tests.conftest import TinyDataset

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "label_errors.py"
WRONG = {"phantom_002": "missing", "phantom_005": "swap", "phantom_008": "shift", "phantom_011": "boundary"}
WRONG["phantom_017"] = "missing"


def array_of(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    image = sitk.ReadImage(str(file))
    result = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
    result.CopyInformation(image)
    sitk.WriteImage(result, str(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def twenty(tmp_path_factory) -> tuple[Path, Path]:
    """nnUNet_raw with 20 labels of which five are wrong, and a good model's saved probabilities of all cases."""
    root = tmp_path_factory.mktemp("audit")
    folder = write_phantom_dataset(root / "raw", 7, num_train=20, num_test=0, shape=(20, 28, 24), num_organs=3)
    saved = root / "saved"
    saved.mkdir()
    generator = np.random.default_rng(0)
    for file in sorted((folder / "labelsTr").iterdir()):
        label = array_of(file)
        logits = 3.5 * np.eye(4)[label].transpose(3, 0, 1, 2) + generator.normal(size=(4, *label.shape))
        odds = np.exp(logits)
        np.savez_compressed(saved / f"{file.name.removesuffix('.nii.gz')}.npz", probabilities=odds / odds.sum(0))
    plans = {"dataset_name": folder.name, "plans_name": "nnUNetPlans", "configurations": {}}
    (saved / "plans.json").write_text(json.dumps(plans))
    shutil.copy(folder / "dataset.json", saved)
    spec = importlib.util.spec_from_file_location("label_errors", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for case, kind in WRONG.items():
        file = folder / "labelsTr" / f"{case}.nii.gz"
        wrong = module.corrupted(array_of(file), kind, "mid", case)
        rewrite(file, lambda _, wrong=wrong: wrong)
    return root / "raw", saved


@pytest.fixture
def raw(twenty, tmp_path, monkeypatch) -> Path:
    """The dataset in a copy of one's own; the other variables are not set."""
    shutil.copytree(twenty[0], tmp_path / "raw")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "raw" / "Dataset007_Phantom"


@pytest.fixture
def no_panels(monkeypatch) -> None:
    """Pictures take most of the time."""
    monkeypatch.setattr(module_of_audit, "draw_case", lambda *arguments: arguments[-1].write_bytes(b""))


def refused(arguments: Sequence[Any], capsys) -> str:
    assert main(["audit", *map(str, arguments), "-device", "cpu"]) == 2
    [line] = [x for x in capsys.readouterr().err.strip().splitlines() if x]
    return line


def test_five_wrong_labels_of_twenty_come_first_and_nothing_else_is_touched(twenty, raw, tmp_path, capsys) -> None:
    before, out = contents(raw.parent), tmp_path / "report"
    assert main(["audit", str(twenty[1]), "-o", str(out), "-device", "cpu"]) == 0
    assert contents(raw.parent) == before
    found = json.loads((out / "audit.json").read_text())
    assert {record["case"] for record in found["cases"][:5]} == set(WRONG)
    assert found["pointwise"] is True and not found["not_judged_no_prediction"]
    assert all(not record["regions"] for record in found["cases"][5:])  # of at least ten voxels
    assert [p.name for p in sorted((out / "panels").iterdir())] == [
        f"{rank:04d}_{record['case']}.png" for rank, record in enumerate(found["cases"], 1)
    ]
    with (out / "regions.csv").open() as stream:
        first = next(csv.DictReader(stream))
    label = array_of(raw / "labelsTr" / f"{first['case']}.nii.gz")
    error = array_of(out / "error_probability" / f"{first['case']}.nii.gz")
    box = tuple(slice(int(first[f"{a}_first"]), int(first[f"{a}_last"]) + 1) for a in "zyx")
    assert error.shape == label.shape and (error[box] > 0.5).sum() >= int(first["voxels"]) >= 10
    with (out / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 60 and {row["case"] for row in rows[:15]} == set(WRONG)
    said = capsys.readouterr().out
    assert "It is not a proof" in said and "pointwise" in said and "control: Dice" in said
    # one fold of five has not learnt a structure
    assert "is not found" not in said
    for record in found["cases"][5:9]:
        record["classes"][2]["dice_label_prediction"] = 0.05
    audited = Audited(SimpleNamespace(name="Dataset007_Phantom"), "", found["cases"], [], [], 0, out)
    names = ", ".join(sorted(record["case"] for record in found["cases"][5:9]))
    assert f"**organ_3 is not found (Dice below 0.1) in 4 of 20 cases that have it:** {names}." in markdown(audited)
    # a label that was corrected is judged anew, the others are not
    stamps = {p.name: p.stat().st_mtime_ns for p in (out / ".cases").glob("*.json")}
    case = found["cases"][0]["case"]
    labels = twenty[1] / f"{case}.npz"
    right = np.load(labels)["probabilities"].argmax(0).astype(np.uint8)
    rewrite(raw / "labelsTr" / f"{case}.nii.gz", lambda _: right)
    assert main(["audit", str(twenty[1]), "-o", str(out), "-device", "cpu"]) == 0
    now = {p.name: p.stat().st_mtime_ns for p in (out / ".cases").glob("*.json")}
    assert {name for name in stamps if now[name] != stamps[name]} == {f"{case}.json", "request.json"}
    assert {r["case"] for r in json.loads((out / "audit.json").read_text())["cases"][:4]} == set(WRONG) - {case}


def test_doubtful_voxels_go_under_ignore_in_a_new_dataset(no_panels, twenty, raw, tmp_path, capsys) -> None:
    run = [twenty[1], "-o", tmp_path / "report", "-device", "cpu"]
    assert "above 0 and below 1" in refused([*run[:3], "--ignore-above", "1", "-d", 9], capsys)
    assert "give its id with -d" in refused([*run[:3], "--ignore-above", "0.6"], capsys)
    assert "choose another id with -d" in refused([*run[:3], "--ignore-above", "0.6", "-d", 7], capsys)
    assert "give both" in refused([*run[:3], "-d", 9], capsys)
    assert not (tmp_path / "report").exists()
    splits = tmp_path / "nnUNet_preprocessed" / raw.name / "splits_final.json"
    splits.parent.mkdir(parents=True)
    splits.write_text('[{"train": [], "val": []}]')
    before = contents(raw)
    assert main(["audit", *map(str, run), "--ignore-above", "0.6", "-d", "9"]) == 0
    assert contents(raw) == before
    new = tmp_path / "raw" / "Dataset009_Phantom_audited"
    content = json.loads((new / "dataset.json").read_text())
    assert content["labels"]["ignore"] == 4 and content["numTraining"] == 20
    block = content["nnunetv2_ext"]["audit"]
    assert set(WRONG) <= set(block["ignored_voxels"]) and block["dataset"] == raw.name
    total = 0
    for file in sorted((raw / "labelsTr").iterdir()):
        old, label = array_of(file), array_of(new / "labelsTr" / file.name)
        error = array_of(tmp_path / "report" / "error_probability" / file.name)
        assert np.array_equal(label == 4, error > 0.6) and np.array_equal(label[label != 4], old[label != 4])
        total += int((label == 4).sum())
    assert total == sum(block["ignored_voxels"].values()) > 500
    said = capsys.readouterr().out
    assert f"{total} voxels of" in said and "next: nnUNetv2_plan_and_preprocess -d 9" in said
    copied = tmp_path / "nnUNet_preprocessed" / new.name / "splits_final.json"
    assert copied.read_text() == splits.read_text()


def test_bad_inputs_are_one_line(no_panels, twenty, raw, tmp_path, capsys) -> None:
    saved, out = tmp_path / "saved", tmp_path / "report"
    shutil.copytree(twenty[1], saved)
    assert "lies below nnUNet_raw" in refused([saved, "-o", raw / "report"], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    assert "is not empty and no audit" in refused([saved, "-o", tmp_path / "full"], capsys)
    assert "neither a model folder nor" in refused([tmp_path / "full", "-o", out], capsys)
    assert "is in" in refused([saved, twenty[1], "-o", out], capsys)
    (saved / "plans.json").rename(saved / "plan.json")
    assert "plans.json is missing: copy it from the model" in refused([saved, "-o", out], capsys)
    (saved / "plan.json").rename(saved / "plans.json")
    shutil.copy(saved / "phantom_000.npz", saved / "stranger.npz")
    assert "stranger has a prediction and no label" in refused([saved, "-o", out], capsys)
    (saved / "stranger.npz").unlink()
    labels = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**labels, "labels": {**labels["labels"], "tumour": 4}}))
    assert "declares other labels than the model knows (value 4)" in refused([saved, "-o", out], capsys)
    (raw / "dataset.json").write_text(json.dumps(labels))
    assert not out.exists()
    np.savez(saved / "phantom_000.npz", probabilities=np.zeros((3, 4, 4, 4)))
    assert "case phantom_000" in refused([saved, "-o", out], capsys)
    np.savez(saved / "phantom_000.npz", probabilities=np.zeros((4, 4, 4, 4)))
    assert "its label has shape" in refused([saved, "-o", out], capsys)
    (saved / "phantom_000.npz").write_bytes(b"PK nonsense")
    assert "does not hold nnU-Net's probabilities" in refused([saved, "-o", out], capsys)
    (saved / "phantom_000.npz").unlink()
    rewrite(raw / "labelsTr" / "phantom_001.nii.gz", lambda x: np.where(x == 2, 9, x).astype(np.uint8))
    assert "phantom_001" in (said := refused([saved, "-o", out], capsys)) and "9" in said
    shutil.rmtree(raw / "labelsTr")
    assert "was trained with are not there" in refused([saved, "-o", out], capsys)


def test_another_request_does_not_overwrite_an_audit_and_empty_cases_are_told(
    no_panels, twenty, raw, tmp_path, capsys
) -> None:
    saved, out = tmp_path / "saved", tmp_path / "report"
    saved.mkdir()
    for name in ("phantom_000.npz", "phantom_001.npz", "plans.json", "dataset.json"):
        shutil.copy(twenty[1] / name, saved)
    rewrite(raw / "labelsTr" / "phantom_000.nii.gz", np.zeros_like)
    assert main(["audit", str(saved), "-o", str(out), "-device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "1 cases labelled as background everywhere; judged as such:** phantom_000" in said
    assert "18 cases not judged, because they have no prediction" in said
    assert "is the audit of other predictions or other options" in refused([saved, "-o", out, "--spatial"], capsys)
    assert main(["audit", str(saved), "-o", str(tmp_path / "field"), "--spatial", "-device", "cpu"]) == 0
    assert "field, rho 0.5" in capsys.readouterr().out


# ---- folds ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def folds(tiny: TinyDataset, make_trainer, tmp_path, monkeypatch) -> Path:
    """Two folds of plain nnUNetTrainer on the tiny dataset, untrained: enough to see who judges whom."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    for fold in (0, 1):
        trainer = make_trainer(nnUNetTrainer, configuration="2d", fold=fold)
        trainer.initialize()
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        folder = Path(trainer.output_folder_base)
        for name, content in (("plans.json", trainer.plans_manager.plans), ("dataset.json", trainer.dataset_json)):
            (folder / name).write_text(json.dumps(content))
    return folder


def test_no_fold_judges_what_it_has_trained_on(no_panels, folds, tiny, tmp_path, monkeypatch, capsys) -> None:
    from nnunetv2_ext.parts.prediction import FoldPredictor

    loaded: list[list[int]] = []
    init = FoldPredictor.__init__
    monkeypatch.setattr(
        FoldPredictor,
        "__init__",
        lambda self, model, folds, *rest: loaded.append(folds) or init(self, model, folds, *rest),
    )
    out, names = tmp_path / "report", [f"phantom_{n:03d}" for n in range(6)]
    assert main(["audit", str(folds), "-o", str(out), "-device", "cpu"]) == 0
    # fold 0 validates on the first two cases, fold 1 on the last two; both have trained on those between
    assert loaded == [[0], [1]]
    found = json.loads((out / "audit.json").read_text())
    assert found["not_judged_seen_by_every_fold"] == names[2:4]
    assert sorted(record["case"] for record in found["cases"]) == names[:2] + names[4:]
    assert "has trained on 2 of 6 cases" in capsys.readouterr().out
    loaded.clear()
    assert main(["audit", str(folds), "-o", str(tmp_path / "one"), "-f", "1", "-device", "cpu"]) == 0
    assert loaded == [[1]] and "has trained on 4 of 6 cases" in capsys.readouterr().out
    # an audit that was stopped goes on
    (out / ".cases" / "phantom_005.json").unlink()
    loaded.clear()
    assert main(["audit", str(folds), "-o", str(out), "-device", "cpu"]) == 0 and loaded == [[1]]
    capsys.readouterr()
    said = refused([folds, "-o", tmp_path / "x", "-f", "all"], capsys)
    assert "fold all has trained on every case" in said and "no numbered fold" not in said
    assert "fold_7" in refused([folds, "-o", tmp_path / "x", "-f", "7"], capsys)
    (folds / "fold_0").rename(folds / "fold_all")
    shutil.rmtree(folds / "fold_1")
    said = refused([folds, "-o", tmp_path / "x"], capsys)
    assert "has no numbered fold" in said and "fold all has trained on every case" in said
    cascade = folds.with_name(folds.name.replace("2d", "3d_cascade_fullres"))
    shutil.copytree(folds, cascade)
    (cascade / "fold_all").rename(cascade / "fold_0")
    plans = json.loads((cascade / "plans.json").read_text())
    stage = {**plans["configurations"]["3d_fullres"], "previous_stage": "3d_lowres"}
    plans["configurations"] |= {"3d_cascade_fullres": stage}
    (cascade / "plans.json").write_text(json.dumps(plans))
    assert "last stage of a cascade" in refused([cascade, "-o", tmp_path / "x"], capsys)
    assert not (tmp_path / "x").exists()


def test_a_fold_without_its_split_is_refused(folds, tiny, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(tiny.preprocessed, tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    split = tmp_path / "preprocessed" / tiny.name / "splits_final.json"
    split.write_text(json.dumps(json.loads(split.read_text())[:1]))
    assert "has 1 folds, and the model has fold 1" in refused([folds, "-o", tmp_path / "x"], capsys)
    split.unlink()
    assert "nobody knows which cases a fold has not seen" in refused([folds, "-o", tmp_path / "x"], capsys)


# ---- one case ------------------------------------------------------------------------------------------------------
def test_a_verdict_by_hand() -> None:
    label = np.zeros((4, 6, 6), int)
    label[1:3, 1:5, 1:5] = 1
    truth = label.copy()
    truth[1:3, 1:5, 3:5] = 2  # 16 voxels are of class 2
    p = np.full((3, 4, 6, 6), 0.005)
    np.put_along_axis(p, truth[None], 0.99, 0)
    spacing = np.array([2.0, 1.0, 1.0])
    found = judge(p, truth, label, None, {"one": 1, "two": 2}, {1: "one", 2: "two"}, False, spacing)
    assert [(r["voxels"], r["mm3"], r["labelled"], r["predicted"]) for r in found.regions] == [(16, 32.0, "one", "two")]
    assert found.regions[0]["box"] == [[3, 4], [1, 4], [1, 2]]  # x, y, z
    one, two = found.classes
    assert one["of_these_labelled"] == pytest.approx(16, abs=0.5) and one["of_these_missing"] < 0.5
    assert two["of_these_missing"] == pytest.approx(16, abs=0.5) and two["labelled_voxels"] == 0
    assert found.summary["score"] == pytest.approx(found.summary["expected_wrong_voxels"] / 32)
    ignored = np.where(truth == 2, 3, label)
    found = judge(p, truth, ignored, 3, {"one": 1, "two": 2}, {1: "one", 2: "two"}, False, spacing)
    assert not found.regions and (found.error[ignored == 3] == 0).all()
    everything = judge(p, truth, np.full_like(label, 3), 3, {"one": 1, "two": 2}, {}, False, spacing)
    assert everything.summary["score"] == 0 and everything.summary["judged_voxels"] == 0


def test_a_region_is_judged_by_its_own_probability() -> None:
    label = np.zeros((1, 8, 8), int)
    label[:, 2:6, 2:6] = 2
    p = np.full((2, 1, 8, 8), 0.01)
    p[0, :, 2:6, 2:6] = 0.99  # whole: right
    structures = {"whole": (1, 2), "core": (2,)}  # the core's probability is low: its label is wrong
    found = judge(
        p, np.where(label, 1, 0), label, None, structures, {1: "whole", 2: "core"}, True, np.array([999.0, 1, 1])
    )
    assert [(r["voxels"], r["mm3"], r["labelled"], r["predicted"]) for r in found.regions] == [
        (16, 16.0, "core", "whole")
    ]
    whole, core = found.classes
    assert whole["expected_wrong_voxels"] < 0.5 and core["of_these_labelled"] == pytest.approx(16, abs=0.5)


def test_a_photograph_is_drawn_in_its_colours_and_a_volume_at_its_most_doubtful_slice(tmp_path, monkeypatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    draw = panel.draw_slice
    monkeypatch.setattr(
        panel, "draw_slice", lambda *args, **more: drawn.append((args[1], more["title"])) or draw(*args, **more)
    )
    photo, classes = np.zeros((3, 1, 20, 30), np.float32), {1: "disc"}
    photo[0] = 255
    label = np.zeros((1, 20, 30), int)
    label[0, 5:9, 5:9] = 1
    common = (label, label, 0.9 * label, {"spacing": (999, 1, 1)}, classes, "", tmp_path / "photo.png")
    panel.draw_case("photo", photo, *common)
    assert [part.shape for part, _ in drawn] == [(20, 30, 3), (20, 30, 3), (20, 30)]
    assert drawn[0][0][0, 0].tolist() == [1, 0, 0] and drawn[0][1] == "label"
    drawn.clear()
    error = np.zeros((4, 20, 30))
    error[2, 3:6, 3:6] = 1
    volume = np.arange(4.0)[:, None, None] + np.zeros((1, 4, 20, 30))
    panel.draw_case(
        "ct", volume, (error > 0).astype(int), 0 * error, error, {"spacing": (3, 1, 1)}, classes, "", tmp_path / "c.png"
    )
    assert all((part == 2).all() for part, _ in drawn) and "slice 2" in drawn[0][1]
