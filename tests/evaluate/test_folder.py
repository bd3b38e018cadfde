"""Folders: pairing, grids, processes, tables and pictures."""

import csv
import io
import json
import math

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple, load_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_ext.evaluate import pairs, plot, table
from nnunetv2_ext.evaluate.folder import Evaluation, Source, evaluate_folder, with_mean
from nnunetv2_ext.evaluate.metrics import Rules
from nnunetv2_ext.evaluate.structures import Labels, from_dataset_json, from_values

LABELS = from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}})
RULES = Rules(("dice", "hd95", "nsd"), {"a": 1.0, "b": 1.0})
SOURCE = Source(LABELS, RULES)


def values(result: Evaluation, metric: str) -> list[float]:
    """Of all cases and structures, in order."""
    return result.table.loc[result.table["metric"] == metric, "value"].tolist()


def test_scores_of_a_folder(folders, two_cases) -> None:
    result = evaluate_folder(*folders(two_cases, spacing=(0.5, 1.0, 2.0)), SOURCE)
    assert result.cases == ["x", "y"]
    assert values(result, "dice") == pytest.approx([0.75, 0, 1, math.nan], nan_ok=True)
    # moved along X, whose voxels are 0.5 mm
    diagonal = math.hypot(3.5, 7, 14)
    assert values(result, "hd95") == pytest.approx([0.5, diagonal, 0, math.nan], nan_ok=True)
    means = with_mean(result.table).query("metric == 'dice' and structure == 'mean of structures'")
    assert means["value"].tolist() == [0.375, 1]
    counts = table.count_states(result.table)
    assert counts.loc["mean of structures"].to_dict() == {"found": 2, "absent": 1, "missed": 1}
    assert counts.loc["b"].to_dict() == {"absent": 1, "missed": 1}


def test_several_processes_give_the_same(folders, two_cases) -> None:
    where = folders(two_cases)
    one, two = (evaluate_folder(*where, SOURCE, processes=number) for number in (1, 2))
    assert one.table.equals(two.table) and one.files.equals(two.files)


def test_an_error_in_a_process_arrives_as_one_line(folders, two_cases) -> None:
    ours, theirs = two_cases["y"]
    where = folders({**two_cases, "z": (ours + np.uint8(4), theirs)})
    with pytest.raises(ValueError, match=r"case z: the prediction .* holds the label 4, 5"):
        evaluate_folder(*where, SOURCE, processes=2)


def test_dice_and_layout_are_those_of_nnunet(folders, two_cases, tmp_path) -> None:
    truth = two_cases["x"][1].copy()
    truth[:, 2, :] = 3
    where = folders({**two_cases, "w": (two_cases["x"][0], truth)})
    result = evaluate_folder(*where, SOURCE)
    file = tmp_path / "ours.json"
    file.write_text(table.as_json(table.as_dict(result, "p", "t")))
    ours = load_summary_json(str(file))
    stock = tmp_path / "summary.json"
    compute_metrics_on_folder_simple(str(where[1]), str(where[0]), [1, 2], str(stock), 1, ignore_label=3)
    theirs = load_summary_json(str(stock))
    assert ours["foreground_mean"]["Dice"] == pytest.approx(theirs["foreground_mean"]["Dice"])
    for key in (1, 2):
        assert ours["mean"][key]["Dice"] == pytest.approx(theirs["mean"][key]["Dice"])
    for here, there in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert here["prediction_file"] == there["prediction_file"]
        for key in (1, 2):
            dice = here["metrics"][key]["Dice"]
            assert (math.nan if dice is None else dice) == pytest.approx(there["metrics"][key]["Dice"], nan_ok=True)


# --- which files belong together


def test_missing_and_extra_cases_are_listed(folders, two_cases) -> None:
    ours, theirs = folders({**two_cases, "z": two_cases["y"]})
    (ours / "x.nii.gz").unlink()
    (ours / "z.nii.gz").unlink()
    with pytest.raises(
        ValueError, match=r"cases x, z of .*labels are not in .*predictions: predict all cases.*--chill"
    ):
        evaluate_folder(ours, theirs, SOURCE)
    result = evaluate_folder(ours, theirs, SOURCE, chill=True)
    assert result.cases == ["y"] and any("(--chill): cases x, z" in line for line in table.definitions(result))
    assert evaluate_folder(ours, theirs, SOURCE, cases=["y"]).cases == ["y"]
    (theirs / "y.nii.gz").unlink()
    for chill in (False, True):
        with pytest.raises(ValueError, match=r"case y in .*predictions has no truth in .*labels"):
            evaluate_folder(ours, theirs, SOURCE, chill=chill)


def test_long_lists_are_cut() -> None:
    assert pairs.listed([str(i) for i in range(11)]) == "cases 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"


