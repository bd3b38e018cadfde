"""The annotations of preprocessed cases, its cache, and the check that every drawn plane is still there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_ext.rada.annotation import annotations
from nnunetv2_ext.rada.annotation.annotations import (
    Annotation,
    log_lines,
    require_annotations,
    survey_label,
    warnings,
)
from nnunetv2_ext.rada.annotation.cases import cache_root
from nnunetv2_ext.rada.annotation.lost import erased_annotations, lost_planes, require_planes_survived, unmatched
from nnunetv2_ext.rada.annotation.planes import Planes, find_planes
from nnunetv2_ext.rada.annotation.preprocessed import SparsePreprocessed, open_sparse
from tests.conftest import TinyDataset

IGNORE = 3


@pytest.fixture
def data(sparse_tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SparsePreprocessed]:
    """A copy of the preprocessed dataset that a test may spoil."""
    copy = tmp_path / "preprocessed"
    shutil.copytree(sparse_tiny.preprocessed, copy)
    for key, value in sparse_tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("nnUNet_preprocessed", str(copy))
    yield open_sparse(sparse_tiny.dataset_id, "3d_fullres")


@pytest.fixture
def labelled(data: SparsePreprocessed) -> list[str]:
    return sorted(data.dataset_json["nnunetv2_ext"]["sparsify"]["labelled"])


def survey_of(data: SparsePreprocessed, cases: list[str]) -> dict[str, Annotation]:
    """Of some of the cases."""
    part = replace(data)
    part.__dict__["cases"] = cases
    return part.survey()


def test_planes_of_every_case_are_those_of_the_provenance(data: SparsePreprocessed, labelled: list[str]) -> None:
    """Nothing is cropped, transposed or resampled in this dataset, so the indices are the raw ones."""
    found = data.survey()
    planes = {case: annotation.planes for case, annotation in found.items()}
    recorded = data.dataset_json["nnunetv2_ext"]["sparsify"]["labelled"]
    assert {case for case, p in planes.items() if p} == set(labelled)
    for case in labelled:
        assert [list(i) for i in planes[case].indices] == recorded[case]["planes"]


def test_cache_is_used_until_a_label_changes(data: SparsePreprocessed, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, cache = data.cases, cache_root(data.base)
    shutil.rmtree(cache, ignore_errors=True)  # another test's training may have written it before the copy
    listing = sorted(p.name for p in data.folder.iterdir())
    looked_at: list[int] = []

    def counted(label: np.ndarray, ignore: int) -> Annotation:
        looked_at.append(1)
        return survey_label(label, ignore)

    monkeypatch.setattr(annotations, "survey_label", counted)
    first = survey_of(data, cases[:5])
    assert len(looked_at) == 5
    assert {case: found for case, found in data.survey().items() if case in first} == first
    assert len(looked_at) == len(cases)
    looked_at.clear()
    assert survey_of(data, cases[:5]) == first and not looked_at
    label = data.folder / f"{cases[0]}_seg.b2nd"
    shutil.copy(data.folder / f"{cases[1]}_seg.b2nd", label)
    assert data.survey()[cases[0]] == first[cases[1]] and len(looked_at) == 1
    (entry,) = cache.glob(f"planes_*/{cases[2]}.*.json")
    entry.write_text("{broken")
    data.survey()
    assert len(looked_at) == 2 and json.loads(entry.read_text())["values"]
    with pytest.raises(ValueError, match=r"holds 3, which dataset.json does not declare"):
        replace(data, ignore=data.ignore + 1).survey()
    assert len(looked_at) == 2 + len(cases)  # found under another ignore label
    assert sorted(p.name for p in data.folder.iterdir()) == listing  # an extra file there would break nnU-Net


def test_missing_case(data: SparsePreprocessed) -> None:
    with pytest.raises(ValueError, match=r"nobody is not in .* preprocess the dataset again"):
        survey_of(data, ["nobody"])


def test_all_planes_survived(data: SparsePreprocessed) -> None:
    annotations = data.survey()
    assert lost_planes(data, annotations) == []
    require_planes_survived(data, annotations)


def test_erased_plane_stops_with_case_slice_spacing_and_remedy(data: SparsePreprocessed, labelled: list[str]) -> None:
    case = labelled[1]
    annotations = data.survey()
    planes = annotations[case].planes
    annotations[case] = replace(annotations[case], planes=Planes((planes.indices[0], (), planes.indices[2])))
    _spoil_label(data, case, planes.indices[1][0])
    with pytest.raises(ValueError) as caught:
        require_planes_survived(data, annotations)
    message = str(caught.value)
    index = data.dataset_json["nnunetv2_ext"]["sparsify"]["labelled"][case]["planes"][1][0]
    assert f"{case}: axis 1, slice {index} of the raw label's axis 1 (y), spacing 1 -> 1 mm" in message
    assert "sparsify -d 2 -o NEW_ID --thicken-only" in message


def _spoil_label(data: SparsePreprocessed, case: str, index: int) -> None:
    """Erase plane `index` of axis 1 from a preprocessed label."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    image, label, _, properties = nnUNetDatasetBlosc2(str(data.folder), [case]).load_case(case)
    image, label = np.asarray(image[:]), np.asarray(label[:]).copy()
    label[0, :, index] = IGNORE
    for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
        (data.folder / f"{case}{suffix}").unlink()
    nnUNetDatasetBlosc2.save_case(image, label, properties, str(data.folder / case))


