"""pseudo-label: a dataset that any trainer trains on, real labels untouched, doubt under ignore, leaks refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunetv2_ext.cli import main as ext_main
from nnunetv2_ext.data.fill_pool import fill_pool
from nnunetv2_ext.parts.prediction import FoldPredictor
from nnunetv2_ext.pseudo_label import labelling
from nnunetv2_ext.pseudo_label.verdict import agreement, confidence, judge, ranked
from tests.conftest import TinyDataset, in_this_process, make_tiny_dataset

CASES = [f"new_{number}" for number in range(4)]


def array_of(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclasses.dataclass
class World:
    dataset: TinyDataset
    model: Path  # two folds
    scans: Path
    fold_shift: float = 0.1  # by which the second fold's intensities differ

    @property
    def new(self) -> Path:
        return self.dataset.raw / "Dataset104_Phantom_pseudo"

    def run(self, *options: str) -> int:
        fixed = ["-d", str(self.dataset.dataset_id), "-m", str(self.model), "-device", "cpu"]
        return ext_main(["pseudo-label", *fixed, *(options if "-o" in options else ("-o", "104", *options))])


def untrained(make_trainer, dataset: TinyDataset, configuration: str, folds: int = 2) -> Path:
    """A model folder of plain nnUNetTrainer."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    for fold in range(folds):
        trainer = make_trainer(nnUNetTrainer, configuration=configuration, fold=fold, dataset=dataset)
        trainer.initialize()
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        model = Path(trainer.output_folder_base)
        for name, content in (("plans.json", trainer.plans_manager.plans), ("dataset.json", trainer.dataset_json)):
            (model / name).write_text(json.dumps(content))
    return model


