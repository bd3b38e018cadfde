"""fit and apply on small trained models: nnU-Net's bytes, corrupted cases, files, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits

from nnunetv2_ext.cli import main
from nnunetv2_ext.estimate.corruption import KINDS, KINDS_OF_CT, corrupt
from nnunetv2_ext.estimate.fit import FILE, Fitted
from nnunetv2_ext.estimate.mirroring import agreement_of_passes, open_predictor
from nnunetv2_ext.estimate.validation import only_where
from nnunetv2_ext.parts.prediction import FoldPredictor
from tests.conftest import TinyDataset, run_command
from tests.estimate.test_reverse import random_weights


def test_a_corrupted_copy_repeats_and_changes_the_image() -> None:
    image = np.random.default_rng(0).normal(size=(2, 12, 16, 20)).astype(np.float32)
    kinds = set()
    for is_ct, allowed in ((False, KINDS), (True, KINDS_OF_CT)):
        for n in range(40):
            found, kind = corrupt(image, f"case{n}", is_ct)
            assert np.array_equal(found, corrupt(image, f"case{n}", is_ct)[0]) and kind in allowed
            assert found.shape == image.shape and found.dtype == np.float32 and np.isfinite(found).all()
            assert not np.array_equal(found, image)
            kinds.add(kind)
    assert kinds == {*KINDS, *KINDS_OF_CT}
    assert np.isfinite(corrupt(np.zeros((1, 1, 8, 8), np.float32), "flat", False)[0]).all()


def test_voxels_without_truth_are_background_for_the_features() -> None:
    p = torch.full((2, 2, 2), 0.5)
    labelled = torch.tensor([[True, False], [True, True]])
    softmax, sigmoid = only_where(p, labelled, False), only_where(p, labelled, True)
    assert softmax[:, 0, 1].tolist() == [1, 0] and sigmoid[:, 0, 1].tolist() == [0, 0]
    assert torch.equal(softmax[:, labelled], p[:, labelled])


@pytest.fixture(scope="module")
def trained(tiny: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDataset, Path]:
    """Two folds of a plain nnU-Net, trained for a moment; the model folder."""
    results = tmp_path_factory.mktemp("estimate")
    for fold in ("0", "1"):
        environment = tiny.environment(
            results, "num_epochs=4 num_iterations_per_epoch=12 panel_every=0 seed=1 initial_lr=0.05"
        )
        command = ["nnUNetv2_train", str(tiny.dataset_id), "2d", fold, "-p", "tiny", "-tr", "nnUNetTrainerExt"]
        run_command([*command, "-device", "cpu"], environment, results)
    return tiny, results / tiny.name / "nnUNetTrainerExt__tiny__2d"


@pytest.fixture
def model(trained: tuple[TinyDataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model folder, and nnU-Net's variables; a split in which each fold validates on six cases."""
    tiny, folder = trained
    for key, value in tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)
    target = tmp_path / "results" / tiny.name / folder.name
    shutil.copytree(folder, target)
    preprocessed = tmp_path / "preprocessed"
    shutil.copytree(tiny.preprocessed, preprocessed, copy_function=shutil.copy)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    base = preprocessed / tiny.name
    cases = sorted(p.name.removesuffix(".nii.gz") for p in (base / "gt_segmentations").glob("*.nii.gz"))
    folds = [{"train": cases, "val": cases}, {"train": cases, "val": cases}]
    (base / "splits_final.json").write_text(json.dumps(folds))
    return target


@pytest.fixture
def images(tiny: TinyDataset) -> Path:
    return tiny.images_ts


def fit(model: Path, *options: str) -> int:
    return main(["estimate", "fit", str(model), "-device", "cpu", *options])


