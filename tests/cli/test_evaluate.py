"""``nnUNetv2_ext evaluate``: the command and what it answers to mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.cli import dispatch
from nnunetv2_ext.evaluate import plot


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    label = np.zeros((6, 8, 8), dtype=np.uint8)
    label[1:4, 1:5, 1:5], label[4, 6, 6] = 1, 2
    for folder, content in (("pred", np.roll(label, 1, axis=2)), ("labelsTr", label)):
        (tmp_path / "Dataset007_x" / folder).mkdir(parents=True)
        for case in ("c1", "c2"):
            image = sitk.GetImageFromArray(content)
            sitk.WriteImage(image, str(tmp_path / "Dataset007_x" / folder / f"{case}.nii.gz"))
    content = {"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (tmp_path / "Dataset007_x" / "dataset.json").write_text(json.dumps(content))
    return str(tmp_path / "Dataset007_x" / "pred"), str(tmp_path / "Dataset007_x" / "labelsTr")


def test_the_installed_command(data, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("nnUNetv2_ext")), "evaluate", *data, "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "--tolerance", "0", "b=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Tolerance of NSD: a 0 mm, b 1 mm" in done.stdout and "mean of structures" in done.stdout
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"evaluation.json", "evaluation.csv", "evaluation.md", "evaluation.png"}
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["mean"]["2"] == {"Dice": 0.0, "HD95": 1.0, "NSD": 1.0}
    assert content["mean"]["1"]["Dice"] == pytest.approx(0.75)


def test_what_was_let_pass_is_in_every_output_and_no_picture_names_a_path(data, tmp_path, monkeypatch, capsys) -> None:
    file = str(Path(data[1]) / "c1.nii.gz")
    image = sitk.ReadImage(file)
    image.SetOrigin((9.0, 0.0, 0.0))
    sitk.WriteImage(image, file)
    titles: list[str] = []
    monkeypatch.setattr(plot, "save", lambda figure, path: titles.append(figure.get_suptitle()))
    assert dispatch.main(["evaluate", *data]) == 2
    assert "differ in origin" in capsys.readouterr().err
    assert dispatch.main(["evaluate", *data, "--ignore-origin"]) == 0
    words = "not compared (--ignore-origin); they differ in case c1."
    out = Path(data[0]) / "evaluation"
    assert words in capsys.readouterr().out and words in (out / "evaluation.md").read_text()
    assert words in titles[0].replace("\n", " ")
    assert any(words in line for line in json.loads((out / "evaluation.json").read_text())["definitions"])
    assert "direction and origin not compared, differing: origin" in (out / "evaluation.csv").read_text()
    assert "\n".join(titles).count(str(tmp_path)) == 0 and str(tmp_path) not in (out / "evaluation.md").read_text()
    assert titles[0].startswith("Dataset007_x/pred against Dataset007_x/labelsTr\n")


def test_swapped_folders_write_nothing_into_the_truth(data, capsys) -> None:
    (Path(data[0]) / "plans.json").write_text("{}")
    assert dispatch.main(["evaluate", *reversed(data)]) == 2
    assert "look swapped" in capsys.readouterr().err and not (Path(data[1]) / "evaluation").exists()
    assert dispatch.main(["evaluate", *data, "-o", data[1]]) == 2  # pictures there would be cases next time
    assert "holds the input" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_the_dataset_by_id_and_the_default_folder(variable: str, data, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert dispatch.main(["evaluate", *data, "-d", "7", "--metrics", "dice"]) == 0
    assert "HD95 [mm]" not in capsys.readouterr().out
    assert (Path(data[0]) / "evaluation" / "evaluation.md").is_file()
    # its own output in the folder of predictions does not disturb the next call
    assert dispatch.main(["evaluate", *data, "-d", "Dataset007_x", "--metrics", "dice"]) == 0


def test_label_values_by_hand(data, tmp_path: Path, capsys) -> None:
    assert dispatch.main(["evaluate", *data, "--labels", "1", "--ignore", "2", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "label 1" in out and "| label 2" not in out and "mean of structures" not in out and "Ignore label 2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "9"], "there is no dataset 9 in"),
        (["-djfile", "no.json"], "no.json cannot be read as JSON"),
        (["--labels", "0"], "different values of 1 or more"),
        (["--ignore", "2"], "--ignore goes with --labels"),
        (["--tolerance", "c=1"], "no structure 'c'; there are a, b"),
        (["--tolerance", "-1"], "must be 0 mm or more"),
        (["-np", "0"], "-np must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(arguments, message: str, data, tmp_path, capsys) -> None:
    assert dispatch.main(["evaluate", *data, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (Path(data[0]) / "evaluation").exists()


def test_wrong_folders(data, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert dispatch.main(["evaluate", str(tmp_path / "empty"), data[1], "-o", str(tmp_path / "o")]) == 2
    assert "has no file that ends in .nii.gz" in capsys.readouterr().err
    assert dispatch.main(["evaluate", str(tmp_path / "no"), data[1]]) == 2
    assert "no, does not exist" in capsys.readouterr().err
    (Path(data[1]).parent / "dataset.json").unlink()
    assert dispatch.main(["evaluate", *data]) == 2
    assert "give -d DATASET, -djfile FILE, or --labels" in capsys.readouterr().err
    (Path(data[0]) / "dataset.json").write_text("{")
    assert dispatch.main(["evaluate", *data]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
