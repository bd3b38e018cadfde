"""``nnUNetv2_ext compare`` on result folders, and what it answers to mistakes."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.cli import dispatch
from tests.compare.conftest import CASES, LABELS, World, save, truth_of, world  # noqa: F401

PLAIN, OURS = "nnUNetTrainer", "nnUNetTrainerMedContext"
TWO = ["-d", "5", "-tr", PLAIN, OURS]


@pytest.fixture
def trained(world: World) -> World:  # noqa: F811
    """Two seeds, two folds: the plain trainer misses by 2 voxels, ours by 1, and ours misses b in d1.

    The second seed's networks are both one voxel better in c0 and d0.
    """
    for seed in (0, 1):
        plain, ours = (
            {c: shift - seed * (c in ("c0", "d0")) for cases in CASES.values() for c in cases} for shift in (2, 1)
        )
        world.train(PLAIN, plain, folds=("0", "1"), results=f"r{seed}")
        world.train(OURS, ours, folds=("0", "1"), results=f"r{seed}", settings={"seed": seed, "medcontext.beta": 2.0},
                    missed=["d1"])  # fmt: skip
    return world


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pictures, which cost most of a command's time and are looked at in the first test."""
    for name in ("draw_boxes", "draw_differences"):
        monkeypatch.setattr(f"nnunetv2_ext.compare.plots.{name}", lambda *args: None)
    monkeypatch.setattr("nnunetv2_ext.compare.curves.draw", lambda *args: False)


def test_the_installed_command_on_two_seeds_and_folds(trained: World, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("nnUNetv2_ext")),
        "compare",
        *TWO,
        "--results",
        "r0",
        "r1",
        "-o",
        "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 cases, fold 0, 1; repeated trainings: nnUNetTrainer: 2, nnUNetTrainerMedContext: 2" in done.stdout
    out = tmp_path / "out"
    report = (out / "report.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", report)
    assert pictures == ["differences.png", "boxes.png", "curves.png", f"cases_{OURS}.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for words in (
        "The paired unit is the case",
        "bootstrap",
        "larger of the two directed",
        "nnUNetv2_ext compare -d 5",
    ):
        assert words in report

    content = json.loads((out / "comparison.json").read_text())
    (primary,) = [d for d in content["differences"] if (d["metric"], d["structure"]) == ("Dice", "mean of structures")]
    # a: 6 voxels wide, moved by 2 or 1; b: 3 wide; c3 has no b; d1's b is missed
    a, b = 5 / 6 - 4 / 6, 2 / 3 - 1 / 3
    expected = [(a + b) / 2] * 5 + [a, (a - 1 / 3) / 2]
    assert primary["mean"] == pytest.approx(np.mean(expected)) and primary["cases"] == 7
    assert (primary["better"], primary["worse"], primary["equal"]) == (6, 1, 0)
    # our first seed against the plain trainer's average, which is half a voxel better in c0 and d0
    assert primary["by_repeat"]["seed 0"] == pytest.approx(np.mean(expected) - (a + b) / 2 / 7)
    assert not primary["repeats_paired"] and primary["resampled"] == "cases"
    assert primary["by_fold"]["1"] == pytest.approx(np.mean([(a + b) / 2, (a - 1 / 3) / 2, (a + b) / 2]))
    assert content["extremes"] == {OURS: {"lost": ["d1"], "gained": content["extremes"][OURS]["gained"]}}

    pairs = list(csv.DictReader((out / "differences.csv").read_text().splitlines()))
    worst = [r for r in pairs if (r["case"], r["metric"], r["structure"]) == ("d1", "Dice", "b")]
    assert [float(worst[0][k]) for k in ("value", "reference", "difference")] == pytest.approx([0, 1 / 3, -1 / 3])
    rows = list(csv.DictReader((out / "cases.csv").read_text().splitlines()))
    assert len(rows) == 2 * 2 * 7 * 2 and {r["repeat"] for r in rows if r["method"] == OURS} == {"seed 0", "seed 1"}
    assert {r["state"] for r in rows if r["case"] == "c3" and r["structure"] == "b"} == {"absent"}