@pytest.mark.slow
def test_two_commands_give_a_list_that_is_worst_first(model: Path, images: Path, tmp_path: Path, capsys) -> None:
    assert fit(model) == 0
    said = capsys.readouterr().out
    assert "an estimate, not a measurement" in said and "mean: MAE" in said
    assert (model / "estimate_fit.png").is_file() and not list(model.glob(".nnunetv2_ext_estimate*"))
    content = json.loads((model / FILE).read_text())
    assert set(content["sha256"]) == {"0", "1"} and content["structures"]
    assert (
        main(["estimate", "apply", str(model), "-i", str(images), "-o", str(tmp_path / "out"), "-device", "cpu"]) == 0
    )
    table = json.loads((tmp_path / "out" / "estimate.json").read_text())
    assert "ranking, not an estimate" in table["note"]
    known = [e["estimate"] for e in table["estimates"] if e["estimate"] is not None]
    assert known == sorted(known) and len(table["estimates"]) == 2 * len(content["structures"])
    text = (tmp_path / "out" / "estimate.md").read_text()
    assert "ranking, not an estimate" in text and "fine" not in text
    assert (tmp_path / "out" / "estimate.csv").read_text().startswith("# an estimate, not a measurement")
    # the segmentations are nnU-Net's, byte for byte
    run_command(
        ["nnUNetv2_predict_from_modelfolder", "-i", str(images), "-o", str(tmp_path / "stock"), "-m", str(model),
         "-f", "0", "1", "-device", "cpu", "-npp", "1", "-nps", "1"], {"OMP_NUM_THREADS": "1"}, tmp_path,
    )  # fmt: skip
    for file in (tmp_path / "stock").glob("*.nii.gz"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_an_interrupted_fit_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_ext.estimate import fit as module

    done: list[str] = []
    rows_of = module.rows_of

    def interrupted(case: str, *rest: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(case)
        return rows_of(case, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "rows_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(model)
    assert not (model / FILE).exists()
    seen: list[str] = []
    monkeypatch.setattr(module, "rows_of", lambda case, *rest: seen.append(case) or rows_of(case, *rest))
    assert fit(model) == 0
    whole = Fitted.load(model)
    assert len(seen) == 2 * len(set(seen) | set(done)) - 3
    (model / FILE).unlink()
    assert fit(model) == 0
    assert Fitted.load(model).calibration == whole.calibration


@pytest.mark.slow
def test_corrupted_scans_come_first(model: Path, images: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    rng = np.random.default_rng(0)
    for file in sorted(images.glob("*_0000.nii.gz")):
        shutil.copy(file, mixed / f"clean{file.name}")
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(image)
        bad = sitk.GetImageFromArray((array + 2 * array.std() * rng.normal(size=array.shape)).astype(np.float32))
        bad.CopyInformation(image)
        sitk.WriteImage(bad, str(mixed / f"bad{file.name}"))
    assert fit(model) == 0
    assert main(["estimate", "apply", str(model), "-i", str(mixed), "-o", str(tmp_path / "out"), "-device", "cpu"]) == 0
    table = json.loads((tmp_path / "out" / "estimate.json").read_text())["estimates"]
    mean = {
        kind: np.mean([e["estimate"] or 0 for e in table if e["case"].startswith(kind)]) for kind in ("bad", "clean")
    }
    assert mean["bad"] < mean["clean"]


@pytest.mark.slow
def test_local_labels_move_the_estimates(model: Path, images: Path, tmp_path: Path, capsys) -> None:
    few = tmp_path / "labels"
    few.mkdir()
    mine = tmp_path / "images"
    mine.mkdir()
    source = sorted(images.glob("*_0000.nii.gz"))[0]
    for n in range(4):
        shutil.copy(source, mine / f"x{n}_0000.nii.gz")
    assert fit(model) == 0
    run = ["estimate", "apply", str(model), "-i", str(mine), "-device", "cpu", "--local-labels", str(few)]
    assert main([*run, "-o", str(tmp_path / "a")]) == 2 and "at least 3" in capsys.readouterr().err
    assert main([*run[:-2], "-o", str(tmp_path / "plain")]) == 0
    for n in range(3):  # a perfect model: its own segmentations
        shutil.copy(tmp_path / "plain" / f"x{n}.nii.gz", few / f"x{n}.nii.gz")
    torch.save(random_weights(), tmp_path / "small.pt")
    assert main([*run, "-o", str(tmp_path / "local"), "--reverse", f"universeg:{tmp_path / 'small.pt'}"]) == 0
    assert "OpenRAIL" in capsys.readouterr().out
    scores = json.loads((tmp_path / "local" / "estimate.json").read_text())["reverse"]
    assert set(scores) == set(Fitted.load(model).structures)
    assert any(0 <= s["new"] <= 1 and s["home_dice"] is not None for s in scores.values() if s["new"] is not None)
    assert main([*run, "-o", str(tmp_path / "x"), "--reverse", "tiny-unet", "--npz", str(few)]) == 2
    assert "leave one of them away" in capsys.readouterr().err and not (tmp_path / "x").exists()
    tables = [json.loads((tmp_path / n / "estimate.json").read_text())["estimates"] for n in ("plain", "local")]
    before, after = ({(e["case"], e["structure"]): e["estimate"] for e in table} for table in tables)
    for key, value in before.items():
        if value is not None:
            assert after[key] == pytest.approx(min(1, value + 3 * (1 - value) / 4), abs=1e-6)
    assert "Corrected by labelled cases of this site" in (tmp_path / "local" / "estimate.md").read_text()


def _spoil(model: Path, how: str) -> list[str]:
    base = Path(str(model)).parents[2] / "preprocessed" / model.parent.name
    if how == "all":
        (model / "fold_0").rename(model / "fold_all")
        shutil.rmtree(model / "fold_1")
    elif how == "fold":
        return ["-f", "4"]
    elif how == "split":
        (base / "splits_final.json").unlink()
    elif how == "few":
        content = json.loads((base / "splits_final.json").read_text())
        (base / "splits_final.json").write_text(json.dumps([{**f, "val": f["val"][:2]} for f in content]))
    elif how == "truth":
        next((base / "gt_segmentations").glob("*.nii.gz")).unlink()
    elif how == "groups":
        (model / "g.csv").write_text("case,subject\nnobody,1\n")
        return ["--groups", str(model / "g.csv")]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("all", "only fold all"),
        ("fold", "fold_4"),
        ("split", "splits_final.json is missing"),
        ("few", "fewer than 6 validation cases"),
        ("truth", "the truth"),
        ("groups", "gives no subject for the case"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(model: Path, capsys, how: str, words: str) -> None:
    options = _spoil(model, how)
    assert fit(model, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said and not (model / FILE).exists()


@pytest.mark.slow
def test_a_fit_belongs_to_its_checkpoints(model: Path, images: Path, tmp_path: Path, capsys) -> None:
    apply = ["estimate", "apply", str(model), "-i", str(images), "-o", str(tmp_path / "out"), "-device", "cpu"]
    assert main(apply) == 2 and "estimate fit" in capsys.readouterr().err
    assert fit(model) == 0
    (tmp_path / "empty").mkdir()
    assert main([*apply[:4], str(tmp_path / "empty"), *apply[5:]]) == 2 and "holds no image" in capsys.readouterr().err
    assert main([*apply, "--threshold", "2"]) == 2
    with (model / "fold_1" / "checkpoint_final.pth").open("ab") as file:
        file.write(b"x")
    assert main(apply) == 2
    assert "is not the checkpoint of the fit" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_further_features_change_estimates_and_no_segmentation(model: Path, images: Path, tmp_path: Path) -> None:
    run = ["estimate", "apply", str(model), "-i", str(images), "-device", "cpu"]
    assert fit(model) == 0 and main([*run, "-o", str(tmp_path / "four")]) == 0
    plain = Fitted.load(model)
    assert fit(model, "--features", "+tta", "+ens") == 0 and main([*run, "-o", str(tmp_path / "six")]) == 0
    fitted = Fitted.load(model)
    assert fitted.optional == ["tta", "ens"] and fitted.calibration.line.names[-2:] == ["tta", "ens"]
    assert fitted.calibration.line.centre != plain.calibration.line.centre
    for file in sorted((tmp_path / "four").glob("*.nii.gz")):
        assert file.read_bytes() == (tmp_path / "six" / file.name).read_bytes()


@pytest.mark.slow
def test_mirrored_passes_are_counted_as_the_whole_volume_would(model: Path) -> None:
    stock, counting = (open_predictor(model, [0], "checkpoint_final.pth", "cpu", tta) for tta in (False, True))
    patch = counting.configuration.patch_size
    image = np.random.default_rng(0).normal(size=(1, 1, *patch)).astype(np.float32)  # one slice, one tile
    plain, same = (predictor.logits_of(0, image) for predictor in (stock, counting))
    assert agreement_of_passes(stock) is None and torch.equal(plain, same)
    found = agreement_of_passes(counting)
    counting.logits_of(0, image)
    assert agreement_of_passes(counting) == found  # an image's own, whatever was predicted before
    x, network = torch.from_numpy(image[:, 0])[None], counting.predictor.network
    flips = [(), (2,), (3,), (2, 3)]
    with torch.no_grad():
        passes = [torch.flip(network(torch.flip(x, f)), f)[0].argmax(0) for f in flips]
        mean = sum(torch.flip(network(torch.flip(x, f)), f) for f in flips)[0].argmax(0)  # type: ignore[index,union-attr]
    for value, ours in enumerate(found or [], 1):
        sizes = [int((p == value).sum() + (mean == value).sum()) for p in passes]
        both = [2 * int(((p == value) & (mean == value)).sum()) for p in passes]
        assert ours == pytest.approx(np.mean([b / max(s, 1) for b, s in zip(both, sizes)]), abs=0.02)


@pytest.mark.slow
def test_saved_probabilities_need_no_model_run(model: Path, images: Path, tmp_path: Path, capsys) -> None:
    assert fit(model, "--npz") == 2 and "--val --npz" in capsys.readouterr().err
    source = images.parent / "imagesTr"
    for fold in (0, 1):
        predict_and_save(model, fold, source, model / f"fold_{fold}" / "validation")
    predict_and_save(model, 0, images, tmp_path / "saved")
    assert fit(model, "--npz", "--features", "+tta") == 2 and "leave +tta" in capsys.readouterr().err
    assert fit(model, "--npz") == 0
    run = ["estimate", "apply", str(model), "-i", str(images), "-device", "cpu", "-o", str(tmp_path / "out")]
    assert main(run) == 2 and "with --npz" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoldPredictor, "logits_of", None)  # no model is run
        assert main([*run, "--npz", str(tmp_path / "saved")]) == 0
    for file in (tmp_path / "saved").glob("*.nii.gz"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert all(not r["corrupted"] for r in Fitted.load(model).calibration.rows)
    (tmp_path / "saved" / "plans.json").write_text("{}")
    run[-1] = str(tmp_path / "other")
    assert main([*run, "--npz", str(tmp_path / "saved")]) == 2 and "another model" in capsys.readouterr().err


def predict_and_save(model: Path, fold: int, images: Path, target: Path) -> None:
    """As ``nnUNetv2_predict --save_probabilities`` does."""
    predictor = FoldPredictor(model, [fold], "checkpoint_final.pth", "cpu")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(images.glob("*_0000.nii.gz")):
        data, properties = predictor.preprocess([file])
        name = str(target / file.name.removesuffix("_0000.nii.gz"))
        export_prediction_from_logits(
            predictor.logits_of(fold, data), properties, predictor.configuration, predictor.plans,
            predictor.dataset_json, name, save_probabilities=True,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nan", "NaN or infinite"),
        ("unknown case", "no image of that case"),
        ("unknown value", "holds the value 9"),
        ("shape", "has shape"),
        ("mirror", "mirrored along"),
        ("stage", "leave --previous-stage away"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, how: str, words: str
) -> None:
    assert fit(model, "--no-corrupted", "-f", "0") == 0
    mine, labels = tmp_path / "images", tmp_path / "labels"
    mine.mkdir(), labels.mkdir()
    first = sorted(images.glob("*_0000.nii.gz"))[0]
    image = sitk.ReadImage(str(first))
    for n in range(3):
        shutil.copy(first, mine / f"x{n}_0000.nii.gz")
        z, y, x = image.GetSize()[::-1]
        shape = (z, y, x + 1) if how == "shape" else (z, y, x)
        label = sitk.GetImageFromArray(np.full(shape, 9 if how == "unknown value" else 1, np.uint8))
        label.SetSpacing(image.GetSpacing())
        sitk.WriteImage(label, str(labels / f"{'y' if how == 'unknown case' else 'x'}{n}.nii.gz"))
    options = ["--local-labels", str(labels)]
    if how == "nan":  # SimpleITK reads NaN of NIfTI files as 0, other readers do not
        preprocess = FoldPredictor.preprocess

        def spoilt(self: FoldPredictor, *files: Any) -> Any:
            data, properties = preprocess(self, *files)
            data[0, 0, 0, 0] = np.nan
            return data, properties

        monkeypatch.setattr(FoldPredictor, "preprocess", spoilt)
    elif how == "mirror":
        content = json.loads((model / FILE).read_text())
        (model / FILE).write_text(json.dumps({**content, "mirrored": [0]}))
    elif how == "stage":
        options = ["--previous-stage", str(labels)]
    run = ["estimate", "apply", str(model), "-i", str(mine), "-o", str(tmp_path / "out"), "-device", "cpu"]
    assert main([*run, *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said and not (tmp_path / "out" / "estimate.md").exists()
