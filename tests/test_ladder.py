"""examples/ladder.py with trainings replaced by ready-made result folders: plan, resuming, times, comparison; and once
as it is, on a tiny dataset."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.compare.conftest import World, world  # noqa: F401
from tests.conftest import TinyDataset

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LADDER = {
    "trainer": "nnUNetTrainerMedContext",
    "train_cases": [3],
    "runs": {"A": {"steps_factor": 2}, "B": {"medcontext.beta": 0}, "C": {"trainer": "nnUNetTrainerJRAS"}},
}


@pytest.fixture
def ladder(world: World, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """``ladder("--option", ...)`` runs the example and returns its status and the trainings it started."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ladder as module

    started: list[tuple[str, dict]] = []

    def start(args, folder: Path, settings: dict, target, **further) -> bool:
        if target is module.ladder_steps.measure:
            Path(further["seconds"]).parent.mkdir(parents=True)
            Path(further["seconds"]).write_text({"A": "0.5", "B": "1.0", "C": "2.0"}[folder.name])
            return True
        started.append((folder.parent.name, settings))
        if broken and folder.parent.name == broken[0]:
            return False
        shift = {"A": 2, "B": 1, "C": 0}[folder.parent.name]
        results = str(folder.relative_to(world.root))
        kept = {key: settings[key] for key in ("seed", "train_cases", "train_cases_seed")}
        shifts = {"c0": shift + settings["seed"], "c1": shift, "c2": shift, "c3": shift}
        world.train(settings["trainer"], shifts, results=results, settings=kept)
        return True

    broken: list[str] = []
    monkeypatch.setattr(module, "start", start)
    for name in ("draw_boxes", "draw_differences"):
        monkeypatch.setattr(f"nnunetv2_ext.compare.plots.{name}", lambda *args: None)
    monkeypatch.setattr("nnunetv2_ext.compare.curves.draw", lambda *args: False)
    monkeypatch.setattr("nnunetv2_ext.compare.pictures.draw_cases", lambda *args: ([], []))

    def run(*options: str, fails: str = "", reference: object = "B") -> tuple[int, list[tuple[str, dict]]]:
        started.clear()
        broken[:] = [fails] if fails else []
        (world.root / "ladder.yaml").write_text(yaml.safe_dump(LADDER | {"reference": reference}))
        fixed = ["ladder.yaml", "-d", "5", "--steps", "400", "--epoch-steps", "100", "--output", "out"]
        monkeypatch.setattr(sys, "argv", ["ladder.py", *fixed, *options])
        return module.main(), list(started)

    return run


def test_runs_are_planned_trained_and_compared(ladder, world, capsys) -> None:  # noqa: F811
    status, started = ladder("--seeds", "2")
    assert status == 0 and [name for name, _ in started] == ["A", "B", "C"] * 2
    assert [s["num_epochs"] for _, s in started[:3]] == [8, 4, 4]
    assert [s["trainer"] for _, s in started[1:3]] == ["nnUNetTrainerMedContext", "nnUNetTrainerJRAS"]
    assert started[3][1]["seed"] == started[3][1]["train_cases_seed"] == 1 and started[0][1]["train_cases"] == 3
    out = capsys.readouterr().out
    # 2 seeds x (800 x 0.5 + 400 x 1 + 400 x 2) s
    assert "6 runs, about 53 min of training steps" in out and "A against B" in out and "C against B" in out
    content = json.loads(Path("out/comparison_n3/comparison.json").read_text())
    assert [arm["name"] for arm in content["arms"]] == ["B", "A", "C"]
    assert [list(arm["repeats"]) for arm in content["arms"]] == [["seed 0", "seed 1"]] * 3


def test_a_second_call_goes_on_where_the_first_ended(ladder, capsys) -> None:
    status, started = ladder("--seeds", "1", fails="C")
    assert status == 1 and [name for name, _ in started] == ["A", "B", "C"]
    capsys.readouterr()
    status, started = ladder("--seeds", "1")
    assert status == 0 and [name for name, _ in started] == ["C"]
    out = capsys.readouterr().out
    assert "timing a step" not in out and "1 runs, about 13 min" in out
    assert ladder("--seeds", "1") == (0, [])


def test_equal_time_gives_fast_runs_more_steps(ladder) -> None:
    _, started = ladder("--seeds", "1", "--equal-time", "B")
    assert [s["num_epochs"] for _, s in started] == [8, 4, 2]


def test_the_table_alone_trains_nothing(ladder, capsys) -> None:
    ladder("--seeds", "1", "--runs", "A", "B")
    status, started = ladder("--seeds", "2", "--table-only")
    assert status == 0 and not started
    assert "| 3 | A | 1 |" in capsys.readouterr().out


def test_unknown_runs(ladder, capsys) -> None:
    assert ladder("--runs", "A", "X")[0] == 2 and ladder("--equal-time", "Y")[0] == 2
    assert ladder(reference=["A", "Z"])[0] == 2
    error = capsys.readouterr().err
    assert "has no run X; it has A, B, C" in error and "has no run Y" in error and "has no run Z" in error


