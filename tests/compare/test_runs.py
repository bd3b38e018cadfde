"""Finished folds only, of the same cases; repeats and their names."""

import json
import shutil
from pathlib import Path

import pytest

from nnunetv2_ext.compare import runs
from nnunetv2_ext.compare.arms import Arm, differing_facts, make_arm, predictions_arm, require_comparable
from nnunetv2_ext.data import find

ENDING = ".nii.gz"


def model_of(world, trainer="nnUNetTrainer", results="results") -> find.Model:
    return find.find_trainer(world.root / results, world.name, trainer, "nnUNetPlans", "3d_fullres")


def arm(world, trainer="nnUNetTrainer", folds=("0",), results=("results",), name=None) -> Arm:
    return make_arm(name or trainer, [(model_of(world, trainer, r), folds) for r in results], ENDING)


def test_a_finished_fold(world) -> None:
    world.train("nnUNetTrainerMedContext", settings={"seed": 3, "medcontext.beta": 1.0})
    run = runs.read_fold(model_of(world, "nnUNetTrainerMedContext"), "0", ENDING)
    assert run.cases == ("c0", "c1", "c2", "c3") and run.seed == 3 and run.steps == 10
    assert set(run.dice["c0"]) == {"1", "2"}


def without_final(fold: Path) -> None:
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")


def without_summary(fold: Path) -> None:
    (fold / "validation" / "summary.json").unlink()


def broken_summary(fold: Path) -> None:
    (fold / "validation" / "summary.json").write_text('{"metric')


def without_case(fold: Path) -> None:
    (fold / "validation" / "c1.nii.gz").unlink()


def without_predictions(fold: Path) -> None:
    for file in (fold / "validation").glob("*.nii.gz"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_final, r"fold_0 is not finished .*the log ends in epoch 2 of 2.*nnUNetv2_train .* 0 .*--c"),
        (without_summary, r"fold_0 is trained but not validated .*--val"),
        (broken_summary, r"summary.json cannot be read .*--val"),
        (without_case, r"validation: case c1 and summary.json do not agree.*--val"),
        (without_predictions, r"validation predictions, .*, has no file that ends in .nii.gz.*--val"),
    ],
)
def test_what_is_missing_is_named(damage, message: str, world) -> None:
    damage(world.train("nnUNetTrainer") / "fold_0")
    with pytest.raises(ValueError, match=message):
        runs.read_fold(model_of(world), "0", ENDING)


def test_a_missing_fold_names_those_there_are(world) -> None:
    world.train("nnUNetTrainer", folds=("0", "1"))
    with pytest.raises(ValueError, match=r"has no fold 3 \(it has 0, 1\)"):
        runs.read_fold(model_of(world), "3", ENDING)


def test_a_deleted_checkpoint_does_not_make_a_validated_fold_unfinished(world) -> None:
    model = world.train("nnUNetTrainer")
    (model / "fold_0" / "checkpoint_final.pth").unlink()
    assert runs.read_fold(model_of(world), "0", ENDING).cases


def test_repeats_are_named_by_seed_or_by_folder(world) -> None:
    for seed in (0, 1):
        world.train("nnUNetTrainerMedContext", results=f"r{seed}", settings={"seed": seed})
        world.train("nnUNetTrainer", results=f"r{seed}")
        world.train("nnUNetTrainerJRAS", results=f"r{seed}", settings={"seed": None})
    both = ("r0", "r1")
    assert [r.label for r in arm(world, "nnUNetTrainerMedContext", results=both).repeats] == ["seed 0", "seed 1"]
    assert [r.label for r in arm(world, "nnUNetTrainer", results=both).repeats] == ["r0", "r1"]
    assert [r.label for r in arm(world, "nnUNetTrainerJRAS", results=both).repeats] == ["r0", "r1"]
    assert [r.label for r in arm(world, "nnUNetTrainer", results=("r0",)).repeats] == ["repeat 1"]


def test_other_folds_in_one_arm(world) -> None:
    world.train("nnUNetTrainer", folds=("0", "1"))
    world.train("nnUNetTrainerMedContext", folds=("0", "1"))
    arms = [arm(world, folds=("0", "1")), arm(world, "nnUNetTrainerMedContext", folds=("0",))]
    with pytest.raises(ValueError, match=r"MedContext \(repeat 1\) has the folds 0, but nnUNetTrainer .* has 0, 1"):
        require_comparable(arms)


def test_different_splits_are_refused_and_the_cases_named(world) -> None:
    world.train("nnUNetTrainer")
    model = world.train("nnUNetTrainerMedContext")
    summary = model / "fold_0" / "validation" / "summary.json"
    summary.write_text(summary.read_text().replace("c1.nii.gz", "e1.nii.gz"))
    (summary.parent / "c1.nii.gz").rename(summary.parent / "e1.nii.gz")
    arms = [arm(world), arm(world, "nnUNetTrainerMedContext")]
    with pytest.raises(ValueError, match=r"fold 0 differ.*has not case c1; nnUNetTrainer has not case e1.*splits"):
        require_comparable(arms)


def test_a_split_that_changed_since_and_unequal_lengths_are_noted(world) -> None:
    world.train("nnUNetTrainer")
    model = world.train("nnUNetTrainerMedContext")
    arms = [arm(world), arm(world, "nnUNetTrainerMedContext")]
    assert require_comparable(arms, {"0": ["c3", "c2", "c1", "c0"]}) == []
    (note,) = require_comparable(arms, {"0": ["c0", "d0"]})
    assert "splits_final.json has changed" in note
    facts = {"num_epochs": "4", "num_iterations_per_epoch": "5"}
    (model / "fold_0" / "debug.json").write_text(json.dumps(facts))
    arms = [arm(world), arm(world, "nnUNetTrainerMedContext")]
    (note,) = require_comparable(arms)
    assert "not equally long (optimiser steps: nnUNetTrainer 10, nnUNetTrainerMedContext 20)" in note