def test_runs_named_by_hand(trained: World, no_plots, capsys) -> None:
    plain = ["--run", "old", "r0/Dataset005_x/nnUNetTrainer__nnUNetPlans__3d_fullres"]
    ours = ["--run", "new", *(str(trained.model(OURS, f"r{s}") / "fold_0") for s in (0, 1))]
    assert dispatch.main(["compare", "-d", "5", "-f", "0", *plain, *ours, "--worst", "0", "--metrics", "dice"]) == 0
    out = capsys.readouterr().out
    assert "new against old" in out and "4 cases, fold 0; repeated trainings: old: 1, new: 2" in out
    assert not list(Path("comparison_Dataset005_x_3d_fullres").glob("cases_*.png"))


def test_predictions_of_a_test_set(world: World, no_plots, capsys) -> None:  # noqa: F811
    for case in ("t1", "t2", "t3"):
        save(Path("truth") / f"{case}.nii.gz", truth_of(case))
        for name, shift in (("old", 2), ("new1", 0), ("new2", 1)):
            save(Path(name) / f"{case}.nii.gz", np.roll(truth_of(case), shift, axis=2))
    command = ["compare", "-d", "5", "--predictions", "old", "old", "--predictions", "new", "new1", "new2"]
    assert dispatch.main([*command, "--truth", "truth", "-o", "out", "--worst", "0"]) == 0
    out = capsys.readouterr().out
    assert "3 test cases" in out and "new against old: Too few cases" in out
    assert "  - Dice (mean of structures) +0.375" in out
    assert "curves.png" not in Path("out/report.md").read_text()
    assert dispatch.main([*command, "-o", "out"]) == 2
    assert "--predictions needs --truth" in capsys.readouterr().err
    Path("new2/t3.nii.gz").unlink()
    assert dispatch.main([*command, "--truth", "truth", "-o", "out"]) == 2
    assert "test cases differ" in capsys.readouterr().err


