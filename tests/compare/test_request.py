"""A comparison from Python, its subjects, and options that would have been ignored."""

import json
import shutil
from pathlib import Path

import pytest

from nnunetv2_ext.compare import request
from nnunetv2_ext.compare.request import Request, compare
from nnunetv2_ext.evaluate.groups import find_subjects
from tests.compare.conftest import CASES

PLAIN, OURS = "nnUNetTrainer", "nnUNetTrainerMedContext"


@pytest.fixture
def trained(world, monkeypatch):
    """Both trainers in two folds, without the pictures, which cost most of a comparison's time."""
    monkeypatch.setattr(request, "write", lambda *args: None)
    world.train(PLAIN, 2, folds=("0", "1"))
    world.train(OURS, {c: 1 + i % 2 for i, c in enumerate([*CASES["0"], *CASES["1"]])}, folds=("0", "1"))
    return world


def asked(**options) -> Request:
    return Request(**{"dataset": "5", "trainers": [PLAIN, OURS], "metrics": ["dice"], **options})


def test_from_python(trained) -> None:
    report, output = compare(asked(output=Path("out")))
    assert output == Path("out") and report.scores.table["arm"].unique().tolist() == [PLAIN, OURS]
    assert {"fold", "case", "structure", "metric", "value"} <= set(report.scores.table)
    assert report.answers()[OURS][0].startswith(f"{OURS} against {PLAIN}: ")


# --- subjects


def units(report) -> tuple[str, int]:
    return report.primary[0].unit, report.primary[0].units


def test_subjects_by_expression_table_or_record(trained) -> None:
    assert units(compare(asked())[0]) == ("cases", 7)
    assert units(compare(asked(group_regex="^(.)"))[0]) == ("subjects", 2)
    table = trained.root / "groups.csv"
    table.write_text("case,subject\n" + "".join(f"{c},{'pq'[c < 'c2']}\n" for cases in CASES.values() for c in cases))
    report, _ = compare(asked(groups=table))
    assert units(report) == ("subjects", 2) and set(report.scores.table["subject"]) == {"p", "q"}
    own = trained.truth.parent / "dataset.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "nnunetv2_ext": {"subjects": {"c0": "p", "c1": "p"}}}))
    assert units(compare(asked())[0]) == ("subjects", 6)
    # what is recorded about other cases says nothing about these
    own.write_text(json.dumps({**json.loads(own.read_text()), "nnunetv2_ext": {"subjects": {"x": "p"}}}))
    assert units(compare(asked())[0]) == ("cases", 7)


def test_names_that_look_like_pairs_are_pointed_out(trained) -> None:
    names = [f"sub-{n}Ses{m}" for n in (1, 2, 3) for m in (1, 2)]
    subjects, (note,) = find_subjects(names, [])
    assert subjects is None and "sub-1Ses1 and sub-1Ses2" in note and "--group-regex" in note
    assert find_subjects(["c0", "d0"], []) == (None, [])
    expression = note.split("'")[1]  # what the note advises does what it says
    assert set(find_subjects(names, [], expression)[0].values()) == {"sub-1", "sub-2", "sub-3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_regex": "(x.)"}, "does not find a subject in the case id 'c0'"),
        ({"group_regex": "("}, "is not a regular expression"),
        ({"groups": Path("none.csv")}, "none.csv cannot be read"),
        ({"group_regex": "(.)", "groups": Path("none.csv")}, "give one of the two"),
        ({"dataset": "6"}, "there is no dataset"),
        (
            {"trainers": [], "runs": [("x", "results"), ("y", "results")], "results": [Path("results")]},
            "--results goes",
        ),
        ({"trainers": [], "predictions": [("x", "t")], "truth": Path("t"), "folds": ["0"]}, "-f goes with trainings"),
        ({"images": Path("preprocessed")}, r"has no image of cases c0, .*_0000.nii.gz"),
        (
            {"truth": Path("results/Dataset005_x/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0/validation")},
            "same folder",
        ),
        ({"output": Path("preprocessed/Dataset005_x/gt_segmentations")}, "holds the input"),
        ({"processes": 0}, "-np must be 1 or more"),
    ],
)
def test_nothing_that_was_asked_for_is_ignored(options, message: str, trained) -> None:
    with pytest.raises(ValueError, match=message):
        compare(asked(**options))


def test_runs_of_another_dataset_or_fold_than_asked_for(trained) -> None:
    folders = [("x", str(trained.model(PLAIN))), ("y", str(trained.model(OURS)))]
    with pytest.raises(ValueError, match=r"-d 6: the results are of Dataset005_x"):
        compare(asked(dataset="6", trainers=[], runs=folders))
    folds = [("x", f"{folders[0][1]}/fold_0"), ("y", f"{folders[1][1]}/fold_0")]
    with pytest.raises(ValueError, match=r"--run names fold 0, which -f 1 leaves out"):
        compare(asked(trainers=[], runs=folds, folds=["1"]))


def test_fold_all_is_left_out_beside_numbered_folds(trained) -> None:
    for trainer in (PLAIN, OURS):
        shutil.copytree(trained.model(trainer) / "fold_0", trained.model(trainer) / "fold_all")
    report, _ = compare(asked())
    assert list(report.scores.per_case["fold"].unique()) == ["0", "1"]
    assert any("fold all was left out" in note for note in report.notes)
    assert any("say nothing about new patients" in note for note in compare(asked(folds=["all"]))[0].notes)


def test_predictions_whose_dataset_is_not_known_say_so(trained, monkeypatch) -> None:
    arms = []
    for trainer in (PLAIN, OURS):
        folder = trained.model(trainer) / "fold_0" / "validation"
        (folder / "dataset.json").write_text(trained.dataset_json())
        arms.append((trainer, str(folder)))
    report, _ = compare(asked(dataset="77", trainers=[], predictions=arms, truth=trained.truth))
    assert any("-d 77 was not found" in note for note in report.notes)
