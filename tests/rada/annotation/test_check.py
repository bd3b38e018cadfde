"""``nnUNetv2_ext check-planes``: the report, the picture, the exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.figure import Figure
from PIL import Image

from nnunetv2_ext.cli.dispatch import main
from nnunetv2_ext.data.fingerprint import MARK, PROPERTIES
from nnunetv2_ext.rada.annotation import picture
from nnunetv2_ext.rada.annotation.picture import AXIS_COLOURS, CaseView, draw_planes
from nnunetv2_ext.rada.annotation.planes import find_planes
from tests.conftest import TinyDataset


@pytest.fixture
def base(sparse_tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The preprocessed dataset's folder, copied."""
    for key, value in sparse_tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    shutil.copytree(sparse_tiny.preprocessed, tmp_path / "preprocessed")
    return tmp_path / "preprocessed" / sparse_tiny.name


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_report_and_picture(base: Path, tmp_path: Path, capsys) -> None:
    assert main(["check-planes", "-d", "2", "-c", "3d_fullres", "-p", "tiny", "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    recorded = json.loads((base / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]["labelled"]
    for case, entry in recorded.items():
        planes = "  ".join(f"axis{axis} [{indices[0]}]" for axis, indices in enumerate(entry["planes"]))
        assert f"{case}  {planes}  " in out
    assert "total: 4 labelled and 4 unlabelled cases; planes axis0 4, axis1 4, axis2 4" in out
    assert "all 12 planes of the raw labels are found" in out
    assert "fold 3: 3 labelled and 4 unlabelled cases train, 1 validate" in out
    assert "WARNING" not in out
    with Image.open(tmp_path / "out" / "planes_tiny_3d_fullres.png") as picture:
        assert picture.width > 800 and picture.height > 800


def test_erased_plane_is_exit_status_1(base: Path, capsys) -> None:
    """A raw label with one more plane than the preprocessed one."""
    case, entry = next(
        iter(json.loads((base / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]["labelled"].items())
    )
    file = base / "gt_segmentations" / f"{case}.nii.gz"
    image = sitk.ReadImage(str(file))
    label = sitk.GetArrayFromImage(image)
    index = (entry["planes"][0][0] + label.shape[0] // 2) % label.shape[0]
    label[index] = 0
    changed = sitk.GetImageFromArray(label)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(file))
    assert main(["check-planes", "-d", "2", "-p", "tiny", "--cases", "0"]) == 1
    out = capsys.readouterr().out
    assert f"LOST {case}: axis 0, slice {index} of the raw label's axis 0 (z), spacing 1 -> 1 mm" in out
    assert "erased 1 of 13 annotated planes" in out and "--thicken-only" in out
    assert main(["check-planes", "-d", "2", "-p", "tiny", "--json"]) == 1
    [lost] = json.loads(capsys.readouterr().out)["lost"]
    assert (lost["case"], lost["raw_axis"], lost["index"]) == (case, 0, index)


def test_the_keys_of_the_json(base: Path, tmp_path: Path, capsys) -> None:
    """Programs rely on them: keys may be added, none may go."""
    assert main(["check-planes", "-d", "2", "-p", "tiny", "--json", "-o", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"nnunetv2_ext", "dataset", "plans", "configuration", "cases", "lost", "warnings"}
    assert found["lost"] == found["warnings"] == [] and len(found["cases"]) == 8
    recorded = json.loads((base / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]["labelled"]
    for case, entry in found["cases"].items():
        assert set(entry) == {"labelled", "planes", "share", "loose_voxels"}
        assert entry["planes"] == (recorded[case]["planes"] if case in recorded else [[], [], []])
    assert not (tmp_path / "out").exists()


def test_ct_without_correction_and_a_stock_split_are_warned_about(base: Path, capsys) -> None:
    plans = json.loads((base / "tiny.json").read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    (base / "tiny.json").write_text(json.dumps(plans))
    cases = sorted(p.name.removesuffix("_seg.b2nd") for p in (base / "nnUNetPlans_3d_fullres").glob("*_seg.b2nd"))
    (base / "splits_final.json").write_text(json.dumps([{"train": cases[1:], "val": cases}]))
    assert main(["check-planes", "-d", "2", "-p", "tiny", "--cases", "0"]) == 0
    out = capsys.readouterr().out
    assert "fix-fingerprint -d Dataset002_Phantom" in out and PROPERTIES in plans
    assert "4 of 8 validation cases have no annotation" in out


def test_ct_preprocessed_before_the_correction_is_warned_about(base: Path, capsys) -> None:
    plans = json.loads((base / "tiny.json").read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    images = [p for p in (base / "nnUNetPlans_3d_fullres").glob("*.b2nd") if not p.name.endswith("_seg.b2nd")]
    newest = max(p.stat().st_mtime for p in images)
    for seconds, stale in ((newest + 1, True), (newest - 1e6, False)):
        (base / "tiny.json").write_text(json.dumps(plans | {MARK: {"corrected_at": seconds}}))
        assert main(["check-planes", "-d", "2", "-p", "tiny", "--cases", "0"]) == 0
        out = capsys.readouterr().out
        assert (
            "WARNING: 8 of 8 images" in out and "run nnUNetv2_preprocess -d Dataset002_Phantom again" in out
        ) == stale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "9"], "there is no dataset 9 in"),
        (["-d", "2", "-p", "absent"], "there are no plans absent in"),
        (["-d", "2", "-c", "3d_lowres"], "no configuration '3d_lowres': -c takes"),
        (["-d", "2", "-c", "2d"], "configuration 2d is 2-D"),
        (["-d", "2", "-p", "tiny", "--cases", "-1"], "--cases is the number of cases in the picture"),
    ],
)
def test_what_cannot_be_checked(base: Path, capsys, arguments: list[str], message: str) -> None:
    assert main(["check-planes", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_dataset_without_ignore_label_or_with_regions(base: Path, capsys) -> None:
    edit(base / "dataset.json", labels={"background": 0, "organ_1": 1, "organ_2": 2})
    assert main(["check-planes", "-d", "2", "-p", "tiny"]) == 2
    assert "no ignore label" in capsys.readouterr().err
    labels = {"background": 0, "whole": [1, 2], "organ_2": 2, "ignore": 3}
    edit(base / "dataset.json", labels=labels, regions_class_order=[1, 2])
    assert main(["check-planes", "-d", "2", "-p", "tiny"]) == 2
    assert "regions" in capsys.readouterr().err


def test_nothing_annotated(base: Path, capsys) -> None:
    """All labels replaced by that of an unlabelled case."""
    content = json.loads((base / "dataset.json").read_text())
    folder = base / "nnUNetPlans_3d_fullres"
    labelled = content["nnunetv2_ext"]["sparsify"]["labelled"]
    empty = next(p for p in sorted(folder.glob("*_seg.b2nd")) if p.name.removesuffix("_seg.b2nd") not in labelled)
    for case in labelled:
        shutil.copy(empty, folder / f"{case}_seg.b2nd")
    assert main(["check-planes", "-d", "2", "-p", "tiny"]) == 2
    assert "none of the 8 cases has any annotation" in capsys.readouterr().err


def test_picture_shows_the_plane_its_frame_and_where_others_cross(tmp_path: Path) -> None:
    label = np.full((20, 24, 28), 3, dtype=np.int16)
    label[6], label[:, 9] = 0, 0
    label[6, 5:15, 6:20] = 1
    view = CaseView("case", np.random.RandomState(0).rand(*label.shape), label, find_planes(label, 3))
    file = tmp_path / "planes.png"
    draw_planes([view], file, {1: "organ", 3: "ignore"}, (1, 1, 1), 3, "title")
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int).reshape(-1, 3)

    def count(colour: str) -> int:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return int((np.abs(pixels - rgb).max(axis=1) < 12).sum())

    red, green, blue = map(count, AXIS_COLOURS)
    assert red > 300 and green > 300 and blue == 0  # frames of axes 0 and 1; axis 2 has no plane, so none
    assert count("#E69F00") > 100  # the organ's outline
    assert count("#FF2FD0") == 0  # ignore is not drawn


def test_planes_cross_where_the_upright_picture_shows_them_and_the_rest_is_hatched(tmp_path: Path, monkeypatch) -> None:
    """Of a scan whose rows run from back to front and whose columns run from left to right."""
    drawn: list[Figure] = []
    monkeypatch.setattr(picture, "Figure", lambda *args, **how: drawn.append(Figure(*args, **how)) or drawn[-1])
    label = np.full((20, 24, 28), 3, dtype=np.int16)
    label[6], label[:, 9], label[:, :, 4] = 0, 0, 0
    backwards = np.array([[0.0, 0, 1], [0, -1, 0], [-1, 0, 0]])
    view = CaseView("case", np.random.RandomState(0).rand(*label.shape), label, find_planes(label, 3), backwards)
    draw_planes([view], tmp_path / "p.png", {1: "organ", 3: "ignore"}, (1, 1, 1), 3, "title")
    axial, coronal, sagittal = drawn[0].axes
    assert "axis0 (axial, slice 6)" in axial.get_title() and "axis2 (sagittal, slice 4)" in sagittal.get_title()
    lines = {
        line.get_color(): line.get_xydata()[:, 0].tolist() + line.get_xydata()[:, 1].tolist() for line in axial.lines
    }
    assert lines == {AXIS_COLOURS[2]: [23, 23, 0, 1], AXIS_COLOURS[1]: [0, 1, 14, 14]}
    assert [t.get_text() for t in coronal.texts] == ["R", "L", "S", "I"]
    assert [t.get_text() for t in sagittal.texts] == ["A", "P", "S", "I"]
    stripes = coronal.images[-1].get_array()[..., 3] > 0
    assert not stripes.any(), "the whole plane is annotated"
    label[:, :, 4] = 3
    draw_planes([view._replace(planes=find_planes(label, 3))], tmp_path / "p.png", {1: "organ"}, (1, 1, 1), 3, "title")
    sagittal = drawn[1].axes[2]
    assert sagittal.get_title().endswith(": no plane")
    fine = sagittal.images[-1].get_array()[..., 3] > 0
    found = fine.reshape(20, fine.shape[0] // 20, 24, fine.shape[1] // 24).any((1, 3))
    index = int(sagittal.get_title().split("slice ")[1].split(")")[0])
    assert np.array_equal(found, label[::-1, ::-1, index] == 3)