def test_a_dense_truth_of_ones_own(trained: World, no_plots, capsys) -> None:
    """Validation scores against another truth: no comparison with summary.json is possible then, and none is made."""
    for file in trained.truth.iterdir():
        label = np.roll(truth_of(file.name.removesuffix(".nii.gz")), 1, axis=2)
        save(Path("dense") / file.name, label)
    assert (
        dispatch.main(
            ["compare", *TWO, "--results", "r0", "--truth", "dense", "--metrics", "dice", "-o", "o", "--worst", "1"]
        )
        == 0
    )
    content = json.loads(Path("o/comparison.json").read_text())
    assert content["arms"][1]["scores"]["Dice"]["a"]["mean"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "5", "-tr", PLAIN, "nnUNetTrainerMedContxt"], f"did you mean {OURS}"),
        ([*TWO, "-p", "small"], "-p takes nnUNetPlans"),
        ([*TWO, "-c", "2d"], "-c takes 3d_fullres"),
        ([*TWO, "-f", "0", "4"], "has no fold 4 (it has 0, 1)"),
        ([*TWO, "--results", "nowhere"], "nowhere does not exist"),
        (["-d", "77", "-tr", PLAIN, OURS], "there is no dataset 77 in"),
        (["-d", "5", "-tr", PLAIN], "needs two or more"),
        (["-d", "5"], "say what to compare in one way"),
        ([*TWO, "--run", "x", "r0"], "say what to compare in one way"),
        (["-d", "5", "--run", "x"], "'x' is a name without a folder"),
        ([*TWO, "--truth", "nowhere"], "--truth nowhere does not exist"),
        ([*TWO, "--images", "nowhere"], "--images nowhere does not exist"),
        ([*TWO, "--tolerance", "c=1"], "no structure 'c'"),
        ([*TWO, "--worst", "-1"], "--worst 0 or more"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, message: str, trained: World, capsys) -> None:
    extra = [] if "--results" in arguments or "--run" in arguments else ["--results", "r0"]
    assert dispatch.main(["compare", *arguments, *extra, "-o", "out"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("nnUNetv2_ext compare: ") and message in error[0]
    assert not Path("out").exists()


def test_different_labels_plans_and_datasets(world: World, capsys) -> None:  # noqa: F811
    world.train(PLAIN)
    world.train(OURS, labels={**LABELS, "c": 3})
    assert dispatch.main(["compare", *TWO]) == 2
    assert "the label sets differ" in capsys.readouterr().err
    small = world.train(OURS, plans="small")
    assert dispatch.main(["compare", "-d", "5", "--run", "x", str(world.model(PLAIN)), "--run", "y", str(small)]) == 2
    assert "was trained with plans small" in capsys.readouterr().err


def test_predictions_that_are_not_those_of_the_validation(trained: World, capsys) -> None:
    file = trained.model(OURS, "r0") / "fold_0" / "validation" / "c1.nii.gz"
    save(file, truth_of("c1"))
    assert dispatch.main(["compare", *TWO, "--results", "r0", "-o", "out"]) == 2
    assert re.search(r"Dice of c1, a, is 1.0000 by its files but 0.8333 in summary.json", capsys.readouterr().err)


def test_other_training_cases_need_to_be_allowed(world: World, no_plots, capsys) -> None:  # noqa: F811
    world.train(PLAIN)
    world.train(OURS, settings={"train_cases": 5, "train_cases_seed": 1})
    command = ["compare", *TWO, "--worst", "0", "--metrics", "dice", "-o", "out"]
    assert dispatch.main(command) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "training cases differ (nnUNetTrainer: all; nnUNetTrainerMedContext: 5 of draw 1)" in error
    assert not Path("out").exists()
    assert dispatch.main([*command, "--allow-different-training-cases"]) == 0
    report = Path("out/report.md").read_text()
    assert "Note: the training cases differ" in report and "| train_cases" in report


def test_the_answer_names_structures_never_found_and_unequal_settings(world: World, no_plots, capsys) -> None:  # noqa: F811
    world.train("nnUNetTrainerA", settings={"mirroring": True})
    world.train("nnUNetTrainerB", missed=["c0", "c1", "c2", "c3"], settings={"mirroring": False})
    command = [
        "compare",
        "-d",
        "5",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "-tr",
        "nnUNetTrainerA",
        "nnUNetTrainerB",
        "-o",
        "out",
    ]
    assert dispatch.main(command) == 0
    answer = Path("out/report.md").read_text().split("## Scores")[0]
    assert "**b was found in no case by nnUNetTrainerB**" in answer and "a was found" not in answer
    assert "The trainings differ in mirroring as well" in answer
    assert "Too few cases to conclude anything**: 4" in answer


def test_what_was_let_pass_is_in_every_output(trained: World, monkeypatch, capsys) -> None:
    titles: list[str] = []
    monkeypatch.setattr("nnunetv2_ext.evaluate.plot.save", lambda figure, path: titles.append(figure.get_suptitle()))
    file = str(trained.truth / "c1.nii.gz")
    image = sitk.ReadImage(file)
    image.SetOrigin((9.0, 0.0, 0.0))
    sitk.WriteImage(image, file)
    command = ["compare", *TWO, "--results", "r0", "--worst", "0", "--metrics", "dice", "-o", "out"]
    assert dispatch.main(command) == 2
    assert "case c1: prediction and truth differ in origin" in capsys.readouterr().err
    assert dispatch.main([*command, "--ignore-origin"]) == 0
    words = "origin and direction were not compared (--ignore-origin); they differ in case c1."
    assert words in capsys.readouterr().out and words in Path("out/report.md").read_text()
    assert any(words in line for line in json.loads(Path("out/comparison.json").read_text())["reading"])
    assert all(words in title.replace("\n", " ") for title in titles[:2])  # differences.png, boxes.png
    about = "Dataset005_x, 3d_fullres, plans nnUNetPlans: nnUNetTrainerMedContext against nnUNetTrainer; fold 0, 1"
    assert len(titles) == 3 and all(title.replace("\n", " ").startswith(about) for title in titles)
    for name in ("cases.csv", "differences.csv"):
        rows = list(csv.DictReader(Path(f"out/{name}").read_text().splitlines()))
        assert {r["case"] for r in rows if r["remark"].endswith("differing: origin")} == {"c1"}


def test_no_truth(trained: World, monkeypatch, capsys) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    assert dispatch.main(["compare", *TWO, "--results", "r0"]) == 2
    assert "because nnUNet_preprocessed is not set; give their folder with --truth" in capsys.readouterr().err
