"""``nnUNetv2_ext bank``: other guides, the same weights; and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.cli.dispatch import main
from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.jras.bank import PER_GUIDE
from nnunetv2_ext.phantom import write_phantom_dataset
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from tests.jras.conftest import SMALL_JRAS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw dataset of three cases of another site."""
    root = tmp_path_factory.mktemp("site")
    return write_phantom_dataset(root, 7, num_train=3, num_test=0, shape=(24, 32, 24), num_organs=2, seed=99)


@pytest.fixture
def model(make_trainer, no_pictures) -> Path:
    """A model folder of two folds, whose columns are not zero any more."""
    for fold in (0, 1):
        trainer = make_trainer(nnUNetTrainerJRAS, f"{SMALL_JRAS} seed=3", configuration="2d", fold=fold)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return Path(trainer.output_folder_base)


@pytest.fixture
def given(site: Path, tmp_path: Path) -> Path:
    """A copy of the site's cases that a test may spoil."""
    for name in ("imagesTr", "labelsTr"):
        shutil.copytree(site / name, tmp_path / "given" / name)
    return tmp_path / "given"


def bank(model: Path, given: Path, output: Path, *options: str) -> int:
    command = ["bank", str(model), "-i", str(given / "imagesTr"), "-l", str(given / "labelsTr"), "-o", str(output)]
    return main([*command, *options])


def logits(model: Path) -> torch.Tensor:
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0, 1))
    data = torch.randn(1, 2, 24, 24, generator=torch.Generator().manual_seed(0))
    return predictor.predict_logits_from_preprocessed_data(data)


def test_every_tensor_but_the_banks_is_the_same_and_stock_prediction_works(model, given, tmp_path, capsys):
    output = tmp_path / "out" / model.name
    output.parent.mkdir()
    assert bank(model, given, output) == 0
    assert "PRIVACY" in capsys.readouterr().out
    for fold in ("fold_0", "fold_1"):
        before, after = (read(folder / fold / "checkpoint_final.pth") for folder in (model, output))
        assert after["trainer_name"] == "nnUNetTrainerJRAS" and EXTENSION_KEY not in after
        one, other = before["network_weights"], after["network_weights"]
        assert one.keys() == other.keys()
        same = {name for name in one if one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])}
        assert {name for name in one if name not in same} <= {f"bank.{name}" for name in PER_GUIDE}
        assert "bank.images" not in same and len(other["bank.groups"].unique()) == 3
    assert not torch.equal(logits(model), logits(output))
    names = b"".join(path.read_bytes() for path in output.rglob("*.pth"))
    assert not any(f"phantom_00{n}".encode() in names for n in range(6))


def test_the_new_guides_are_nnunets_own_preprocessing_of_the_cases(model, given, tmp_path):
    for case in ("phantom_001", "phantom_002"):
        for file in [*given.glob(f"*/{case}*")]:
            file.unlink()
    assert bank(model, given, tmp_path / "out") == 0
    weights = read(tmp_path / "out" / "fold_0" / "checkpoint_final.pth")["network_weights"]
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(given / "labelsTr" / "phantom_000.nii.gz")))
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(given / "imagesTr" / "phantom_000_0000.nii.gz")))
    z_scored = (image - image.mean()) / image.std()
    found = 0
    for row, mask in enumerate(weights["bank.labels"].numpy()):
        stored = weights["bank.images"][row, 0].float() * weights["bank.scale"][row] + weights["bank.offset"][row]
        for z in range(len(label)):
            for y in range(label.shape[1] - 23):
                for x in range(label.shape[2] - 23):
                    if np.abs(z_scored[z, y : y + 24, x : x + 24] - stored.numpy()).mean() < 0.02:
                        found += np.array_equal(label[z, y : y + 24, x : x + 24], mask)
    assert found >= len(weights["bank.labels"]) > 0


def test_stripped_it_predicts_as_the_plain_export(model, tmp_path):
    assert main(["bank", str(model), "--strip", "-o", str(tmp_path / "stripped")]) == 0
    assert main(["export", str(model), str(tmp_path / "plain")]) == 0
    assert torch.equal(logits(tmp_path / "stripped"), logits(tmp_path / "plain"))
    assert not torch.equal(logits(model), logits(tmp_path / "plain"))


