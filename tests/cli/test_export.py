"""``nnUNetv2_ext export``: what it prints, and one line for each mistake."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from nnunetv2_ext.cli import main
from nnunetv2_ext.core import randomness
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext


@pytest.fixture
def model(make_trainer, monkeypatch) -> Path:
    """A model folder with the given checkpoints, untrained."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trainer = make_trainer(nnUNetTrainerMedContext, results=None)
    randomness.seed_everything(0)
    trainer.initialize()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    folder = Path(trainer.output_folder_base)
    for name in ("plans.json", "dataset.json"):
        (folder / name).write_text("{}")
    return folder


def add(model: Path, fold: str, name: str) -> None:
    source = model / "fold_0" / "checkpoint_latest.pth"
    (model / fold).mkdir(exist_ok=True)
    (model / fold / name).write_bytes(source.read_bytes())


def test_it_prints_the_files_and_a_command_that_fits_them(model, tmp_path, capsys):
    add(model, "fold_0", "checkpoint_final.pth")
    add(model, "fold_3", "checkpoint_final.pth")
    output = tmp_path / "a folder"
    assert main(["export", str(model), str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("wrote ")] == [
        f"wrote {output / 'fold_0' / 'checkpoint_final.pth'}",
        f"wrote {output / 'fold_3' / 'checkpoint_final.pth'}",
    ]
    command = shlex.split(lines[-1].partition(": ")[2])
    # the folds must be named: nnU-Net's default is all five of them
    assert command == [
        *("nnUNetv2_predict_from_modelfolder", "-i", "INPUT", "-o", "OUTPUT"),
        *("-m", str(output), "-f", "0", "3", "-device", "cpu"),
    ]


@pytest.mark.parametrize("present", [True, False])
def test_the_command_names_the_cpu_only_where_there_is_no_gpu(model, tmp_path, capsys, monkeypatch, present):
    monkeypatch.setattr("torch.cuda.is_available", lambda: present)
    add(model, "fold_0", "checkpoint_final.pth")
    assert main(["export", str(model), str(tmp_path / "out")]) == 0
    assert ("-device" in capsys.readouterr().out) != present


def test_the_best_checkpoint_is_exported_on_request_and_not_predicted_with(model, tmp_path, capsys):
    add(model, "fold_0", "checkpoint_best.pth")
    assert main(["export", str(model), str(tmp_path / "out"), "--best"]) == 0
    out = capsys.readouterr().out
    assert out.count("wrote ") == 2 and "-chk checkpoint_latest.pth" in out


def test_other_weights_than_those_validated_are_announced(model, tmp_path, capsys):
    assert main(["export", str(model), str(tmp_path / "student")]) == 0
    assert "left out" not in capsys.readouterr().out
    path = model / "fold_0" / "checkpoint_latest.pth"
    checkpoint = torch.load(path, weights_only=False)
    for value in checkpoint["nnunetv2_ext"]["methods"]["medcontext"]["teacher"].values():
        value += 1
    torch.save(checkpoint, path)
    assert main(["export", str(model), str(tmp_path / "teacher"), "--weights", "teacher"]) == 0
    assert "left out progress.png and validation/" in capsys.readouterr().out


def test_without_a_final_checkpoint_the_command_names_the_one_there_is(model, tmp_path, capsys):
    assert main(["export", str(model), str(tmp_path / "out"), "--weights", "teacher"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("-f 0 -chk checkpoint_latest.pth -device cpu")


def test_a_fold_without_the_final_checkpoint_is_left_out_of_the_command(model, tmp_path, capsys):
    add(model, "fold_1", "checkpoint_final.pth")  # fold_0 is still being trained
    assert main(["export", str(model), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("-f 1 -device cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere is not a trained model folder"),
        (["MODEL", "."], ". exists; name a folder that does not"),
        (["MODEL", "out", "--weights", "mean"], "no 'mean' weights to export; it has: student, teacher"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", *[str(model) if a == "MODEL" else a for a in arguments]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nnUNetv2_ext export: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_arguments_are_required(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export"])
    assert stop.value.code == 2 and "model_folder, output" in capsys.readouterr().err
