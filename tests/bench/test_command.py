"""``nnUNetv2_ext bench`` on a tiny dataset, and what it answers to mistakes."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from nnunetv2_ext.bench import isolated, session
from nnunetv2_ext.bench.candidates import Candidate
from nnunetv2_ext.bench.subject import Subject, Target
from nnunetv2_ext.cli import dispatch
from nnunetv2_ext.core.outside import methods

MED = "nnUNetTrainerMedContext"
SHORT = ["--rounds", "2", "--steps-per-round", "1", "--warm-up", "1", "--threads", "1", "-device", "cpu"]


@pytest.fixture
def results(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of ``tiny``; returns nnUNet_results, which must stay absent."""
    for name, value in tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("nnUNet_ext_settings")
    return tmp_path / "results"


def bench(*arguments: str, configuration: str = "3d_fullres") -> int:
    return dispatch.main(["bench", "-d", "1", "-c", configuration, "-p", "tiny", *SHORT, *arguments])


def test_trainers_are_measured_and_those_that_fail_do_not_stop_the_others(
    results: Path, foreign_trainers, tmp_path: Path, capsys
) -> None:
    table, chart = tmp_path / "cost.json", tmp_path / "cost.png"
    trainers = [MED, f"{MED}:medcontext.beta=0", "nnUNetTrainerOutOfMemory", "nnUNetTrainerFailsLater"]
    status = bench("-tr", *trainers, "--no-resident", "--json", str(table), "--plot", str(chart))

    content = json.loads(table.read_text())
    plain, default, without_teacher, memory, later = content["results"]
    assert status == 1
    for result in (plain, default, without_teacher):
        assert result["failure"] is None
        assert all(len(result["steps"][kind]["wall"]) == 2 for kind in ("real", "synthetic"))
        assert len(result["predict"]["cpu"]) == 2 and result["memory"]["saved_tensors"] > 0
    promised = methods()["medcontext"].trainers[MED].promises[""].cpu
    assert [r["promise"]["cpu"] for r in (plain, default, without_teacher)] == [None, promised, None]
    assert plain["ratios"]["step"]["real"]["wall"] == {"median": 1, "low": 1, "high": 1}
    assert set(plain["parts"]) == {"forward", "loss", "backward", "optimiser", "other"}
    assert set(default["parts"]) - set(plain["parts"]) == {"teacher", "after step"}
    assert "teacher" not in without_teacher["parts"]
    # the passes are back-propagated in turn: the memory of one
    assert default["ratios"]["memory"]["saved_tensors"] < 1.15
    assert memory["failure"].startswith("out of memory: OutOfMemoryError: CUDA out of memory. Tried")
    assert later["failure"] == "RuntimeError: the fifth step"
    out = capsys.readouterr().out
    assert "FAILED nnUNetTrainerOutOfMemory: out of memory" in out and f"{MED} beta=0" in out
    assert "cite the following paper" not in out  # nnU-Net's own prints
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert not results.exists()


def test_a_trainer_that_cannot_be_built_stops_only_itself(tiny, results: Path, tmp_path: Path, capsys) -> None:
    """RADA needs an ignore label."""
    table = tmp_path / "cost.json"
    refused = "nnUNetTrainerRADA:rada.semantics=off"
    status = bench("-tr", refused, MED, "--batches", "real", "--no-resident", "--json", str(table))
    plain, rada, ours = json.loads(table.read_text())["results"]
    assert status == 1 and "ignore label" in rada["failure"] and "\n" not in rada["failure"]
    assert plain["failure"] is ours["failure"] is None and ours["ratios"]["step"]["real"]["wall"]["median"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAILED")] == [
        f"FAILED nnUNetTrainerRADA semantics=off: {rada['failure']}"
    ]
    # the same in a process of its own
    target = Target(tiny.name, "3d_fullres", "tiny")
    answer = isolated.run(Candidate("nnUNetTrainerRADA", "rada.semantics=off"), target, 1, "real")
    assert answer == {"failure": rada["failure"], "out_of_memory": False}