def spoil(given: Path, how: str) -> None:
    first = given / "labelsTr" / "phantom_000.nii.gz"
    image = given / "imagesTr" / "phantom_000_0000.nii.gz"
    if how == "empty":
        for file in given.glob("*/*"):
            file.unlink()
    elif how == "channels":
        shutil.copy(image, image.with_name("phantom_000_0001.nii.gz"))
    elif how == "no label":
        first.unlink()
    elif how == "no image":
        image.unlink()
    else:
        for file in (given / "labelsTr").iterdir():
            picture = sitk.ReadImage(str(file))
            array = sitk.GetArrayFromImage(picture)
            array[...] = 0 if how == "background" else np.where(array == 2, 9, array)
            changed = sitk.GetImageFromArray(array[:-1] if how == "grid" else array)
            changed.SetSpacing(picture.GetSpacing())
            sitk.WriteImage(changed, str(file))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty", "hold no file that ends in .nii.gz, as the model's images do"),
        ("channels", "case phantom_000 has 2 channels, and the model wants"),
        ("no label", "case phantom_000 has an image and no label"),
        ("no image", "case phantom_000 has a label and no image"),
        ("background", "no label of phantom_000, .* has a foreground voxel"),
        ("values", "phantom_000.nii.gz holds the label values 9, which the model does not know .it knows 0, 1, 2"),
        ("grid", "case phantom_000: the label has .* voxels, the image .* give the label of this image"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, given, tmp_path, capsys, how, words):
    spoil(given, how)
    before = sorted(tmp_path.iterdir())
    assert bank(model, given, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(words, line), line
    assert sorted(tmp_path.iterdir()) == before


def test_a_structure_that_no_label_has_is_pointed_out(model, given, tmp_path, capsys):
    assert bank(model, given, tmp_path / "all") == 0
    assert "WARNING" not in capsys.readouterr().out
    for file in (given / "labelsTr").iterdir():
        picture = sitk.ReadImage(str(file))
        sitk.WriteImage(sitk.ChangeLabel(picture, {2: 0}), str(file))
    assert bank(model, given, tmp_path / "one") == 0
    assert "WARNING: no label has organ_2: no guide shows it" in capsys.readouterr().out


def test_a_case_whose_subject_is_to_be_predicted_is_refused(model, given, tmp_path, capsys):
    queries = tmp_path / "queries"
    queries.mkdir()
    image = given / "imagesTr" / "phantom_001_0000.nii.gz"
    shutil.copy(image, queries / "another_0000.nii.gz")
    assert bank(model, given, tmp_path / "one", "--queries", str(queries)) == 0
    shutil.copy(image, queries)
    assert bank(model, given, tmp_path / "two", "--queries", str(queries)) == 2
    assert "case phantom_001 would guide and is of the same subject as phantom_001" in capsys.readouterr().err
    # and other cases of its subject, as the model's group_regex says
    plans = json.loads((model / "plans.json").read_text())
    plans["nnunetv2_ext"]["group_regex"] = r"(phantom_00)."
    (model / "plans.json").write_text(json.dumps(plans))
    (queries / image.name).rename(queries / "phantom_009_0000.nii.gz")
    assert bank(model, given, tmp_path / "three", "--queries", str(queries)) == 2
    assert "would guide and is of the same subject as phantom_009" in capsys.readouterr().err
    assert not (tmp_path / "two").exists() and not (tmp_path / "three").exists()


def test_what_is_no_jras_model_or_no_request_is_refused(model, given, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["bank", *arguments]) == 2
        return capsys.readouterr().err

    output = ["-o", str(tmp_path / "out")]
    assert "--images and --labels, or --strip" in refused(str(model), *output)
    assert "--images and --labels, or --strip" in refused(str(model), *output, "--strip", "-i", str(given))
    assert "is not a trained model" in refused(str(tmp_path), *output, "-i", str(given), "-l", str(given))
    (tmp_path / "there").mkdir()
    assert bank(model, given, tmp_path / "there") == 2 and "exists; name a folder" in capsys.readouterr().err
    plans = json.loads((model / "plans.json").read_text())
    del plans["nnunetv2_ext"]["jras"]
    (model / "plans.json").write_text(json.dumps(plans))
    assert bank(model, given, tmp_path / "out") == 2 and "not trained with J-RAS" in capsys.readouterr().err
    assert "not trained with J-RAS" in refused(str(model), *output, "--strip")


def test_the_example_scores_no_case_of_a_patient_in_the_new_bank(model, site, capsys, monkeypatch):
    file = Path(__file__).parents[2] / "examples" / "guides_at_test.py"
    spec = importlib.util.spec_from_file_location("guides_at_test", file)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    names = ["p1_a", "p1_b", "p2_a", "p3_a"]
    assert example.others_of(names, ["p1_a"], r"^(p\d)_") == ["p2_a", "p3_a"]
    assert example.others_of(names, ["p1_a"], None) == names[1:]

    arguments = [str(model), "-f", "0", "--site", str(site), "--bank-cases", "1", "--no-mirroring"]
    monkeypatch.setattr(sys, "argv", ["guides_at_test.py", *arguments])
    example.main()
    own, other = capsys.readouterr().out.split("other site, ")
    rows = ["as trained", "wrong masks", "any guides", "no guides"]
    assert all(row in own and row in other for row in rows)
    assert other.startswith("2 cases") and "new bank, wrong masks" in other and "new bank" not in own