def test_one_arm_and_twice_the_same_name(world) -> None:
    world.train("nnUNetTrainer")
    with pytest.raises(ValueError, match="needs two or more, but there is only nnUNetTrainer"):
        require_comparable([arm(world)])
    with pytest.raises(ValueError, match="same name"):
        require_comparable([arm(world), arm(world)])


def test_predictions_of_a_test_set(world, tmp_path) -> None:
    folder = world.train("nnUNetTrainer") / "fold_0" / "validation"
    found = predictions_arm("x", [folder], ENDING)
    assert found.runs()[0].fold == "test" and len(found.runs()[0].cases) == 4
    assert found.runs()[0].dice == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"predictions of y, .*empty, has no file"):
        predictions_arm("y", [tmp_path / "empty"], ENDING)
    with pytest.raises(ValueError, match="given twice"):
        predictions_arm("x", [folder, folder], ENDING)


def test_differing_settings(world) -> None:
    common = {"seed": 1, "panel_every": 5, "medcontext.mask_ratio": 0.4, "train_cases": 5}
    world.train("nnUNetTrainer")
    world.train("nnUNetTrainerMedContext", results="r1", settings={**common, "medcontext.beta": 2.0})
    world.train("nnUNetTrainerMedContext", results="r2", settings={**common, "medcontext.beta": 0.0, "panel_every": 1})
    med = "nnUNetTrainerMedContext"
    arms = [arm(world), arm(world, med, results=("r1",), name="x"), arm(world, med, results=("r2",), name="y")]
    assert differing_facts(arms) == {
        "trainer": ["nnUNetTrainer", med, med],
        "train_cases": ["all", "5", "5"],
        "medcontext.beta": ["-", "2.0", "0.0"],
    }


# --- one training is not two


def test_a_key_that_was_renamed_is_not_a_difference(world) -> None:
    old, new = {"jras.group_regex": "^(p)", "seed": 1}, {"group_regex": "^(p)", "seed": 2}
    world.train("nnUNetTrainerJRAS", settings=old)
    world.train("nnUNetTrainerJRAS", settings=new, results="other")
    arms = [arm(world, "nnUNetTrainerJRAS", results=(r,), name=r) for r in ("results", "other")]
    assert differing_facts(arms) == {}
    world.train("nnUNetTrainerJRAS", settings=new | {"group_regex": "^(q)"}, results="third")
    arms = [arm(world, "nnUNetTrainerJRAS", results=(r,), name=r) for r in ("results", "third")]
    assert differing_facts(arms) == {"group_regex": ["^(p)", "^(q)"]}


@pytest.mark.parametrize("spelled", ["results", "results/", "./results/../results", "link"])
def test_the_same_folder_in_other_words_is_given_twice(spelled: str, world) -> None:
    model = world.train("nnUNetTrainer")
    (world.root / "link").symlink_to(world.root / "results")
    with pytest.raises(ValueError, match=r"fold 0 of .* was given twice"):
        arm(world, results=("results", spelled))
    folders = [
        model / "fold_0" / "validation",
        world.root / spelled / Path(*model.parts[-2:]) / "fold_0" / "validation",
    ]
    with pytest.raises(ValueError, match="a folder was given twice"):
        predictions_arm("x", [folders[0], Path(f"{folders[1]}/")], ENDING)


def test_equal_seeds_are_one_training(world) -> None:
    for seed, draw in ((0, 0), (0, 1), (1, 1)):
        settings = {"seed": seed, "train_cases": 3, "train_cases_seed": draw}
        world.train("nnUNetTrainerMedContext", results=f"s{seed}d{draw}", settings=settings)
    med = "nnUNetTrainerMedContext"
    assert len(arm(world, med, results=("s0d0", "s0d1", "s1d1")).repeats) == 3  # other training cases, another training
    world.train(med, results="copy", settings={"seed": 0, "train_cases": 3, "train_cases_seed": 1, "panel_every": 7})
    with pytest.raises(ValueError, match=r"s0d1 and copy were both trained with seed=0 \(fold 0\), so they are one"):
        arm(world, med, results=("s0d1", "s1d1", "copy"))


def test_results_of_windows_are_read(world) -> None:
    summary = world.train("nnUNetTrainer") / "fold_0" / "validation" / "summary.json"
    content = json.loads(summary.read_text())
    for row in content["metric_per_case"]:
        row["prediction_file"] = "C:\\Users\\me\\" + row["prediction_file"].lstrip("/").replace("/", "\\")
    summary.write_text(json.dumps(content))
    run = runs.read_fold(model_of(world), "0", ENDING)
    assert set(run.dice) == set(run.cases) == {"c0", "c1", "c2", "c3"}


def test_cases_of_two_folds_are_answered_by_something_that_helps(world) -> None:
    for trainer in ("nnUNetTrainer", "nnUNetTrainerMedContext"):
        fold = world.train(trainer) / "fold_0"
        shutil.copytree(fold, fold.with_name("fold_all"))
    names = ("nnUNetTrainer", "nnUNetTrainerMedContext")
    with pytest.raises(ValueError, match=r"of fold all were also validated in fold 0.*add -f all, or -f with folds"):
        require_comparable([arm(world, name, folds=("0", "all")) for name in names])
    assert require_comparable([arm(world, name, folds=("0",)) for name in names]) == []
    assert "say nothing about new patients" in require_comparable([arm(world, n, folds=("all",)) for n in names])[0]
