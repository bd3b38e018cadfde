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


# --- groups


@pytest.fixture
def two_sites(tmp_path: Path) -> tuple[str, str]:
    """Twelve cases of two structures: six of site A are perfect, six of site B one voxel off; two cases a patient."""
    label = np.zeros((6, 8, 8), dtype=np.uint8)
    label[1:4, 1:5, 1:5], label[4, 6, 6] = 1, 2
    rows = ["case,site,vendor"]
    for site in "AB":
        for number in range(6):
            for folder, content in (("pred", np.roll(label, int(site == "B"), axis=2)), ("labelsTr", label)):
                (tmp_path / folder).mkdir(exist_ok=True)
                image = sitk.GetImageFromArray(content)
                sitk.WriteImage(image, str(tmp_path / folder / f"{site}{number // 2}_{number}.nii.gz"))
            rows.append(f"{site}{number // 2}_{number},{site},x")
    (tmp_path / "cases.csv").write_text("\n".join(rows))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2}}))
    return str(tmp_path / "pred"), str(tmp_path / "labelsTr")


def test_every_figure_for_each_group(two_sites, tmp_path: Path, capsys) -> None:
    command = ["evaluate", *two_sites, "--by", f"{tmp_path / 'cases.csv'}:site", "-o", str(tmp_path / "out")]
    assert dispatch.main(command) == 0
    text = capsys.readouterr().out
    assert "**B**, 6 cases: Dice 0.375 [0.375, 0.375], HD95 1.000 mm" in text  # (0.75 + 0) / 2
    assert "Dice: worst group **B**, 0.375, -0.625 [-0.625, -0.625] against A: worse beyond chance in cases." in text
    assert "| HD95 [mm] | b" in text and "B minus A" in text and text.index("B minus A") < text.index("- Dice: 2 |P")
    assert "look like one subject" in text  # A0_0 and A0_1; no subjects are known
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())["by_groups"]
    assert content["by"] == "site" and content["groups"]["B2_5"] == "B" and content["resampled"] == "cases"
    found = {(f["metric"], f["structure"], f["group"]): f for f in content["figures"]}
    assert len(found) == 3 * 3 * 2 and found["Dice", "a", "B"]["mean"] == pytest.approx(0.75)
    gaps = {(f["metric"], f["structure"]): f for f in content["differences"]}
    assert gaps["Dice", "b"]["difference"] == -1 and gaps["Dice", "b"]["reading"] == "worse"
    assert gaps["NSD", "b"]["difference"] == 0 and gaps["NSD", "b"]["reading"] == "unclear"
    head, first, *_ = (tmp_path / "out" / "evaluation.csv").read_text().splitlines()
    assert head.split(",")[:3] == ["case", "group", "structure"] and first.startswith("A0_0,A,a,")


def test_subjects_are_drawn(two_sites, tmp_path: Path, capsys) -> None:
    command = ["evaluate", *two_sites, "--by", f"{tmp_path / 'cases.csv'}:site", "--metrics", "dice"]
    assert dispatch.main([*command, "--group-regex", r"^(\w\d)"]) == 0
    out = capsys.readouterr().out
    assert "6 cases of 3 subjects" in out and "too few subjects to conclude anything (3 on one side" in out
    assert "look like one subject" not in out
    recorded = {"site": {f"{s}{n // 2}_{n}": s for s in "AB" for n in range(6)}}
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "nnunetv2_ext": recorded}))
    assert dispatch.main(["evaluate", *two_sites, "--by", "site", "--labels", "1", "--metrics", "dice"]) == 0
    assert "worst group **B**, 0.750" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "cases.csv:scanner"], "must have the columns case,scanner; it has case, site, vendor"),
        (["--by", "cases.csv:vendor"], "all 12 cases have the vendor 'x'"),
        (["--by", "cases.csv"], "give --by cases.csv:COLUMN"),
        (["--by", "none.csv:site"], "the table none.csv does not exist"),
        (["--by", "site"], "does not record a site"),
        (["--groups", "cases.csv"], "--group-regex and --groups go with --by"),
    ],
)
def test_mistakes_with_groups_write_nothing(arguments, message, two_sites, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert dispatch.main(["evaluate", *two_sites, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (Path(two_sites[0]) / "evaluation").exists()


def test_a_case_without_a_group(two_sites, tmp_path: Path, capsys) -> None:
    (Path(two_sites[0]) / "B2_5.nii.gz").unlink()
    table = tmp_path / "cases.csv"
    table.write_text(table.read_text().replace("B2_5,B,x", "").replace("B2_4,B", "B2_4, "))
    command = ["evaluate", *two_sites, "--by", f"{table}:site", "--chill", "--metrics", "dice"]
    assert dispatch.main(command) == 2
    assert "gives no site for case B2_4: add it" in capsys.readouterr().err
    table.write_text(table.read_text().replace("B2_4, ", "B2_4,B"))
    assert dispatch.main(command) == 0  # B2_5 is not scored and needs none