def test_the_plain_trainer_that_cannot_be_built_takes_the_ratios_with_it(
    results: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    class Unwilling(Subject):
        def __init__(self, candidate: Candidate, *rest) -> None:
            if candidate.trainer in unwilling:
                raise ValueError("the data are\nmissing")
            super().__init__(candidate, *rest)

    monkeypatch.setattr(session, "Subject", Unwilling)
    arguments = ["-tr", MED, "--batches", "real", "--no-resident", "--plot", str(tmp_path / "cost.png")]
    unwilling = {"nnUNetTrainer"}
    assert bench(*arguments) == 1
    out = capsys.readouterr().out
    last = "FAILED nnUNetTrainer: the data are missing (without its figures there are no ratios)"
    assert f"\n| {MED} " in out and last in out.splitlines() and (tmp_path / "cost.png").is_file()
    (tmp_path / "cost.png").unlink()

    unwilling.add(MED)
    assert bench(*arguments) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-3:] == [
        f"FAILED {MED}: the data are missing",
        last,
        f"{tmp_path / 'cost.png'} was not written: no trainer could be measured",
    ]
    assert not (tmp_path / "cost.png").exists()


def test_2d_resident_sizes_and_loading(results: Path, tmp_path: Path, capsys) -> None:
    table = tmp_path / "cost.json"
    assert bench("--batches", "real", "--workers", "1", "--json", str(table), configuration="2d") == 0
    (plain,) = json.loads(table.read_text())["results"]
    assert plain["loading"]["step"] > 0 and 0 <= plain["loading"]["share"] < 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.endswith("share of waiting |")]
    assert line.startswith("| trainer")
    # an interpreter with torch in it
    assert plain["memory"]["resident_peak"] >= plain["memory"]["resident_before"] > 100e6
    assert plain["facts"]["patch_size"] == [24, 24] and list(plain["steps"]) == ["real"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tr", "nnUNetTrainerMedContxt"], f"did you mean {MED}"),
        (["-tr", f"{MED}:medcontext.mask_rtio=0.5"], "did you mean medcontext.mask_ratio"),
        (["-tr", f"{MED}:medcontext.mask_ratio=1.5"], "less than or equal to 1"),
        (["--settings", "nnUNetTrainer=seed=1"], "takes no settings"),
        (["-tr", "nnUNetTrainer:seed=1"], "takes no settings"),
        (["-d", "77"], "there is no dataset 77"),
        (["-p", "other"], "-p takes nnUNetPlans, tiny"),
        (["-c", "4d"], "-c takes 2d, 3d_fullres"),
        (["-f", "x"], "neither a number nor all"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--workers", "-1"], "--workers must be 0 or more"),
        (["--plot", "no/such/folder/x.png"], "cannot be written"),
        (["--plot", "cost.xyz"], "--plot cost.xyz does not name a picture"),
        (["--json", "."], "--json . cannot be written"),
        (["-f", "2"], "splits_final.json has no fold 2: -f takes 0 to 1, or all"),
        pytest.param(
            ["-device", "cuda"],
            "sees no GPU; use -device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, results: Path, capsys) -> None:
    assert bench("--no-resident", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nnUNetv2_ext bench: ") and message in error


def test_a_process_whose_trainer_cannot_be_built_is_no_mistake_of_the_command(monkeypatch) -> None:
    answer = json.dumps({"failure": "no ignore label", "out_of_memory": False})
    done = subprocess.CompletedProcess([], 0, stdout=f"noise\n{answer}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(ValueError, match=r"^no ignore label$"):
        isolated.resident_size(Candidate("nnUNetTrainerRADA"), Target("Dataset001_x", "2d"), 1, "real")


@pytest.mark.parametrize("status", [-9, 137])
def test_a_process_that_the_system_kills_ran_out_of_memory(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.CompletedProcess([], status, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(MemoryError, match="memory ran out"):
        isolated.resident_size(Candidate("nnUNetTrainer"), Target("Dataset001_x", "2d"), 1, "real")


def test_a_process_that_dies_otherwise_says_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    died = subprocess.CompletedProcess([], 1, stdout="noise", stderr="Traceback\nImportError: no such library\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: died)
    with pytest.raises(ValueError, match="status 1: ImportError: no such library"):
        isolated.resident_size(Candidate("nnUNetTrainer"), Target("Dataset001_x", "2d"), 1, "real")