def test_folders_that_are_missing_or_empty(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        evaluate_folder(tmp_path / "no", tmp_path, SOURCE)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "truth").mkdir()
    with pytest.raises(ValueError, match=r"has no file that ends in .nii.gz"):
        evaluate_folder(tmp_path, tmp_path / "truth", SOURCE)


# --- grids


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"spacing": (1, 1, 1.1)}, r"case x: prediction and truth differ in spacing, \(1.1, 1, 1\) and \(1, 1, 1\)"),
        ({"origin": (0, 0.5, 0)}, r"case x: .* differ in origin, \(0, 0.5, 0\) and \(0, 0, 0\); --ignore-origin"),
        ({"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}, "case x: .* differ in direction, .*; one of them is turned"),
        (
            {"direction": (-1, 0, 0, 0, 1, 0, 0, 0, 1), "origin": (7, 0, 0)},
            "case x: .* differ in direction, .*Bring both",
        ),
    ],
)
def test_a_file_on_another_grid(geometry, message: str, folders, two_cases, label_file) -> None:
    ours, theirs = folders(two_cases)
    label_file(ours / "x.nii.gz", two_cases["x"][0], **geometry)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_folder(ours, theirs, SOURCE)
    assert ("--ignore-origin" in str(caught.value)) == (list(geometry) == ["origin"])  # no remedy for mirrored voxels
    relaxed = Source(LABELS, RULES, ignore_origin=True)
    if "spacing" in geometry:
        with pytest.raises(ValueError, match="differ in spacing"):
            evaluate_folder(ours, theirs, relaxed)
    else:
        result = evaluate_folder(ours, theirs, relaxed)
        found = result.files.set_index("case")["remark"].to_dict()
        assert found["y"] == "direction and origin not compared" and found["x"].endswith(
            f"differing: {', '.join(geometry)}"
        )
        (line,) = [line for line in table.definitions(result) if "--ignore-origin" in line]
        assert line.endswith("they differ in case x.")
        assert [row["remark"] for row in csv.DictReader(io.StringIO(table.as_csv(result)))][::2] == list(found.values())
        assert [case["remark"] for case in table.as_dict(result, "p", "t")["metric_per_case"]] == list(found.values())


def test_both_files_brought_to_one_orientation_as_advised(folders, two_cases, label_file) -> None:
    ours, theirs = folders(two_cases)
    flipped = two_cases["x"][1][:, :, ::-1].copy()
    label_file(theirs / "x.nii.gz", flipped, origin=(7, 0, 0), direction=(-1, 0, 0, 0, 1, 0, 0, 0, 1))
    with pytest.raises(ValueError, match="DICOMOrient"):
        evaluate_folder(ours, theirs, SOURCE)
    for folder in (ours, theirs):
        file = str(folder / "x.nii.gz")
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(file), "LPS"), file)
    assert values(evaluate_folder(ours, theirs, SOURCE), "dice")[0] == 0.75


def test_another_shape_fractions_and_broken_files(folders, two_cases, label_file) -> None:
    ours, theirs = folders(two_cases)
    label_file(ours / "x.nii.gz", two_cases["x"][0][:-1])
    with pytest.raises(ValueError, match="case x: the prediction has 7 x 8 x 8 voxels, the truth 8 x 8 x 8"):
        evaluate_folder(ours, theirs, SOURCE)
    label_file(ours / "x.nii.gz", two_cases["x"][0].astype(np.float32) * 0.5)
    with pytest.raises(ValueError, match=r"case x: the prediction .* holds fractions"):
        evaluate_folder(ours, theirs, SOURCE)
    (ours / "x.nii.gz").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"case x: the prediction .* cannot be read"):
        evaluate_folder(ours, theirs, SOURCE)


def test_2d_pictures(tmp_path) -> None:
    from PIL import Image

    label = np.zeros((12, 10), dtype=np.uint8)
    label[2:8, 2:8] = 1
    for folder, content in (("p", np.roll(label, 1, axis=1)), ("t", label)):
        (tmp_path / folder).mkdir()
        Image.fromarray(content).save(tmp_path / folder / "case.png")
    source = Source(Labels(LABELS.structures[:1]), RULES, ".png")
    result = evaluate_folder(tmp_path / "p", tmp_path / "t", source)
    assert values(result, "hd95") == [1.0]
    # a picture does not tell the size of its pixels
    assert result.metrics["hd95"].title == "HD95 [voxels]" and result.table["truth_ml"].isna().all()
    text = table.as_markdown(result, "x")
    assert "HD95 [voxels]" in text and "distances and tolerances are in voxels" in text and "1 voxels" in text
    assert '"truth_ml": null' in table.as_json(table.as_dict(result, "p", "t"))


