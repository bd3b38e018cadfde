"""``nnUNetv2_ext advise`` on datasets of different kinds, with answers that were worked out by hand."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.advice.report import all_advice, as_text
from nnunetv2_ext.cli import main
from nnunetv2_ext.core.outside import Advice, Method
from nnunetv2_ext.data.facts import DatasetFacts, LabelFacts, label_facts, look_at
from nnunetv2_ext.data.pool import Pool, PoolCase
from tests.conftest import TinyDataset
from tests.test_documents import ParsedError, typed_commands

SHAPE = (12, 16, 20)
IGNORE = 2


def organ(value: int = 1) -> np.ndarray:
    """(Z, Y, X): a box that is off the middle."""
    label = np.zeros(SHAPE, np.uint8)
    label[3:8, 2:9, 4:8] = value
    return label


def planes() -> np.ndarray:
    """One slice along each axis, all else ignored."""
    label = np.full(SHAPE, IGNORE, np.uint8)
    label[5], label[:, 6], label[:, :, 6] = organ()[5], organ()[:, 6], organ()[:, :, 6]
    return label


def scribbles() -> np.ndarray:
    label = np.full(SHAPE, IGNORE, np.uint8)
    label[5, 3:8, 5], label[7, 12, 3:15] = 1, 0
    return label


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders, empty."""
    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    return tmp_path


@pytest.fixture
def write(folders: Path) -> Callable[..., Path]:
    """``write({case: label or None}, spacing=(x, y, z), test=, **dataset_json)`` makes Dataset007_x."""

    def make(
        maps: dict[str, np.ndarray | None],
        /,
        spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        test: int = 0,
        ending: str = ".nii.gz",
        **content: Any,
    ) -> Path:
        folder = folders / "raw" / "Dataset007_x"
        for sub in ("imagesTr", "labelsTr", "imagesTs"):
            (folder / sub).mkdir(parents=True)
        image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
        for case, label in maps.items():
            _save(image, spacing, folder / f"imagesTr/{case}_0000{ending}")
            if label is not None:
                _save(label, spacing, folder / f"labelsTr/{case}{ending}")
        for n in range(test):
            _save(image, spacing, folder / f"imagesTs/t{n}_0000{ending}")
        basic = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "organ": 1}}
        basic |= {"numTraining": len(maps), "file_ending": ending}
        (folder / "dataset.json").write_text(json.dumps(basic | content))
        return folder

    return make


