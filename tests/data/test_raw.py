"""Raw datasets: what is refused before anything long starts, each time with the case and the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.data.derive import link_images, link_label, new_dataset, write_json
from nnunetv2_ext.data.raw import measure, open_raw, require_consecutive_labels

SHAPE = (6, 8, 10)


def save(file: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 2.0)) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``raw(channels=1, **dataset_json)``: cases a, b and c of noise, with a box of label 1."""

    def make(channels: int = 1, ending: str = ".nii.gz", **content: Any) -> Path:
        for name in ("raw", "preprocessed", "results"):
            (tmp_path / name).mkdir()
            monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        folder = tmp_path / "raw" / "Dataset001_x"
        for sub in ("imagesTr", "labelsTr"):
            (folder / sub).mkdir(parents=True)
        label = np.zeros(SHAPE, np.uint8)
        label[2:4, 2:5, 2:5] = 1
        for n, case in enumerate("abc"):
            for channel in range(channels):
                noise = np.random.default_rng(n).normal(size=SHAPE).astype(np.float32)
                save(folder / f"imagesTr/{case}_{channel:04d}{ending}", noise)
            save(folder / f"labelsTr/{case}{ending}", label)
        basic = {"channel_names": {str(c): "MR" for c in range(channels)}, "labels": {"background": 0, "organ": 1}}
        basic |= {"numTraining": 3, "file_ending": ending}
        (folder / "dataset.json").write_text(json.dumps(basic | content))
        return folder

    return make


def refused(message: str, read: bool = True) -> None:
    with pytest.raises(ValueError, match=message) as error:
        dataset = open_raw(1)
        for case in dataset.cases if read else ():
            dataset.read_case(case)
    assert "\n" not in str(error.value)


def test_image_label_and_spacing_are_in_array_order(raw) -> None:
    raw(channels=2)
    image, label, properties = open_raw(1).read_case("b")
    assert image.shape == (2, *SHAPE) and image.dtype == np.float32
    assert np.array_equal(image[0, 0, 0], np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)[0, 0])
    assert label.sum() == 18 and list(properties["spacing"]) == [2.0, 1.0, 1.0]
    assert measure(open_raw(1), "b").spacing == (2.0, 1.0, 1.0)


def test_a_case_whose_image_or_label_is_missing_is_named(raw) -> None:
    folder = raw()
    image, label = folder / "imagesTr/b_0000.nii.gz", folder / "labelsTr/b.nii.gz"
    content = image.read_bytes()
    image.unlink()
    refused(r"case b of Dataset001_x has a label, but no image b_0000\.nii\.gz in imagesTr", read=False)
    image.write_bytes(content)
    (folder / "labelsTr/._b.nii.gz").touch()  # macOS leaves such files
    assert open_raw(1).cases == ["a", "b", "c"]
    label.unlink()
    refused(r"case b of Dataset001_x: \S*labelsTr/b\.nii\.gz is missing", read=False)


@pytest.mark.parametrize("case", ["a", "b"])  # nnU-Net chooses its reader by the first one
@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_damaged_file_is_named(raw, case: str, kind: str, capfd) -> None:
    folder = raw()
    file = folder / (f"imagesTr/{case}_0000.nii.gz" if kind == "image" else f"labelsTr/{case}.nii.gz")
    file.write_bytes(b"garbage")
    refused(f"case {case}: the {kind} {file} cannot be read")
    assert "Traceback" not in capfd.readouterr().err


def test_voxels_that_cannot_be_used_are_named(raw) -> None:
    folder = raw(ending=".nrrd")  # ITK reads NaN in NIfTI as 0
    image, label = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    image[1, 2, 3], image[1, 2, 4] = np.nan, np.inf
    save(folder / "imagesTr/b_0000.nrrd", image)
    refused(r"case b: the image \S*b_0000\.nrrd holds 2 values that are NaN or infinite")
    save(folder / "imagesTr/b_0000.nrrd", np.zeros(SHAPE, np.float32))
    for value, message in ((0.5, "holds fractions"), (np.nan, "holds fractions"), (7, r"holds label .* declare \(7\)")):
        label[0, 0, 0] = value
        save(folder / "labelsTr/b.nrrd", label)
        refused(rf"case b: .*labelsTr/b\.nrrd {message}")