def test_each_of_several_references_has_its_own_comparison(ladder) -> None:
    assert ladder("--seeds", "1", "--runs", "B", "C", reference=["A", "C", "B"])[0] == 0  # A is not there
    arms = [json.loads(Path(f"out/{folder}/comparison.json").read_text())["arms"] for folder in
            ("comparison_n3", "comparison_n3_to_B")]  # fmt: skip
    assert [[arm["name"] for arm in some] for some in arms] == [["C", "B"], ["B", "C"]]
    assert len(list(Path("out").glob("comparison*"))) == 2


def test_a_seed_that_is_still_missing_is_noted_and_does_not_stop_the_table(ladder) -> None:
    ladder("--seeds", "1")
    ladder("--seeds", "2", "--runs", "A", "B")
    assert ladder("--seeds", "2", "--table-only")[0] == 0
    notes = json.loads(Path("out/comparison_n3/comparison.json").read_text())["notes"]
    assert any("training cases differ (B: 3 of draw 0 / 3 of draw 1;" in note and "C: 3 of draw 0)" in note
               for note in notes)  # fmt: skip


@pytest.mark.parametrize("file", sorted((EXAMPLES / "ladders").glob("*.yaml")), ids=lambda file: file.stem)
def test_references_of_our_ladders_are_runs_of_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ladder_steps

    content = yaml.safe_load(file.read_text())
    assert set(ladder_steps.references(content)) <= set(content["runs"])
    assert file.stem != "jras" or ladder_steps.references(content) == ["D_random", "B_curves"]


@pytest.mark.parametrize("dim", [2, 3])
def test_bfloat16_on_the_cpu_gives_the_same_network_in_lower_precision(dim: int, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ladder as module

    torch.manual_seed(0)
    conv = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dim]
    network = torch.nn.Sequential(conv(1, 8, 3, padding=1), torch.nn.LeakyReLU(), conv(8, 3, 1))
    x = torch.randn(2, 1, *[12] * dim)
    expected = network(x)
    module.speed_up_on_cpu(network)
    found = network(x)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)  # it did go through bfloat16
    assert torch.allclose(found, expected, atol=0.03)
    found.square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.slow
@pytest.mark.timeout(600)  # four starts of nnU-Net on a busy machine
def test_the_script_itself_is_stopped_continued_and_compares_on_the_test_set(tiny: TinyDataset, tmp_path: Path) -> None:
    """Two real trainings of MedContext, of which the first is stopped by its stop file."""
    common = {"panel_every": 0, "num_val_iterations_per_epoch": 1}
    runs = {"plain": {"medcontext.masked_fraction": 0, "medcontext.beta": 0}, "default": {}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"settings": common, "runs": runs}, sort_keys=False))
    output = tmp_path / "out"
    fold = output / "plain" / "nall_seed0" / tiny.name / "nnUNetTrainerMedContext__tiny__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "stop").touch()
    (output / "seconds_per_step.json").write_text('{"default": 0.2}')  # as an earlier call left it
    command = [
        *(sys.executable, str(EXAMPLES / "ladder.py"), "two.yaml", "-d", str(tiny.dataset_id), "-p", "tiny"),
        *("--test-set", str(tiny.raw / tiny.name), "--seeds", "1", "--steps", "4", "--epoch-steps", "2"),
        *("--threads", "1", "--no-mirroring", "--fast-cpu", "--output", str(output)),
    ]
    environment = {**os.environ, **tiny.environment(tmp_path / "unused")}

    def call() -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
        )

    stopped = call()
    log = output / "plain" / "nall_seed0" / "log.txt"
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "plain was stopped before its end; the same command continues it" in stopped.stderr, log.read_text()
    assert "timing a step of plain" in stopped.stdout and "timing a step of default" not in stopped.stdout
    seconds = json.loads((output / "seconds_per_step.json").read_text())
    assert 0 < seconds["plain"] < 30 and seconds["default"] == 0.2
    assert (fold / "checkpoint_latest.pth").is_file() and not (output / "default").exists()

    done = call()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "timing a step" not in done.stdout and "2 runs, about" in done.stdout
    assert "| all | plain | 1 |" in done.stdout and "| all | default | 1 |" in done.stdout
    first, second = [file.read_text() for file in sorted(fold.glob("training_log_*.txt"))]
    assert "Stopped by the file" in first and "Training done" in second
    assert not list(fold.glob("previous_*"))  # where a training begins anew it sets the checkpoints aside
    with (fold / "epochs.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    for name in runs:
        summary = json.loads((output / name / "nall_seed0" / "test" / "summary.json").read_text())
        assert len(summary["metric_per_case"]) == 2
    assert "default against plain" in done.stdout
    content = json.loads((output / "comparison_nall" / "comparison.json").read_text())
    assert [arm["name"] for arm in content["arms"]] == ["plain", "default"]
    assert (output / "comparison_nall" / "differences.png").is_file()