def _save(array: np.ndarray, spacing: tuple[float, ...], file: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


def cases(number: int, label: np.ndarray) -> dict[str, np.ndarray | None]:
    """heart_a, heart_b, ...: names without pairs."""
    return {f"heart_{'abcdefgh'[n]}": label for n in range(number)}


SPARSE = {"labels": {"background": 0, "organ": 1, "ignore": IGNORE}}


def said(**how: Any) -> list[Advice]:
    return [advice for _, advice in all_advice(look_at(7, **how))]


def kinds() -> list[tuple[str, str]]:
    return [(advice.kind, advice.run) for advice in said()]


PLAIN = ("run", "plain nnU-Net, used well: the baseline to beat")
NO_JRAS = ("skip", "nnUNetTrainerJRAS")
NO_MEDCONTEXT = ("skip", "nnUNetTrainerMedContext for the sake of few labelled cases")


# ---- what is seen


@pytest.mark.parametrize(
    ("label", "pattern", "slices"),
    [
        (organ(), "dense", SHAPE),
        (planes(), "slices", (1, 1, 1)),
        (scribbles(), "scattered", (0, 0, 0)),
        (np.full(SHAPE, IGNORE, np.uint8), "none", (0, 0, 0)),
    ],
)
def test_how_a_label_map_is_annotated(label: np.ndarray, pattern: str, slices: tuple[int, ...]) -> None:
    found = label_facts(label, (1.0, 1.0, 1.0), IGNORE)
    assert (found.pattern, found.slices) == (pattern, slices)
    assert found.annotated == pytest.approx((label != IGNORE).mean())


def test_slices_with_many_scribbles_beside_them_are_scattered() -> None:
    label = planes()
    label[8:11, 8:14, 8:18][::2] = 0  # 120 voxels on no slice, more than a tenth of all
    assert label_facts(label, (1.0, 1.0, 1.0), IGNORE).pattern == "scattered"


def test_half_of_the_slices_of_one_axis_are_not_a_few() -> None:
    label = organ()
    label[::2] = IGNORE
    assert label_facts(label, (1.0, 1.0, 1.0), IGNORE).pattern == "slices"
    label[1] = IGNORE
    assert label_facts(label, (1.0, 1.0, 1.0), IGNORE).pattern == "slices"
    label[:7] = organ()[:7]
    assert label_facts(label, (1.0, 1.0, 1.0), IGNORE).pattern == "scattered"


def test_as_many_label_maps_are_read_as_asked_for(write) -> None:
    write(cases(8, organ()))
    assert list(look_at(7, cases=3).read) == ["heart_a", "heart_e", "heart_h"]
    assert len(look_at(7, cases=0).read) == 8 and len(look_at(7).cases) == 8


# ---- what is advised


def test_complete_labels(write) -> None:
    write(cases(6, organ()))
    assert kinds() == [PLAIN, NO_JRAS, NO_MEDCONTEXT]
    [plain, *_] = said()
    assert plain.commands == (
        "nnUNetv2_plan_and_preprocess -d 7 -c 3d_fullres -pl nnUNetPlannerResEncL",
        "for f in 0 1 2 3 4; do nnUNetv2_train 7 3d_fullres $f -p nnUNetResEncUNetLPlans --npz; done",
        "nnUNetv2_find_best_configuration 7 -c 3d_fullres -p nnUNetResEncUNetLPlans",
    )


def test_too_few_cases_for_five_folds(write) -> None:
    write(cases(4, organ()))
    plain = said()[0]
    assert plain.commands[1:] == ("nnUNetv2_train 7 3d_fullres all -p nnUNetResEncUNetLPlans --npz",)
    assert "4 cases make no five folds" in plain.reason


def test_a_few_slices_a_volume(write) -> None:
    write(cases(5, planes()) | {"liver_a": np.full(SHAPE, IGNORE, np.uint8)}, **SPARSE)
    facts = look_at(7)
    assert (facts.pattern, facts.unlabelled) == ("slices", 1)
    assert kinds() == [PLAIN, ("run", "nnUNetTrainerRADA, from a few annotated slices"), NO_JRAS, NO_MEDCONTEXT]
    rada = said()[1]
    assert "plain nnU-Net on the same slices" in rada.control and "dense labels" in rada.not_when
    assert "5 of" not in as_text(facts, []) and "1 of them without any annotation" in as_text(facts, [])


def test_scattered_annotations(write) -> None:
    write(cases(5, scribbles()), **SPARSE)
    [reason] = [advice.reason for advice in said() if advice.run == "nnUNetTrainerRADA"]
    assert "no whole slices" in reason
    assert "its losses leave the ignore label out" in said()[0].reason


def test_an_ignore_label_that_hides_everything(write) -> None:
    write(cases(5, np.full(SHAPE, IGNORE, np.uint8)), **SPARSE)
    assert kinds()[0] == ("fix", "annotate some voxels")


@pytest.mark.parametrize("configuration", ["2d", "3d_cascade_fullres"])
def test_slices_of_a_configuration_that_the_method_refuses(write, configuration: str) -> None:
    write(cases(5, planes()), **SPARSE)
    [advice] = [advice for advice in said(configuration=configuration) if advice.run.startswith("nnUNetTrainerRADA")]
    assert advice.kind == "skip" and ("2-D" if configuration == "2d" else "cascade") in advice.reason


def test_ct_with_an_ignore_label(write) -> None:
    write(cases(5, planes()), **SPARSE, channel_names={"0": "CT"})
    fix = said()[0]
    assert fix.kind == "fix" and "nnUNetv2_ext fix-fingerprint -d 7" in fix.commands


def test_unlabelled_images_beside_complete_labels(write) -> None:
    write(cases(5, organ()), test=3)
    assert look_at(7).test_cases == 3
    assert ("skip", "nnUNetTrainerRADA for the sake of unlabelled images") in kinds()


def test_sides_by_name_and_by_shape(write) -> None:
    label = organ(1)
    label[np.flip(label, 2) == 1] = 2
    write(cases(5, label), labels={"background": 0, "kidney_left": 1, "kidney_right": 2})
    [advice] = [advice for advice in said() if advice.run == "training without mirroring"]
    assert advice.reason.startswith("kidney_left and kidney_right mirror into each other (axis 2, Dice 1.00)")
    assert advice.commands == (
        'nnUNet_ext_settings="mirroring=false" nnUNetv2_train 7 3d_fullres 0 -p nnUNetResEncUNetLPlans '
        "-tr nnUNetTrainerExt",
    )
    assert "0.67 against 0.87" in advice.reason and "800 steps" in advice.reason


def test_thick_slices(write) -> None:
    write(cases(5, organ()), spacing=(0.5, 0.5, 2.0))
    [advice] = [advice for advice in said() if "2d" in advice.run]
    assert "4.0 times" in advice.reason and "above nnU-Net's threshold of 3" in advice.reason
    assert advice.commands[1].startswith("for f in 0 1 2 3 4; do nnUNetv2_train 7 2d $f")


def test_photographs(write) -> None:
    folder = write({})
    rgb = np.random.default_rng(0).integers(0, 255, (16, 20, 3)).astype(np.uint8)
    for n in range(5):
        sitk.WriteImage(sitk.GetImageFromArray(rgb, isVector=True), str(folder / f"imagesTr/p{n}_0000.png"))
        sitk.WriteImage(sitk.GetImageFromArray(organ()[5]), str(folder / f"labelsTr/p{n}.png"))
    content = json.loads((folder / "dataset.json").read_text())
    content |= {"file_ending": ".png", "numTraining": 5, "channel_names": {"0": "R", "1": "G", "2": "B"}}
    (folder / "dataset.json").write_text(json.dumps(content))
    facts = look_at(7)
    assert facts.is_2d and facts.configuration == "2d" and facts.anisotropy == 1
    assert kinds()[0] == ("fix", "name the colour channels rgb_to_0_1 in dataset.json, then plan again")
    content["channel_names"] = dict.fromkeys("012", "rgb_to_0_1")
    (folder / "dataset.json").write_text(json.dumps(content))
    assert kinds()[0] == PLAIN


def test_few_photographs_get_a_pretrained_encoder_and_many_do_not() -> None:
    from dataclasses import replace

    from nnunetv2_ext.photo.advice import advice

    label = LabelFacts((1, 64, 64), (1.0, 1.0, 1.0), (0, 1), 1.0, (1, 64, 64), "dense")
    few = DatasetFacts(
        "Dataset050_polyps", "2d", {"polyp": (1,)}, None, ("rgb_to_0_1",) * 3, tuple("abcd"),
        dict.fromkeys("abcd", label),
        (), 0, None, None, (), (), None, (), (),
    )  # fmt: skip
    (found,) = advice(few)
    assert found.kind == "run" and "nnUNetv2_train 50 2d 0 -tr nnUNetTrainerPhoto" in found.commands[1]
    assert "optimizer=adamw" in found.control and "weights" in found.not_when
    volume = label._replace(shape=(9, 64, 64))
    for other in (
        replace(few, cases=tuple(f"c{n}" for n in range(500))),
        replace(few, channels=("T1",)),
        replace(few, read=dict.fromkeys("abcd", volume)),
    ):
        assert advice(other) == []


def test_another_contrast_is_spoken_of_where_unlabelled_scans_wait(write) -> None:
    write(cases(6, organ()), test=2)
    (found,) = [advice for advice in said() if "nnUNetTrainerGIN" in advice.run]
    assert "2 images of imagesTs" in found.run and "augmentation=da5" in found.control
    assert "own site" in found.control and "new one" in found.control


@pytest.mark.parametrize(("test", "channel"), [(0, "T1"), (2, "CT")])
def test_no_random_contrast_for_ct_or_without_new_scans(write, test: int, channel: str) -> None:
    write(cases(6, organ()), test=test, channel_names={"0": channel})
    assert not [advice for advice in said() if "GIN" in advice.run]


def test_names_that_look_like_pairs(write, folders: Path) -> None:
    names = [f"sub-{n}Ses{s}" for n in range(1, 6) for s in (1, 2)]
    write(dict.fromkeys(names, organ()))
    advice = said()[0]
    assert advice.kind == "fix" and "would make 5 subjects of 10 cases" in advice.run
    assert "group_regex=" in advice.commands[-1] and "splits_final" not in " ".join(advice.commands)
    base = folders / "preprocessed" / "Dataset007_x"
    base.mkdir()
    (base / "splits_final.json").write_text(json.dumps([{"train": names[1:], "val": names[:1]}]))
    assert said()[0].commands[0] == "rm $nnUNet_preprocessed/Dataset007_x/splits_final.json"
    (base / "splits_final.json").write_text(json.dumps([{"train": names[2:], "val": names[:2]}]))
    assert kinds()[0] == PLAIN  # the split keeps them whole


def test_recorded_subjects(write) -> None:
    record = {"nnunetv2_ext": {"subjects": {f"heart_{c}": f"p{i // 2}" for i, c in enumerate("abcdef")}}}
    write(cases(6, organ()), **record)
    assert look_at(7).number_of_subjects == 3
    assert "3 subjects make no five folds" in said()[0].reason


def test_what_is_trained_already(write, folders: Path) -> None:
    write(cases(6, organ()))
    model = folders / "results" / "Dataset007_x" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for fold in (0, 1, 2):
        (model / f"fold_{fold}").mkdir(parents=True)
        (model / f"fold_{fold}" / f"checkpoint_{'latest' if fold == 2 else 'final'}.pth").touch()
    plain = said()[0]
    assert plain.run == "finish the folds of plain nnU-Net"
    assert plain.commands == (
        "nnUNetv2_train 7 3d_fullres 2 -p nnUNetPlans --npz --c",
        "for f in 3 4; do nnUNetv2_train 7 3d_fullres $f -p nnUNetPlans --npz; done",
    )
    assert "finished: 0 1; unfinished: 2" in as_text(look_at(7), [])
    for fold in range(5):
        (model / f"fold_{fold}").mkdir(exist_ok=True)
        (model / f"fold_{fold}" / "checkpoint_final.pth").touch()
    assert said()[0].run == "keep the plain nnU-Net that is trained"


def test_what_is_planned(tiny: TinyDataset, monkeypatch) -> None:
    for key, value in tiny.environment(tiny.root / "results").items():
        monkeypatch.setenv(key, value)
    facts = look_at(tiny.dataset_id)
    plans = facts.plans
    assert plans is not None and plans.name == "nnUNetPlans" and plans.preprocessed
    assert len(facts.split) == 2 and facts.test_cases == 2
    [plain] = [advice for _, advice in all_advice(facts) if advice.run == PLAIN[1]]
    assert "for f in 0 1; do" in plain.commands[1]  # the folds that the split has
    small = look_at(tiny.dataset_id, "2d", "tiny").plans
    assert small is not None and list(small.patch) == tiny.plans()["configurations"]["2d"]["patch_size"]
    with pytest.raises(ValueError, match=r"has no configuration '3d_lowres': -c takes 2d, 3d_fullres"):
        look_at(tiny.dataset_id, "3d_lowres")
    with pytest.raises(ValueError, match=r"there are no plans other in .* \(-p takes .*nnUNetPlans, tiny\)"):
        look_at(tiny.dataset_id, None, "other")


def test_a_patch_that_sees_too_little(write, folders: Path, tiny: TinyDataset) -> None:
    write(cases(5, organ()))
    base = folders / "preprocessed" / "Dataset007_x"
    base.mkdir()
    plans = json.loads((tiny.preprocessed / tiny.name / "nnUNetPlans.json").read_text())
    known = plans["configurations"]
    full = known["3d_fullres"]
    full |= {"patch_size": [16, 16, 16], "median_image_size_in_voxels": [32.0, 32.0, 16.0]}
    known["3d_lowres"] = full | {"data_identifier": "low", "next_stage": "3d_cascade_fullres"}
    known["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    [advice] = [advice for advice in said() if "3d_lowres" in advice.run]
    assert "sees 25% of the median image" in advice.reason and len(advice.commands) == 4


# ---- what is wrong with the dataset


def test_a_pool_names_its_control_first_and_says_that_nothing_is_known(write, folders: Path, tiny: TinyDataset) -> None:
    write(cases(5, organ()))
    base = folders / "preprocessed" / "Dataset007_x"
    base.mkdir()
    (base / "nnUNetPlans.json").write_text(json.dumps(tiny.plans() | {"plans_name": "nnUNetPlans"}))
    assert not {"pseudo_label", "wtbcp"} & {source for source, _ in all_advice(look_at(7))}
    folder = base / "nnunetv2_ext" / "unlabelled" / tiny.plans()["configurations"]["3d_fullres"]["data_identifier"]
    folder.mkdir(parents=True)
    Pool(folder, "key", "3d_fullres", {case: PoolCase(("a",), ("b",), (1, 1, 1)) for case in "pqr"}).write()
    facts = look_at(7)
    found = {source: advice for source, advice in all_advice(facts) if source in ("pseudo_label", "wtbcp")}
    assert "3 in the pool" in as_text(facts, [])
    first, trainer = found["pseudo_label"], found["wtbcp"]
    assert first.kind == "run" and "the pool's 3 scans" in first.run and "which is nothing" in first.reason
    assert not first.commands and "needs a finished fold" in first.reason and "twice the steps" in first.control
    assert trainer.kind == "skip" and "no mode is known to win" in trainer.reason

    (folders / "raw" / "Dataset107_taken").mkdir()
    fold = folders / "results" / "Dataset007_x" / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_2"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()
    [first] = [advice for source, advice in all_advice(look_at(7)) if source == "pseudo_label"]
    assert first.commands[0].startswith(
        "nnUNetv2_ext pseudo-label -d 7 -m $nnUNet_results/Dataset007_x/nnUNetTrainer__"
    )
    assert first.commands[0].endswith(" -o 108 -f 2") and first.commands[2].startswith(
        "nnUNetv2_train 108 3d_fullres 2"
    )
    assert not [advice for source, advice in all_advice(look_at(7, "2d")) if source == "pseudo_label"]


def test_many_cases_without_any_annotation_could_be_a_pool(write) -> None:
    write(cases(3, organ()) | {f"liver_{n}": np.full(SHAPE, IGNORE, np.uint8) for n in range(3)}, **SPARSE)
    [advice] = [advice for source, advice in all_advice(look_at(7)) if source == "pseudo_label"]
    assert advice.kind == "run" and advice.reason.startswith("3 of 6 label maps teach plain nnU-Net nothing")
    assert advice.commands == ("nnUNetv2_ext unlabelled -d 7 -c 3d_fullres -p nnUNetPlans -i FOLDER",)
    assert "not measured at convergence" in advice.reason and "RADA" in advice.not_when


def test_holes_in_the_labels_and_other_problems_come_first(write) -> None:
    folder = write(cases(5, organ()), labels={"background": 0, "organ": 1, "tumour": 3}, numTraining=4)
    (folder / "imagesTr/heart_b_0000.nii.gz").unlink()
    assert [advice.run.partition(",")[0] for advice in said() if advice.kind == "fix"] == [
        "the labels of Dataset007_x are 0",
        "case heart_b of Dataset007_x has a label",
        "take tumour out of dataset.json",
    ]
    assert "consecutive integers from 0: renumber them to 0 ... 2" in said()[0].run


def test_many_problems_are_counted(write) -> None:
    folder = write(cases(8, organ()), numTraining=9)
    for case in "abcdef":
        (folder / f"imagesTr/heart_{case}_0000.nii.gz").unlink()
    fixes = [advice.run for advice in said() if advice.kind == "fix"]
    assert len(fixes) == 4 and fixes[-1] == "and 4 more of this kind"  # six labels, and numTraining


def test_channel_names_of_another_form(write) -> None:
    write(cases(5, organ()), channel_names=["T1"])
    assert look_at(7).channels == () and 'has no "channel_names"' in said()[0].run


def test_images_without_a_label(write) -> None:
    write(cases(5, organ()) | {"liver_a": None, "liver_b": None})
    [fix] = [advice for advice in said() if advice.kind == "fix"]
    assert fix.run.startswith("move 2 cases without a label (e.g. liver_a) from imagesTr to imagesTs")


def test_the_remedy_for_images_without_a_label_passes(write) -> None:
    folder = write(cases(5, organ()) | {"liver_a": None})
    shutil.move(folder / "imagesTr/liver_a_0000.nii.gz", folder / "imagesTs/liver_a_0000.nii.gz")
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 5}))
    assert [advice for advice in said() if advice.kind == "fix"] == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "labelsTr/heart_c.nii.gz").write_bytes(b"x"),
            r"case heart_c: the label \S*heart_c.nii.gz cannot",
        ),
        (lambda f: shutil.rmtree(f / "labelsTr"), "none of the 5 cases in imagesTr of Dataset007_x has a label"),
        (lambda f: shutil.rmtree(f / "imagesTr"), "is not a complete raw dataset"),
        (lambda f: [p.unlink() for p in (f / "imagesTr").iterdir()], r"imagesTr has no image that ends in \.nii\.gz"),
        (lambda f: (f / "dataset.json").unlink(), "is not a complete raw dataset"),
        (lambda f: (f / "dataset.json").write_text('{"labels": ["a"], "file_ending": ".nii.gz"}'), "not names with"),
        (lambda f: _save(organ(9), (1, 1, 1), f / "labelsTr/heart_a.nii.gz"), r"heart_a: .* does not declare \(9\)"),
        (lambda f: _plans(f, "{"), "nnUNetPlans.json cannot be read as JSON"),
        (lambda f: _plans(f, '{"plans_name": "nnUNetPlans"}'), "does not hold nnU-Net's plans"),
        (lambda f: _plans(f, '{"plans_name": "p", "configurations": {"2d": {}}}'), "is damaged|are no plans"),
        (lambda f: _plans(f, "[1]", "splits_final"), "splits_final.json is not a list of folds"),
    ],
)
def test_a_bad_input_is_one_line(write, spoil: Callable[[Path], Any], message: str, capsys) -> None:
    spoil(write(cases(5, organ())))
    with pytest.raises(ValueError, match=message):
        look_at(7)
    assert main(["advise", "-d", "7"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nnUNetv2_ext advise: ") and error.count("\n") == 1


def _plans(raw: Path, text: str, name: str = "nnUNetPlans") -> None:
    base = raw.parents[1] / "preprocessed" / raw.name
    base.mkdir()
    (base / f"{name}.json").write_text(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "8"], r"there is no dataset 8 in .* \(it has Dataset007_x\); correct the id or name, or nnUNet_raw"),
        (["-d", "7", "-c", "3d_fulres"], r"no configuration '3d_fulres': -c takes 2d, 3d_fullres, 3d_lowres"),
        (["-d", "7", "-p", "nnUNetPlans"], r"no plans nnUNetPlans, because it was not planned: run nnUNetv2_plan"),
        (["-d", "7", "--cases", "-1"], "--cases is the number of label maps"),
    ],
)
def test_an_option_that_names_what_is_not_there(write, arguments: list[str], message: str, capsys) -> None:
    write(cases(5, organ()))
    assert main(["advise", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_no_raw_folder(monkeypatch, capsys) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert main(["advise", "-d", "7"]) == 2
    assert "nnUNet_raw is not set; export nnUNet_raw=FOLDER" in capsys.readouterr().err


# ---- how it is said


def test_the_keys_of_the_json(write, capsys) -> None:
    """Programs rely on them: keys may be added, none may go or change its type."""
    write(cases(5, planes()), **SPARSE)
    assert main(["advise", "-d", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: type(value).__name__ for key, value in found.items()} == {
        "nnunetv2_ext": "str", "dataset": "str", "configuration": "str", "facts": "dict", "advice": "list",
    }  # fmt: skip
    assert {key: type(value).__name__ for key, value in found["facts"].items()} == {
        "cases": "int", "labels_read": "int", "unlabelled_of_read": "int", "images_without_label": "int",
        "test_cases": "int", "subjects": "NoneType", "labels": "dict", "ignore": "int", "annotation": "str",
        "channels": "list", "shape": "list", "spacing": "list", "mirrored": "list", "plans": "NoneType",
        "folds": "NoneType", "trained": "list",
    }  # fmt: skip
    for advice in found["advice"]:
        assert {key: type(value).__name__ for key, value in advice.items()} == {
            "from": "str", "kind": "str", "run": "str", "reason": "str", "commands": "list", "control": "str",
            "not_when": "str",
        }  # fmt: skip
    assert {advice["from"] for advice in found["advice"]} == {"nnunetv2_ext", "rada", "medcontext", "jras"}


def finished(
    folders: Path, channels: dict[str, str], labels: dict[str, Any], configuration: str = "3d_fullres"
) -> Path:
    """A model of Dataset009_y as far as advice looks at one."""
    model = folders / "results" / "Dataset009_y" / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    (model / "fold_1").mkdir(parents=True)
    (model / "fold_1" / "checkpoint_final.pth").touch()
    (model / "dataset.json").write_text(json.dumps({"channel_names": channels, "labels": labels}))
    return model


LABELS = {"background": 0, "organ": 1}


def test_a_model_of_another_dataset_is_a_start_where_cases_are_few(write, folders) -> None:
    model = finished(folders, {"0": "T1"}, {"background": 0, "other": 1, "organ": 2})
    write(cases(5, organ()))
    [start] = [advice for advice in said() if "a start from the finished model" in advice.run]
    assert "Dataset009_y, which knows organ" in start.run and str(model) in start.commands[0]


@pytest.mark.parametrize(
    "other",
    [
        ({"0": "T2"}, LABELS),
        ({"0": "T1"}, {"background": 0, "tumour": 1}),
        ({"0": "T1"}, LABELS, "2d"),
        ({"0": "T1", "1": "T2"}, LABELS),
    ],
)
def test_a_model_of_other_images_or_structures_is_not(write, folders, other) -> None:
    finished(folders, *other)
    write(cases(5, organ()))
    assert not [advice for advice in said() if "start from" in advice.run or "PEMMA" in advice.run]


def test_many_cases_need_no_start(write, folders) -> None:
    finished(folders, {"0": "T1"}, LABELS)
    write({f"heart_{number}": organ() for number in range(21)})
    assert not [advice for advice in said() if "a start from" in advice.run]


@pytest.mark.parametrize(("labels", "is_advised"), [(LABELS, True), ({"background": 0, "other": 1}, False)])
def test_a_model_that_lacks_the_last_channel_gets_it(write, folders, labels, is_advised) -> None:
    model = finished(folders, {"0": "T1"}, labels)
    folder = write(cases(5, organ()), channel_names={"0": "T1", "1": "T2"})
    for file in sorted((folder / "imagesTr").iterdir()):
        shutil.copy(file, file.with_name(file.name.replace("_0000", "_0001")))
    found = [advice for advice in said() if "nnUNetTrainerPEMMA" in advice.run]
    assert bool(found) == is_advised
    if found:
        assert "without T2" in found[0].run and f"-base {model} -f 1" in found[0].commands[0]


DATASETS: dict[str, dict[str, Any]] = {
    "dense": {"maps": cases(6, organ())},
    "sparse CT": {"maps": cases(6, planes()), **SPARSE, "channel_names": {"0": "CT"}},
    "pairs": {"maps": dict.fromkeys(["p1_ses1", "p1_ses2", "p2_ses1", "p2_ses2", "p3_ses1", "p4_ses1"], organ())},
    "a start elsewhere": {"maps": cases(5, organ()), "elsewhere": ({"0": "T1"}, LABELS)},
    "a channel more": {
        "maps": cases(5, organ()),
        "channel_names": {"0": "T1", "1": "T2"},
        "elsewhere": ({"0": "T1"}, LABELS),
    },
    "without annotation": {
        "maps": cases(3, organ()) | {f"liver_{n}": np.full(SHAPE, IGNORE, np.uint8) for n in range(3)},
        **SPARSE,
    },
    "few, thick": {"maps": cases(2, organ()), "spacing": (1.0, 1.0, 9.0)},
}


@pytest.mark.parametrize("kind", DATASETS)
def test_every_advised_command_parses(write, folders, kind: str, monkeypatch) -> None:
    options = dict(DATASETS[kind])
    if model := options.pop("elsewhere", None):
        finished(folders, *model)
    write(options.pop("maps"), **options)
    commands = [command for advice in said() for command in advice.commands]
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(parser, args=None, namespace=None):
        raise ParsedError(parse(parser, args, namespace)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    programs = {entry.name: entry for entry in entry_points(group="console_scripts")}
    typed = typed_commands("\n".join(f"    {command}" for command in commands))
    assert len(typed) >= 2
    for words in typed:
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(ParsedError) as parsed:
            programs[words[0]].load()()
        assert parsed.value.args == ([],), words


def test_a_method_contributes_by_one_function(write, monkeypatch) -> None:
    def mine(facts: DatasetFacts) -> list[Advice]:
        return [Advice("fix", "water the plants", f"{facts.name} is dry")]

    module = type(sys)("mine_advice")
    module.mine = mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine_advice", module)
    method = Method("mine", "a method", advice="mine_advice:mine")
    monkeypatch.setattr("nnunetv2_ext.advice.report.methods", lambda: {"mine": method, "mute": Method("mute", "none")})
    write(cases(5, organ()))
    found = all_advice(look_at(7))
    assert found[0] == ("mine", Advice("fix", "water the plants", "Dataset007_x is dry"))
    assert [source for source, _ in found] == ["mine", "nnunetv2_ext"]


def test_the_text(write, capsys) -> None:
    write(cases(6, organ()))
    assert main(["advise", "-d", "Dataset007_x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Dataset007_x, 3d_fullres"
    assert lines[1] == "  cases         6 with a label; subjects are not recorded"
    assert lines.index("Run") < lines.index("Not worth running here")
    assert all(len(line) <= 110 for line in lines if not line.startswith("      "))


def test_a_structure_that_is_drawn_nowhere(write) -> None:
    both = {"background": 0, "organ": 1, "lesion": 2}
    write(cases(5, organ()), labels=both)
    [fix] = [advice for advice in said() if advice.kind == "fix"]
    assert fix.run.startswith("take lesion out of dataset.json") and "none of the 5 label maps" in fix.reason
    assert "--cases 0" not in fix.reason and "second site" in fix.not_when
    [fix] = [advice for advice in said(cases=2) if advice.kind == "fix"]
    assert "none of the 2 label maps" in fix.reason and "--cases 0 reads all" in fix.reason


def test_a_structure_that_one_case_has_is_drawn(write) -> None:
    regions = {"background": 0, "whole": [1, 2], "core": [2]}
    write(cases(5, organ()) | {"heart_z": organ(2)}, labels=regions, regions_class_order=[1, 2])
    assert [advice for advice in said() if advice.kind == "fix"] == []
