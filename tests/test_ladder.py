"""examples/ladder.py with trainings replaced by ready-made result folders: plan, resuming, times, comparison."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.compare.conftest import World, world  # noqa: F401

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LADDER = {
    "trainer": "nnUNetTrainerMedContext",
    "reference": "B",
    "train_cases": [3],
    "runs": {"A": {"steps_factor": 2}, "B": {"medcontext.beta": 0}, "C": {"trainer": "nnUNetTrainerJRAS"}},
}


@pytest.fixture
def ladder(world: World, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """``ladder("--option", ...)`` runs the example and returns its status and the trainings it started."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import ladder as module

    (world.root / "ladder.yaml").write_text(yaml.safe_dump(LADDER))
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
        world.train(settings["trainer"], shift, results=results, settings={"seed": settings["seed"]})
        return True

    broken: list[str] = []
    monkeypatch.setattr(module, "start", start)
    for name in ("draw_boxes", "draw_differences"):
        monkeypatch.setattr(f"nnunetv2_ext.compare.plots.{name}", lambda *args: None)
    monkeypatch.setattr("nnunetv2_ext.compare.curves.draw", lambda *args: False)
    monkeypatch.setattr("nnunetv2_ext.compare.pictures.draw_cases", lambda *args: ([], []))

    def run(*options: str, fails: str = "") -> tuple[int, list[tuple[str, dict]]]:
        started.clear()
        broken[:] = [fails] if fails else []
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
    error = capsys.readouterr().err
    assert "has no run X; it has A, B, C" in error and "has no run Y" in error