def test_plane_of_air_that_became_outside_is_not_lost(data: SparsePreprocessed, labelled: list[str]) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    case = labelled[0]
    truth = data.base / "gt_segmentations" / f"{case}.nii.gz"
    image = sitk.ReadImage(str(truth))
    raw = sitk.GetArrayFromImage(image)
    raw[0] = 0  # drawn as background through air ...
    changed = sitk.GetImageFromArray(raw)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(truth))
    volume, label, _, properties = nnUNetDatasetBlosc2(str(data.folder), [case]).load_case(case)
    volume, label = np.asarray(volume[:]), np.asarray(label[:]).copy()
    assert [lost.index for lost in lost_planes(data, data.survey())] == [0]
    label[0, 0] = -1  # ... which nnU-Net marks as outside
    for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
        (data.folder / f"{case}{suffix}").unlink()
    nnUNetDatasetBlosc2.save_case(volume, label, properties, str(data.folder / case))
    annotations = data.survey()
    assert 0 not in annotations[case].planes.indices[0]
    assert lost_planes(data, annotations) == []


def test_scribbles_and_classes_that_preprocessing_erased_are_named(
    data: SparsePreprocessed, labelled: list[str]
) -> None:
    """Two annotated cases without planes, one of which lost everything, and one with planes that lost a class."""
    annotations = data.survey()
    assert erased_annotations(data, annotations) == []
    gone, kept = [case for case in sorted(annotations) if case not in labelled][:2]
    for case in (gone, kept):
        truth = data.base / "gt_segmentations" / f"{case}.nii.gz"
        image = sitk.ReadImage(str(truth))
        raw = sitk.GetArrayFromImage(image)
        raw[5, 5:9, 5:9] = 1
        changed = sitk.GetImageFromArray(raw)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(truth))
    annotations[kept] = Annotation(Planes(), 0.01, 9, (1,))
    annotations[labelled[0]] = replace(annotations[labelled[0]], values=(0, 1))
    lines = erased_annotations(data, annotations)
    assert all(line.startswith("WARNING: ") for line in lines) and len(lines) == 2
    assert any(f"of organ_2 in {labelled[0]}" in line for line in lines)
    assert any(gone in line and "all of it: it counts as one of the 3 unlabelled cases" in line for line in lines)
    assert lost_planes(data, annotations) == []