def test_files_of_a_case_that_do_not_fit_are_named(raw) -> None:
    folder = raw(channels=2)
    save(folder / "labelsTr/b.nii.gz", np.zeros((5, 8, 10), np.uint8))
    refused(r"case b: the label has 5 x 8 x 10 voxels, the image 6 x 8 x 10 \(array order\)")
    save(folder / "labelsTr/b.nii.gz", np.zeros(SHAPE, np.uint8), (1.0, 1.0, 2.5))
    refused(r"case b: label and image differ in spacing, \(2\.5, 1, 1\) and \(2, 1, 1\)")
    save(folder / "labelsTr/b.nii.gz", np.zeros(SHAPE, np.uint8))
    save(folder / "imagesTr/b_0001.nii.gz", np.zeros((6, 8, 9), np.float32))
    refused(r"case b: the channel b_0000\.nii\.gz has 6 x 8 x 10 voxels, the channel b_0001\.nii\.gz 6 x 8 x 9")
    (folder / "imagesTr/b_0001.nii.gz").unlink()
    refused("case b of Dataset001_x has 1 image channels, and dataset.json declares 2")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"background": 0, "a": 1, "z": 5},
            r"are 0, 1, 5, but .*consecutive integers from 0: renumber them to 0 \.\.\. 2",
        ),
        ({"a": 1, "b": 2}, "are 1, 2, but"),
        ({"background": 0, "all": [1, 2], "core": 4}, "are 0, 1, 2, 4, but"),
        (
            {"background": 0, "ignore": 1, "a": 2},
            "ignore label of x is 1, but nnU-Net needs the highest value for it, 2",
        ),
        ({"background": 0, "a": "one"}, "not names with integers"),
        (["background", "a"], "not names with integers"),
    ],
)
def test_labels_that_nnunet_cannot_train_on(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_consecutive_labels(labels, "x")


def test_consecutive_labels_pass() -> None:
    require_consecutive_labels({"background": 0, "all": [1, 2], "core": 2, "ignore": 3}, "x")


def test_holes_in_the_labels_are_refused_before_any_file_is_read(raw) -> None:
    raw(labels={"background": 0, "organ": 2})
    refused("consecutive", read=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"labels": {}}', '{"file_ending": ".nii.gz"}'])
def test_an_unusable_dataset_json(raw, content: str) -> None:
    (raw() / "dataset.json").write_text(content)
    refused("Dataset001_x is not a complete raw dataset .*needs dataset.json, imagesTr and labelsTr", read=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_ending": "nii.gz"}, r"'file_ending' in dataset.json of Dataset001_x is 'nii.gz': write '\.nii\.gz'"),
        ({"file_ending": ".mha"}, r"imagesTr has no image that ends in \.mha: add the images, or correct"),
        ({"channel_names": ["MR"]}, 'has no "channel_names" such as'),
        ({"channel_names": {}}, 'has no "channel_names" such as'),
    ],
)
def test_a_dataset_json_that_nnunet_does_not_understand(raw, changes: dict[str, Any], message: str) -> None:
    raw(**changes)
    refused(message, read=False)


def test_an_image_without_a_channel_number_is_named(raw) -> None:
    folder = raw()
    (folder / "imagesTr/b_0000.nii.gz").rename(folder / "imagesTr/b.nii.gz")
    refused(r"imagesTr/b\.nii\.gz has no channel number: name it CASE_0000\.nii\.gz", read=False)


# ---- files that dataset.json lists


@pytest.fixture
def listed(raw) -> Path:
    """Images of b are .nrrd and lie beside dataset.json, which lists them."""
    folder = raw()
    files: dict[str, dict[str, Any]] = {}
    for case in "abc":
        image = folder / f"scan_{case}{'.nrrd' if case == 'b' else '.nii.gz'}"
        sitk.WriteImage(sitk.ReadImage(str(folder / f"imagesTr/{case}_0000.nii.gz")), str(image))
        (folder / f"imagesTr/{case}_0000.nii.gz").unlink()
        files[case] = {"images": [image.name], "label": f"labelsTr/{case}.nii.gz"}
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"dataset": files}))
    return folder


def test_a_derived_dataset_keeps_the_ending_of_every_file(listed: Path) -> None:
    """Linked under the ending of its own file, and read by nnU-Net and by us."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    source = open_raw(1)
    with new_dataset(source, 2) as folder:
        for case in source.cases:
            link_images(source, case, folder / "imagesTr")
            link_label(source, case, folder / "labelsTr")
        write_json(source, 2, folder, source.cases, {})
    copy = open_raw(2)
    assert sorted(p.name for p in (copy.folder / "imagesTr").iterdir()) == [
        "a_0000.nii.gz",
        "b_0000.nrrd",
        "c_0000.nii.gz",
    ]
    assert all(np.array_equal(copy.read_case(c)[0], source.read_case(c)[0]) for c in "abc")
    assert set(get_filenames_of_train_images_and_targets(str(copy.folder))) == set("abc")


def test_the_list_is_left_out_where_the_names_say_it_all(raw) -> None:
    raw()
    source = open_raw(1)
    with new_dataset(source, 2) as folder:
        write_json(source, 2, folder, ["a"], {})
        content = json.loads((folder / "dataset.json").read_text())
    assert "dataset" not in content and content["numTraining"] == 1


def test_a_test_image_that_prediction_would_not_find_is_refused(listed: Path, tmp_path: Path) -> None:
    source = open_raw(1)
    link_images(source, "a", tmp_path / "imagesTs")
    with pytest.raises(ValueError, match=r"case b: \S*scan_b\.nrrd does not end in \.nii\.gz"):
        link_images(source, "b", tmp_path / "imagesTs")


def test_a_listed_file_that_is_missing_or_a_label_of_another_ending(listed: Path) -> None:
    (listed / "scan_b.nrrd").rename(listed / "elsewhere.nrrd")
    refused(r"case b of Dataset001_x: \S*scan_b\.nrrd is missing", read=False)
    content = json.loads((listed / "dataset.json").read_text())
    content["dataset"]["b"] = {"images": ["elsewhere.nrrd"], "label": "elsewhere.nrrd"}
    (listed / "dataset.json").write_text(json.dumps(content))
    refused(r"case b of Dataset001_x: the label \S*elsewhere\.nrrd does not end in \.nii\.gz", read=False)