@pytest.fixture
def world(tiny: TinyDataset, tmp_path: Path, make_trainer, monkeypatch: pytest.MonkeyPatch) -> World:
    """The tiny dataset with a pool of four scans; a model of two folds whose classes are ranges of intensities."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(tiny, name), tmp_path / name)
    own = TinyDataset(tmp_path, tiny.dataset_id, tiny.name)
    model = untrained(make_trainer, own, "2d")
    scans = tmp_path / "scans"
    scans.mkdir()
    images = sorted((own.raw / own.name / "imagesTs").glob("*_0000.nii.gz"))
    for number, case in enumerate(CASES):
        sitk.WriteImage(sitk.ReadImage(str(images[number % 2])) * (2.0 + number), str(scans / f"{case}_0000.nii.gz"))
    fill_pool(own.dataset_id, "2d", "tiny", scans, say=lambda line: None)
    found = World(own, model, scans)

    def logits(self: FoldPredictor, data: Any) -> Iterator[torch.Tensor]:
        x = torch.from_numpy(np.asarray(data, dtype=np.float32))[0]
        for fold in self.folds:
            shifted = x + found.fold_shift * int(fold)
            yield torch.stack([-8 * (shifted - centre) ** 2 for centre in (-0.65, 1.4, 0.0)])

    monkeypatch.setattr(FoldPredictor, "logits", logits)
    return found


def test_a_dataset_that_nnunet_trains_on(world: World, make_trainer, capsys) -> None:
    own = world.dataset
    before = contents(own.raw), contents(world.scans), contents(own.preprocessed / own.name / "nnUNetPlans_2d")
    assert world.run("--keep", "0.5") == 0
    said = capsys.readouterr().out
    assert "kept 2 of 4 cases of the pool" in said and "2 not among the best 50%" in said
    assert "judge on test cases, or label with -f N" in said

    # real cases, test cases and the scans are as they were; images of the pool are the scans themselves
    source, new = own.raw / own.name, world.new
    after = {k: v for k, v in contents(own.raw).items() if not k.startswith(new.name)}
    assert (after, contents(world.scans)) == before[:2]
    assert contents(own.preprocessed / own.name / "nnUNetPlans_2d") == before[2]
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        theirs = contents(new / folder)
        assert contents(source / folder).items() <= theirs.items()
    content = json.loads((new / "dataset.json").read_text())
    made = content["nnunetv2_ext"]["pseudo_label"]
    kept = sorted(made["cases"])
    assert len(kept) == 2 and sorted([*kept, *made["dropped"]]) == CASES and content["numTraining"] == 8
    assert {p.name for p in (new / "labelsTr").iterdir()} - {p.name for p in (source / "labelsTr").iterdir()} == {
        f"{case}.nii.gz" for case in kept
    }
    assert made["round"] == 1 and made["dataset"] == own.name and sorted(made["checkpoints"]) == ["0", "1"]
    assert (
        content["labels"]["ignore"] == 3
        and "2 of 8 cases have labels by a model" in content["nnunetv2_ext"]["notices"][0]
    )

    # the label is what nnU-Net would write of the mean logits, but where the folds disagree or are unsure
    predictor = FoldPredictor(world.model, [0, 1], "checkpoint_final.pth", "cpu")
    for case in kept:
        image = [world.scans / f"{case}_0000.nii.gz"]
        assert (new / "imagesTr" / image[0].name).read_bytes() == image[0].read_bytes()
        data, properties = predictor.preprocess(image)
        folds = list(predictor.logits(data))
        mean, probabilities = predictor.on_image((folds[0] + folds[1]) / 2, properties)
        differ = predictor.segmentation(folds[0], properties) != predictor.segmentation(folds[1], properties)
        label = array_of(new / "labelsTr" / f"{case}.nii.gz")
        unsure = probabilities.max(0) < 0.7
        assert np.array_equal(label == 3, differ | unsure) and differ.any() and (unsure & ~differ).any()
        assert np.array_equal(label[label != 3], mean[label != 3]) and {0, 1, 2, 3} == set(np.unique(label))
        assert made["cases"][case]["doubtful_voxels"] == (label == 3).sum()
    with (new / "pseudo_labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows if row["kept"] == "yes"] == [row["case"] for row in rows[:2]]
    assert [float(row["agreement"]) for row in rows] == sorted((float(row["agreement"]) for row in rows), reverse=True)
    assert (new / "pseudo_labels.png").stat().st_size > 20_000

    # plans, fingerprint and folds are the labelled dataset's, so that trainings can be compared
    base = own.preprocessed / new.name
    real = json.loads((own.preprocessed / own.name / "splits_final.json").read_text())
    folds = json.loads((base / "splits_final.json").read_text())
    assert [fold["val"] for fold in folds] == [fold["val"] for fold in real]
    assert [fold["train"] for fold in folds] == [sorted([*fold["train"], *kept]) for fold in real]
    plans = json.loads((base / "tiny.json").read_text())
    assert plans == {**own.plans(), "dataset_name": new.name}
    target = dataclasses.replace(own, dataset_id=104, name=new.name)
    with in_this_process(target) as (api, _):
        api.preprocess([104], "tiny", configurations=("2d",), num_processes=(1,))
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = make_trainer(nnUNetTrainer, configuration="2d", dataset=target)
    trainer.on_train_start()
    assert trainer.label_manager.ignore_label == 3 and trainer.label_manager.num_segmentation_heads == 3
    seen: set[str] = set()
    for _ in range(12):
        batch = next(trainer.dataloader_train)
        seen |= set(batch["keys"])
    assert seen & set(kept) and np.isfinite(trainer.train_step(batch)["loss"])


def test_one_fold_for_an_honest_validation_and_a_second_round(world: World, capsys) -> None:
    assert world.run("-f", "1", "--confidence", "0.9") == 0
    said = capsys.readouterr().out
    assert "fold 1 labelled: train fold 1 only" in said and "nnUNetv2_train 104 2d 1 -p tiny" in said
    block = json.loads((world.new / "dataset.json").read_text())["nnunetv2_ext"]
    assert block["pseudo_label"]["folds"] == ["1"] and "train fold 1 only" in block["notices"][1]
    # a model of the new dataset has trained on the pool's cases: round 2, and no other
    second = world.model.parents[1] / world.new.name / world.model.name
    shutil.copytree(world.model, second)
    shutil.copy(world.new / "dataset.json", second)
    shutil.copytree(world.model, first := world.model.with_name("nnUNetTrainer__tiny__3d_fullres"))
    shutil.rmtree(first)
    world.model = second
    assert world.run("-o", "105") == 2
    assert (
        "trained on the pool's cases with labels of round 1: give --round 2, or a model of" in capsys.readouterr().err
    )
    assert world.run("-o", "105", "--round", "3") == 2
    capsys.readouterr()
    assert world.run("-o", "105", "--round", "2") == 0
    again = json.loads((world.dataset.raw / "Dataset105_Phantom_pseudo2" / "dataset.json").read_text())
    made = again["nnunetv2_ext"]["pseudo_label"]
    assert made["round"] == 2 and made["dataset"] == world.dataset.name
    assert made["model"] == f"{world.new.name}/{world.model.name}"
    assert again["numTraining"] == 6 + len(made["cases"]), "real cases, and the pool's once"


def test_subjects_of_the_pool_stay_out_of_the_fold_that_validates_on_them(world: World) -> None:
    own = world.dataset
    first = json.loads((own.preprocessed / own.name / "splits_final.json").read_text())[0]["val"][0]
    names = [p.name.removesuffix(".nii.gz") for p in (own.raw / own.name / "labelsTr").iterdir()]
    names += [p.name.removesuffix("_0000.nii.gz") for p in (own.raw / own.name / "imagesTs").iterdir()]
    table = world.scans.with_name("subjects.json")
    table.write_text(json.dumps({n: n for n in [*names, *CASES]} | {"new_2": first}))
    fill_pool(own.dataset_id, "2d", "tiny", world.scans, table=table, say=lambda line: None)
    assert world.run("--keep", "1") == 0
    folds = json.loads((own.preprocessed / world.new.name / "splits_final.json").read_text())
    assert [set(CASES) - set(fold["train"]) for fold in folds] == [{"new_2"}, set()]
    recorded = json.loads((world.new / "dataset.json").read_text())["nnunetv2_ext"]["subjects"]
    assert recorded["new_2"] == first


def test_an_interrupted_run_goes_on_and_a_full_disk_leaves_no_half_dataset(world: World, monkeypatch, capsys) -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    judged: list[int] = []

    def stops(*arguments: Any) -> Any:
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(1)
        return judge(*arguments)

    monkeypatch.setattr(labelling, "judge", stops)
    with pytest.raises(KeyboardInterrupt):
        world.run()
    monkeypatch.setattr(labelling, "judge", lambda *arguments: judged.append(1) or judge(*arguments))

    def full(*_: Any) -> None:
        raise RuntimeError("itk::ERROR: file cannot be written")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(labelling, "atomic_write", no_space)
        patch.setattr(labelling, "judge", judge)
        assert world.run() == 2
    said = capsys.readouterr().err
    assert "case new_2: its label cannot be written to" in said and "which goes on" in said and said.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(SimpleITKIO, "write_seg", full)
        assert world.run() == 2
    said = capsys.readouterr().err
    assert "look at the free space there. Labels that were made stay" in said and said.count("\n") == 1
    assert len(judged) == 4 and not list(world.dataset.raw.glob("*104*")) and not list(world.dataset.raw.glob(".*"))
    assert not (world.dataset.preprocessed / world.new.name).exists()
    assert world.run() == 0 and len(judged) == 4, "labels were made once"
    # another threshold is another label, and a scan that changed has another one too
    assert world.run("-o", "105", "--confidence", "0.8") == 0 and len(judged) == 8


def test_regions_in_3d_with_an_ignore_label_of_their_own(make_trainer, tmp_path, monkeypatch) -> None:
    own = make_tiny_dataset(tmp_path, configurations=("3d_fullres",), regions=True, ignore=True, num_test=2)
    model = untrained(make_trainer, own, "3d_fullres")
    scans = tmp_path / "scans"
    scans.mkdir()
    for file in own.images_ts.glob("*_0000.nii.gz"):
        sitk.WriteImage(sitk.ReadImage(str(file)) * 2.0, str(scans / f"new_{file.name}"))
    fill_pool(own.dataset_id, "3d_fullres", "tiny", scans, say=lambda line: None)

    def logits(self: FoldPredictor, data: Any) -> Iterator[torch.Tensor]:
        x = torch.from_numpy(np.asarray(data, dtype=np.float32))[0]
        for fold in self.folds:  # whole: all that is bright; organ_2: the brighter part
            yield torch.stack([6 * (x + 0.1 * int(fold) - bound) for bound in (-0.3, 1.2)])

    monkeypatch.setattr(FoldPredictor, "logits", logits)
    arguments = ["-d", str(own.dataset_id), "-m", str(model), "-o", "104", "--keep", "1", "-device", "cpu"]
    assert ext_main(["pseudo-label", *arguments]) == 0
    new = own.raw / "Dataset104_Phantom_pseudo"
    content = json.loads((new / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "whole": [1, 2], "organ_2": [2], "ignore": 3}
    assert content["regions_class_order"] == [1, 2] and content["numTraining"] == 8
    for case in content["nnunetv2_ext"]["pseudo_label"]["cases"]:
        assert set(np.unique(array_of(new / "labelsTr" / f"{case}.nii.gz"))) == {0, 1, 2, 3}


def test_photographs(colours, make_trainer, tmp_path, monkeypatch) -> None:
    from PIL import Image

    fill_pool(3, "2d", "tiny", tmp_path / "new", say=lambda line: None)
    model = untrained(make_trainer, colours, "2d", folds=1)

    def logits(self: FoldPredictor, data: Any) -> Iterator[torch.Tensor]:
        x = torch.from_numpy(np.asarray(data, dtype=np.float32))[0]
        yield torch.stack([0 * x, 5 * (x - 0.5)])

    monkeypatch.setattr(FoldPredictor, "logits", logits)
    assert ext_main(["pseudo-label", "-d", "3", "-m", str(model), "-o", "104", "--keep", "1", "-device", "cpu"]) == 0
    new = tmp_path / "raw" / "Dataset104_Photo_pseudo"
    for case in "xy":
        assert (new / "imagesTr" / f"{case}_0000.png").is_file()
        label, red = (np.asarray(Image.open(new / f)) for f in (f"labelsTr/{case}.png", f"imagesTr/{case}_0000.png"))
        assert set(np.unique(label)) == {0, 1, 2} and label.shape == (40, 48)
        assert (label[red[..., 0] > 200] == 1).all() and (label[red[..., 0] < 50] == 0).all()


def gone(world: World) -> None:
    (world.scans / "new_1_0000.nii.gz").unlink()


def changed(world: World) -> None:
    file = world.scans / "new_1_0000.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(file)) * 2, str(file))


def labelled_by_now(world: World) -> None:
    folder = world.dataset.raw / world.dataset.name
    shutil.copy(world.scans / "new_1_0000.nii.gz", folder / "imagesTr")
    shutil.copy(next((folder / "labelsTr").iterdir()), folder / "labelsTr" / "new_1.nii.gz")


def no_pool(world: World) -> None:
    shutil.rmtree(world.dataset.preprocessed / world.dataset.name / "nnunetv2_ext")


def other_plans(world: World) -> None:
    plans = json.loads((world.model / "plans.json").read_text())
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1.0
    (world.model / "plans.json").write_text(json.dumps(plans))


def other_dataset(world: World) -> None:
    target = world.model.parents[1] / "Dataset009_Other" / world.model.name
    shutil.copytree(world.model, target)
    world.model = target


def other_labels(world: World) -> None:
    content = json.loads((world.model / "dataset.json").read_text())
    content["labels"]["tumour"] = 3
    (world.model / "dataset.json").write_text(json.dumps(content))


def saw_the_pool(world: World) -> None:
    file = world.model / "fold_1" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["nnunetv2_ext"] = {"methods": {"unlabelled": {"cases": ["new_1"]}}}
    torch.save(checkpoint, file)


def never_agree(world: World) -> None:
    world.fold_shift = 1.5


def damaged(world: World) -> None:
    next(world.dataset.preprocessed.rglob("cases/new_1.b2nd")).write_bytes(b"nothing")


def exists(world: World) -> None:
    (world.dataset.preprocessed / "Dataset104_Something").mkdir()


def unfinished(world: World) -> None:
    for fold in (0, 1):
        (world.model / f"fold_{fold}" / "checkpoint_final.pth").unlink()


def cascade(world: World) -> None:
    plans = json.loads((world.model / "plans.json").read_text())
    plans["configurations"]["2d"] |= {"previous_stage": "3d_fullres"}
    (world.model / "plans.json").write_text(json.dumps(plans))


BAD = {
    "an image is gone": (gone, (), "case new_1: the image .* is gone: put it back, or fill the pool anew"),
    "an image has changed": (changed, (), "new_1_0000.nii.gz has changed since the pool was filled: run"),
    "labelled by now": (labelled_by_now, (), "1 cases of the pool, such as new_1, are labelled or test cases"),
    "no pool": (no_pool, (), "has no unlabelled cases for 2d: run nnUNetv2_ext unlabelled -d 001 -c 2d -p tiny"),
    "other plans": (other_plans, (), "the pool .* was preprocessed with other plans"),
    "another dataset": (other_dataset, (), "was trained on Dataset009_Other, not on Dataset001_Phantom"),
    "other labels": (other_labels, (), "was trained with other labels than"),
    "it saw the pool": (saw_the_pool, (), "trained on 1 cases of the pool, such as new_1, without labels"),
    "folds never agree": (never_agree, (), r"agree on no case \(the best has 0\.\d\d\), and such labels would teach"),
    "a damaged case": (damaged, (), "case new_1 of the pool cannot be read"),
    "the target exists": (exists, (), "dataset id 104 is taken by Dataset104_Something .* choose another id with -o"),
    "no finished fold": (unfinished, (), "has no fold with checkpoint_final.pth: finish a training"),
    "a cascade": (cascade, (), "is the last stage of a cascade, which needs the previous stage's segmentations"),
    "no such fold": (None, ("-f", "4"), "checkpoint_final.pth does not exist"),
    "a fold twice": (None, ("-f", "0", "0"), "names a fold twice"),
    "round 2 of a plain model": (None, ("--round", "2"), "was trained on real labels only: give --round 1"),
    "round 0": (None, ("--round", "0"), "--round is 1 or more"),
    "no confidence": (None, ("--confidence", "1.2"), "--confidence lies above 0"),
    "nothing kept": (None, ("--keep", "0"), "--keep lies above 0"),
}


@pytest.mark.parametrize(("spoil", "options", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_no_dataset(world: World, spoil, options, words, capsys) -> None:
    import re

    if spoil:
        spoil(world)
    assert world.run(*options) == 2
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1, said
    assert not world.new.exists() and not (world.dataset.preprocessed / world.new.name).exists()


# ---- one case ------------------------------------------------------------------------------------------------------
def test_agreement_by_hand() -> None:
    label = np.zeros((1, 4, 4), int)
    label[0, :2] = 1  # 8 voxels
    half = np.zeros_like(label)
    half[0, 0] = 1  # 4 of them: Dice 2/3
    other = label.copy()
    other[0, 3, 3] = 2  # a structure that the ensemble lacks: Dice 0 where a fold found it
    one, two = {"one": 1}, {"one": 1, "two": 2}
    p = np.stack([label == 0, label == 1]).astype(float)
    assert agreement(label, [label, half], p, one, False) == pytest.approx((1 + 2 / 3) / 2)
    assert agreement(label, [label, other], p, two, False) == pytest.approx(0.5)
    assert math.isnan(agreement(np.zeros_like(label), [np.zeros_like(label)] * 2, p, two, False))
    # a single fold: soft Dice, 2 * 8 * 0.9 / (8 * 0.9 + 8 * 0.1 + 8)
    soft = np.where(label == 1, 0.9, 0.1)
    expected = 2 * 8 * 0.9 / (8 + 8)
    assert agreement(label, [], np.stack([1 - soft, soft]), one, False) == pytest.approx(expected)
    assert agreement(label, [], soft[None], {"whole": (1, 2)}, True) == pytest.approx(expected)
    assert math.isnan(agreement(np.zeros_like(label), [], np.stack([1 - soft, soft]), one, False))


def test_confidence_of_classes_and_of_regions() -> None:
    assert confidence(np.array([[0.2], [0.5], [0.3]]), False) == pytest.approx([0.5])
    assert confidence(np.array([[0.1], [0.6]]), True) == pytest.approx([0.6])  # surely outside of one, unsure of two


def test_cases_are_ranked_and_a_share_is_kept() -> None:
    found = ranked({"a": 0.7, "b": 0.9, "c": math.nan, "d": 0.49, "e": 0.9}, 0.4)
    assert [(one.case, one.why) for one in found] == [
        ("b", ""),
        ("e", ""),
        ("a", "not among the best 40%"),
        ("d", "agreement below 0.5"),
        ("c", "nothing found"),
    ]
    assert sum(not one.why for one in ranked(dict.fromkeys("abcdefghij", 0.8), 0.3)) == 3  # not 4 by rounding errors
    assert sum(not one.why for one in ranked(dict.fromkeys("abc", 0.8), 0.01)) == 1