def test_transpose_crop_and_resampling_are_followed(data: SparsePreprocessed, labelled: list[str]) -> None:
    """Raw planes of a transposed, cropped and coarser case, against positions computed by hand."""
    from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle

    case = labelled[0]
    properties_file = str(data.folder / f"{case}.pkl")
    raw = np.full((20, 30, 40), IGNORE, dtype=np.uint8)
    raw[:, :, 11] = 1
    sitk.WriteImage(sitk.GetImageFromArray(raw), str(data.base / "gt_segmentations" / f"{case}.nii.gz"))
    data.plans.plans["transpose_forward"] = [2, 0, 1]
    properties = load_pickle(properties_file)
    properties["bbox_used_for_cropping"] = [[4, 40], [0, 20], [0, 30]]
    properties["shape_after_cropping_and_before_resampling"] = (36, 20, 30)
    properties["spacing"] = [1.0, 1.0, 0.5]
    write_pickle(properties, properties_file)
    # slice 11 - 4 = 7 of 36 half-millimetre slices becomes (7 + 0.5) / 2 - 0.5 = 3.25 of 18
    for found, lost in (((3,), []), ((4,), []), ((2,), [11]), ((5,), [11]), ((), [11])):
        annotations = {case: Annotation(Planes((found, (), ())), 0.1, 0, (1,))}
        missing = lost_planes(data, annotations)
        assert [(p.axis, p.raw_axis, p.index, p.spacing) for p in missing] == [(0, 2, i, (0.5, 1.0)) for i in lost]


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        (((4,), (), ()), ((4,), (), ()), []),
        (((4,), (), ()), ((5,), (), ()), []),
        (((4,), (), ()), ((6,), (), ()), [(0, 4)]),
        (((), (9,), ()), ((), (4,), ()), []),  # 9 of 20 -> 4.25 of 10
        (((), (9,), ()), ((9,), (), (9,)), [(1, 9)]),
    ],
)
def test_counterparts(before, after, missing) -> None:
    assert unmatched(Planes(before), Planes(after), (20, 20, 20), (20, 10, 20)) == missing


# ---- what the log says


def annotated(**planes: Any) -> Annotation:
    return Annotation(**{"planes": Planes(((5,), (7,), (9,))), "share": 0.041, "loose": 0, "values": (0, 1), **planes})


UNLABELLED = Annotation(Planes(), 0.0, 0, ())
LABELS = {"background": 0, "organ": 1, "ignore": 3}


def test_one_line_per_labelled_case_and_a_total() -> None:
    lines = log_lines({"case_1": annotated(), "case_10": annotated(planes=Planes(((1, 2), (), ()))), "u": UNLABELLED})
    assert lines == [
        "case_1   axis0 [5]  axis1 [7]  axis2 [9]  4.1 % annotated",
        "case_10  axis0 [1,2]  axis1 []  axis2 []  4.1 % annotated",
        "total: 2 labelled and 1 unlabelled cases; planes axis0 3, axis1 1, axis2 1",
    ]


def test_scribbles_are_told_from_planes() -> None:
    label = np.full((12, 12, 12), IGNORE)
    label[2:5, 3, 4] = 1
    scribble = survey_label(label, IGNORE)
    assert scribble.labelled and not scribble.planes and scribble.loose == 3
    assert "scribbles only" in scribble.describe()
    label[9] = 0
    both = survey_label(label, IGNORE)
    assert both.planes == Planes(((9,), (), ())) and both.describe().endswith("3 labelled voxels on no plane")
    assert UNLABELLED.describe() == "unlabelled"
    assert not survey_label(np.full((4, 4, 4), IGNORE), IGNORE).labelled


def test_outside_alone_is_not_labelled() -> None:
    label = np.full((6, 6, 6), IGNORE)
    label[0] = -1
    assert not survey_label(label, IGNORE).labelled and find_planes(label, IGNORE) == Planes()


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ({"a": annotated(), "u": UNLABELLED}, []),
        ({"a": annotated()}, ["no unlabelled case"]),
        ({"a": annotated(planes=Planes(((5,), (), ()))), "u": UNLABELLED}, ["axis 0 only"]),
        ({"a": annotated(planes=Planes(((5,), (), (3,)))), "u": UNLABELLED}, ["axes 0 and 2 only"]),
        (
            {"a": annotated(planes=Planes(), loose=4), "u": UNLABELLED},
            ["no case has an annotated plane", "on no plane"],
        ),
        ({"a": annotated(values=(0,)), "u": UNLABELLED}, ["nowhere annotated: organ"]),
    ],
)
def test_warnings(annotations, words) -> None:
    found = warnings(annotations, LABELS)
    assert len(found) == len(words)
    assert all(word in line and line.startswith("WARNING: ") for word, line in zip(words, found))


def test_nothing_annotated_and_undeclared_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 2 cases has any annotation"):
        require_annotations({"u": UNLABELLED, "v": UNLABELLED}, {0, 1})
    with pytest.raises(ValueError, match=r"label of a holds 7, which dataset.json does not declare"):
        require_annotations({"a": annotated(values=(0, 7))}, {0, 1})
    require_annotations({"a": annotated(), "u": UNLABELLED}, {0, 1})