def test_2d_files_that_tell_the_size_of_a_pixel(tmp_path, label_file) -> None:
    label = np.zeros((12, 10), dtype=np.uint8)
    label[2:8, 2:8] = 1
    for folder, content in (("p", np.roll(label, 1, axis=1)), ("t", label)):
        label_file(tmp_path / folder / "case.nii.gz", content, spacing=(2.0, 1.0))
    result = evaluate_folder(tmp_path / "p", tmp_path / "t", Source(Labels(LABELS.structures[:1]), RULES))
    assert values(result, "hd95") == [2.0] and result.table["truth_ml"].unique() == pytest.approx([36 * 2 / 100])
    assert any("square centimetres" in line for line in table.definitions(result))


def test_a_voxel_without_size(folders, two_cases, monkeypatch) -> None:
    where = folders(two_cases)
    stock = SimpleITKIO.read_seg

    def flat(self, path):
        label, properties = stock(self, path)
        return label, {**properties, "spacing": [0.0, 1.0, 1.0]}

    monkeypatch.setattr(SimpleITKIO, "read_seg", flat)
    with pytest.raises(ValueError, match="case x: the voxels measure 0 x 1 x 1 mm"):
        evaluate_folder(*where, SOURCE)


# --- which folder is which


@pytest.mark.parametrize("file", ["predict_from_raw_data_args.json", "plans.json", "summary.json"])
def test_swapped_folders_are_pointed_out(file: str, folders, two_cases) -> None:
    ours, theirs = folders(two_cases)
    (ours / file).write_text("{}")
    assert evaluate_folder(ours, theirs, SOURCE).cases == ["x", "y"]
    with pytest.raises(ValueError, match=f"look swapped: the folder of the truth, .*predictions, holds {file}"):
        evaluate_folder(theirs, ours, SOURCE)
    (theirs / file).write_text("{}")  # predictions against other predictions
    assert evaluate_folder(theirs, ours, SOURCE).cases == ["x", "y"]
    with pytest.raises(ValueError, match="are the same folder"):
        evaluate_folder(ours, ours.parent / "labels" / ".." / ours.name, SOURCE)


def test_label_values_that_no_file_holds(folders, two_cases) -> None:
    where = folders(two_cases)
    for values_, ignore, message in (
        ([1, 7], None, "no case has label 7:"),
        ([1], 9, "no case has label 9, which is to"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_folder(*where, Source(from_values(values_, ignore), RULES))


# --- tables and pictures


def test_summary_numbers() -> None:
    def summary(metric: str, *given: float) -> dict[str, float]:
        return table.summarise(pd.DataFrame({"metric": metric, "structure": "a", "value": given}))[metric, "a"]

    s = summary("dice", 1.0, 2.0, math.nan, 4.0)
    assert (s["n"], s["mean"], s["median"], s["worst"]) == (3, pytest.approx(7 / 3), 2.0, 1.0)
    assert s["sd"] == pytest.approx(np.std([1, 2, 4], ddof=1)) and (s["q1"], s["q3"]) == (1.5, 3.0)
    assert summary("hd95", 1.0, 5.0)["worst"] == 5.0
    assert summary("dice", math.nan)["n"] == 0 and math.isnan(summary("dice", 1.0)["sd"])


def test_table_json_and_csv(folders, two_cases) -> None:
    result = evaluate_folder(*folders(two_cases), SOURCE)
    text = table.as_markdown(result, "Title")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2][0] == "a" and rows[2][1].startswith("0.875 ± 0.177") and rows[2][4:] == ["2", "2", "0", "0"]
    assert rows[3][0] == "b" and rows[3][4:] == ["1 (absent in 1)", "0", "1", "0"]
    assert rows[4][0] == "mean of structures" and rows[4][4] == "2"
    assert "Worst cases by Dice: x (0.375), y (1.000)" in text
    for words in (
        "larger of the two directed",
        "Tolerance of NSD: 1 mm",
        "counts as the worst there is",
        "Ignore label 3",
    ):
        assert words in text
    content = json.loads(table.as_json(table.as_dict(result, "p", "t")))
    assert content["metric_per_case"][1]["metrics"]["2"] | {"truth_ml": 0} == {
        "Dice": None, "HD95": None, "NSD": None, "state": "absent", "truth_ml": 0, "prediction_ml": 0,
    }  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(table.as_csv(result))))
    assert len(lines) == 4 and lines[1]["state"] == "missed" and lines[3]["Dice"] == "" and lines[0]["Dice"] == "0.75"


def test_picture_has_a_panel_per_metric_and_a_cross_for_what_was_missed(
    folders, two_cases, tmp_path, monkeypatch
) -> None:
    figures = []
    save = plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    plot.draw(evaluate_folder(*folders(two_cases), SOURCE), tmp_path / "x.png", "Title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert [axes.get_title().split(",")[0] for axes in figure.axes] == ["Dice", "HD95 [mm]", "NSD"]
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [len(line.get_ydata()) for line in crosses] == [0, 1, 1]
