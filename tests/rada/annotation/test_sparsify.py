"""Dense datasets made sparse, sparse ones thickened: what is written, what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_ext.cli.dispatch import main
from nnunetv2_ext.phantom import write_phantom_dataset
from nnunetv2_ext.rada.annotation import sparsify as sparsify_module
from nnunetv2_ext.rada.annotation.lost import lost_planes, require_planes_survived
from nnunetv2_ext.rada.annotation.planes import find_planes, on_planes
from nnunetv2_ext.rada.annotation.preprocessed import open_sparse
from nnunetv2_ext.rada.annotation.sparsify import SparsifyOptions, sparsify, thicken_dataset
from tests.conftest import TinyDataset, run_command
from tests.rada.sparse_data import add_lowres, plan_and_preprocess


def read(file: Path) -> np.ndarray:
    """(Z, Y, X), as nnU-Net reads it."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def cases_of(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix(".nii.gz") for p in folder.glob("*.nii.gz"))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders; returns nnUNet_raw."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw"


@pytest.fixture
def phantom(world: Path) -> Callable[..., Path]:
    """``phantom(dataset_id=1, **options)`` in nnUNet_raw."""

    def write(dataset_id: int = 1, **options: Any) -> Path:
        options = {"num_train": 6, "num_test": 0, "shape": (16, 18, 20), "num_organs": 2, **options}
        return write_phantom_dataset(world, dataset_id, **options)

    return write


def test_labels_hold_three_planes_and_nothing_else(sparse_tiny: TinyDataset) -> None:
    folder, dense = sparse_tiny.raw / sparse_tiny.name, sparse_tiny.raw / "Dataset001_Phantom"
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "organ_1": 1, "organ_2": 2, "ignore": 3}
    block = content["nnunetv2_ext"]["sparsify"]
    train = cases_of(folder / "labelsTr")
    assert content["numTraining"] == len(train) == 8
    assert set(block["labelled"]) <= set(train) and len(block["labelled"]) == 4
    for case in train:
        label, truth = read(folder / "labelsTr" / f"{case}.nii.gz"), read(dense / "labelsTr" / f"{case}.nii.gz")
        if case not in block["labelled"]:
            assert (label == 3).all()
            continue
        planes = find_planes(label, 3)
        assert [list(i) for i in planes.indices] == block["labelled"][case]["planes"]
        assert [len(i) for i in planes.indices] == [1, 1, 1]
        shown = on_planes(label.shape, planes)
        assert np.array_equal(label[shown], truth[shown]) and (label[~shown] == 3).all()
        assert all((np.take(truth, i[0], a) > 0).any() for a, i in enumerate(planes.indices))


def test_provenance_is_complete(sparse_tiny: TinyDataset) -> None:
    block = sparse_tiny.dataset_json()["nnunetv2_ext"]["sparsify"]  # nnU-Net copies dataset.json when it plans
    assert block["source"] == "Dataset001_Phantom"
    assert (block["rule"], block["seed"], block["axes"]) == ("largest", 0, [0, 1, 2])
    assert block["target_spacing"] == [1.0, 1.0, 1.0] and block["target_spacing_from"]
    assert block["classes_on_no_plane"] == [] and block["subjects"] is None
    assert len(block["test"]) == 2
    for entry in block["labelled"].values():
        assert [[s[0], s[1]] for s in entry["slabs"]] == [[a, p[0]] for a, p in enumerate(entry["planes"])]


def test_dense_truth_is_set_aside_and_images_are_linked(sparse_tiny: TinyDataset) -> None:
    folder, dense = sparse_tiny.raw / sparse_tiny.name, sparse_tiny.raw / "Dataset001_Phantom"
    block = json.loads((folder / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert cases_of(folder / "labelsTs") == block["test"]
    assert not set(block["test"]) & set(cases_of(folder / "labelsTr"))
    for part, case in [("Tr", cases_of(folder / "labelsTr")[0]), ("Ts", block["test"][0])]:
        image = f"{case}_0000.nii.gz"
        assert os.path.samefile(folder / f"images{part}" / image, dense / "imagesTr" / image)
        truth = folder / ("labelsTr_dense" if part == "Tr" else "labelsTs") / f"{case}.nii.gz"
        assert os.path.samefile(truth, dense / "labelsTr" / f"{case}.nii.gz")
    assert sorted(p.name for p in folder.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "imagesTs",
        "labelsTr",
        "labelsTr_dense",
        "labelsTs",
    ]


def test_split_is_where_nnunet_looks(sparse_tiny: TinyDataset) -> None:
    splits = json.loads((sparse_tiny.preprocessed / sparse_tiny.name / "splits_final.json").read_text())
    labelled = set(sparse_tiny.dataset_json()["nnunetv2_ext"]["sparsify"]["labelled"])
    assert len(splits) == 4
    assert {case for fold in splits for case in fold["val"]} == labelled
    assert all(len(fold["train"]) == 7 for fold in splits)


def test_hidden_labels_do_not_matter(phantom, world: Path) -> None:
    """Noise off the chosen planes of the source changes no byte of labelsTr."""
    source = phantom()
    sparsify(1, 2, SparsifyOptions(2, rule="middle"))
    first = json.loads((world / "Dataset002_Phantom" / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    random = np.random.RandomState(0)
    for file in sorted((source / "labelsTr").iterdir()):
        image = sitk.ReadImage(str(file))
        label = sitk.GetArrayFromImage(image)
        case = file.name.removesuffix(".nii.gz")
        hidden = label > 0  # within the extent, so that "middle" stays where it is
        for axis, indices in enumerate(first["labelled"].get(case, {"planes": [[], [], []]})["planes"]):
            hidden[(slice(None),) * axis + (indices,)] = False
        label[hidden] = random.randint(1, 3, hidden.sum())
        noisy = sitk.GetImageFromArray(label)
        noisy.CopyInformation(image)
        sitk.WriteImage(noisy, str(file))
    sparsify(1, 3, SparsifyOptions(2, rule="middle"))
    for case in cases_of(world / "Dataset002_Phantom" / "labelsTr"):
        a, b = (read(world / f"Dataset00{i}_Phantom" / "labelsTr" / f"{case}.nii.gz") for i in (2, 3))
        assert np.array_equal(a, b)


def test_the_seed_decides(phantom, world: Path) -> None:
    phantom()
    chosen = []
    for dataset_id, seed in ((2, 0), (3, 0), (4, 1), (5, 2)):
        folder = sparsify(1, dataset_id, SparsifyOptions(2, seed=seed, test_share=0.17))
        block = json.loads((folder / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
        chosen.append((block["test"], block["labelled"]))
    assert chosen[0] == chosen[1]
    assert len({json.dumps(c) for c in chosen}) > 1


def test_geometry_and_ending_are_kept(phantom, world: Path) -> None:
    source = phantom(num_train=3, spacing=(0.5, 2.0, 1.5))
    direction = (0, 1, 0, 1, 0, 0, 0, 0, -1)
    for file in [*(source / "imagesTr").iterdir(), *(source / "labelsTr").iterdir()]:
        image = sitk.ReadImage(str(file))
        image.SetDirection(direction)
        image.SetOrigin((10, -20, 30))
        sitk.WriteImage(image, str(file).replace(".nii.gz", ".nrrd"))
        file.unlink()
    content = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(content | {"file_ending": ".nrrd"}))
    folder = sparsify(1, 2, SparsifyOptions(1))
    files = sorted((folder / "labelsTr").iterdir())
    assert len(files) == 3 and all(f.suffix == ".nrrd" for f in files)
    label = sitk.ReadImage(str(files[0]))
    assert label.GetSpacing() == pytest.approx((0.5, 2.0, 1.5))
    assert label.GetDirection() == direction and label.GetOrigin() == (10, -20, 30)


@pytest.fixture
def mixed(phantom, world: Path) -> Path:
    """Four cases of 1 mm, which decide the spacing, and one of 0.4 mm; returns nnUNet_raw."""
    phantom(num_train=4, vary_size=False)
    phantom(2, num_train=1, spacing=(0.4, 0.4, 0.4), name="Fine", vary_size=False, shape=(30, 34, 38))
    for kind in ("images", "labels"):
        (file,) = (world / "Dataset002_Fine" / f"{kind}Tr").iterdir()
        os.link(file, world / "Dataset001_Phantom" / f"{kind}Tr" / file.name)
    dataset_json = world / "Dataset001_Phantom" / "dataset.json"
    dataset_json.write_text(json.dumps(json.loads(dataset_json.read_text()) | {"numTraining": 5}))
    return world


def test_planes_are_thickened_where_the_case_is_finer_than_the_plans(mixed: Path) -> None:
    folder = sparsify(1, 3, SparsifyOptions(5))
    labelled = json.loads((folder / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]["labelled"]
    assert [s[2] - s[1] + 1 for s in labelled["fine_000"]["slabs"]] == [3, 3, 3]
    assert [s[2] - s[1] + 1 for s in labelled["phantom_000"]["slabs"]] == [1, 1, 1]


def test_erased_planes_are_reported_and_thicken_only_is_the_remedy(mixed: Path, monkeypatch) -> None:
    """Through nnU-Net's own planning and preprocessing, first without and then with thickening."""
    with monkeypatch.context() as patch:
        patch.setattr(sparsify_module, "thicken", lambda label, *rest: (label, []))  # as drawn by hand
        sparsify(1, 3, SparsifyOptions(5, rule="middle"))
    lost = {}
    for dataset_id, name in ((3, "Dataset003_Phantom"), (4, "Dataset004_Phantom")):
        plan_and_preprocess(TinyDataset(mixed.parent, dataset_id, name))
        data = open_sparse(dataset_id, "3d_fullres")
        annotations = data.survey()
        lost[dataset_id] = lost_planes(data, annotations)
        if dataset_id == 3:
            with pytest.raises(ValueError, match=r"fine_000: axis .* spacing 0\.4 -> 1 mm.*--thicken-only"):
                require_planes_survived(data, annotations)
            thicken_dataset(3, 4)
    assert {plane.case for plane in lost[3]} == {"fine_000"} and lost[4] == []


def test_the_printed_remedy_mends_a_coarser_configuration(phantom, world: Path, capsys) -> None:
    """As a user types it: ``check`` finds lost planes, its command is run, and what it wrote passes ``check``."""
    phantom(num_train=3, vary_size=False, shape=(24, 26, 28))
    sparse = sparsify(1, 2, SparsifyOptions(2))  # thick enough for the 1 mm of 3d_fullres
    block = json.loads((sparse / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    case = next(c for c in cases_of(sparse / "labelsTr") if c not in block["labelled"])
    file = sparse / "labelsTr" / f"{case}.nii.gz"
    image = sitk.ReadImage(str(file))
    thin = np.full(read(file).shape, 3, dtype=np.uint8)
    thin[8, 7, 4:20] = 1  # a scribble of one voxel's width
    changed = sitk.GetImageFromArray(thin)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(file))
    check = ["check-planes", "-c", "3d_lowres", "-p", "tiny", "--cases", "0", "-d"]
    dataset = TinyDataset(world.parent, 2, sparse.name)
    plan_and_preprocess(dataset)
    add_lowres(dataset, 2.0)
    assert main([*check[:2], "3d_fullres", *check[3:], "2"]) == 0
    assert "preprocessing erased" not in capsys.readouterr().out
    assert main([*check, "2"]) == 1
    out = capsys.readouterr().out
    assert f"WARNING: {case} is annotated" in out and "counts as one of the 1 unlabelled cases" in out
    assert "total: 2 labelled and 1 unlabelled cases" in out
    (command,) = re.findall(r"nnUNetv2_ext (sparsify .*?), then plan and preprocess NEW_ID", out)
    assert main(shlex.split(command.replace("NEW_ID", "3"))) == 0
    assert "nnUNetv2_plan_and_preprocess -d 3 -c 3d_lowres" in capsys.readouterr().out
    mended = TinyDataset(world.parent, 3, "Dataset003_Phantom")
    plan_and_preprocess(mended)
    add_lowres(mended, 2.0)
    assert main([*check, "3"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"all \d+ planes of the raw labels are found", out) and f"WARNING: {case} is annotated" in out


def test_planes_stay_in_the_crop_of_nnunet(phantom, world: Path) -> None:
    """Half of the volume is zero and cropped away: planes are chosen in what remains, indices count the whole image."""
    source = phantom(num_train=2, num_organs=1, vary_size=False)
    for kind in ("images", "labels"):
        for file in (source / f"{kind}Tr").iterdir():
            image = sitk.ReadImage(str(file))
            padded = sitk.ConstantPad(image, (30, 0, 0), (0, 0, 0), 0)
            sitk.WriteImage(padded, str(file))
    folder = sparsify(1, 2, SparsifyOptions(2))
    labelled = json.loads((folder / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]["labelled"]
    for case, entry in labelled.items():
        label = read(folder / "labelsTr" / f"{case}.nii.gz")
        assert [list(i) for i in find_planes(label, 2).indices] == entry["planes"]
        assert entry["planes"][2][0] >= 30


def test_thicken_only_mends_planes_that_resampling_would_erase(phantom, world: Path) -> None:
    phantom(num_train=3, vary_size=False)
    sparse = sparsify(1, 2, SparsifyOptions(2))
    (world.parent / "preprocessed" / "Dataset002_Phantom" / "nnUNetPlans.json").write_text(
        json.dumps({"transpose_backward": [2, 0, 1], "configurations": {"3d_lowres": {"spacing": [1.0, 2.0, 3.0]}}})
    )
    said: list[str] = []
    thick = thicken_dataset(2, 3, configuration="3d_lowres", say=said.append)
    before = json.loads((sparse / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    after = json.loads((thick / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert after["target_spacing"] == [3.0, 1.0, 2.0] and after["source"] == "Dataset001_Phantom"
    for case, entry in after["labelled"].items():
        assert entry["planes"] == before["labelled"][case]["planes"]
        assert [s[2] - s[1] + 1 for s in entry["slabs"]] == [3, 1, 2]
        old, new = (read(f / "labelsTr" / f"{case}.nii.gz") for f in (sparse, thick))
        assert np.array_equal(new[old != 3], old[old != 3]) and (new != 3).sum() > (old != 3).sum()
    assert any("thickened: axis0" in line for line in said)
    assert cases_of(thick / "labelsTr_dense") == cases_of(sparse / "labelsTr_dense")
    assert (world.parent / "preprocessed" / "Dataset003_Phantom" / "splits_final.json").is_file()


def test_thicken_only_of_own_labels_keeps_scribbles(phantom, world: Path) -> None:
    source = phantom(num_train=3, ignore=False)
    content = json.loads((source / "dataset.json").read_text())
    content["labels"]["ignore"] = 3
    (source / "dataset.json").write_text(json.dumps(content))
    for number, file in enumerate(sorted((source / "labelsTr").iterdir())):
        image = sitk.ReadImage(str(file))
        label = sitk.GetArrayFromImage(image)
        shown = np.zeros(label.shape, dtype=bool)
        if number == 0:
            shown[5], shown[:, 7] = True, True
        if number == 1:
            shown[3:5, 4:9, 6] = True
        sparse = sitk.GetImageFromArray(np.where(shown, label, 3).astype(np.uint8))
        sparse.CopyInformation(image)
        sitk.WriteImage(sparse, str(file))
    said: list[str] = []
    folder = thicken_dataset(1, 2, say=said.append)
    assert not (folder / "labelsTr_dense").exists()  # nothing dense was there to set aside
    labelled = json.loads((folder / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]["labelled"]
    assert labelled == {"phantom_000": {"planes": [[5], [7], []], "slabs": [[0, 5, 5], [1, 7, 7]]}}
    assert [line for line in said if line.startswith("phantom_001") and "scribbles" in line]
    for case in ("phantom_001", "phantom_002"):
        assert np.array_equal(
            read(folder / "labelsTr" / f"{case}.nii.gz"), read(source / "labelsTr" / f"{case}.nii.gz")
        )


def test_class_on_no_plane_is_listed(phantom, world: Path) -> None:
    source = phantom(num_train=2)
    content = json.loads((source / "dataset.json").read_text())
    content["labels"]["rare"] = 3
    (source / "dataset.json").write_text(json.dumps(content))
    said: list[str] = []
    folder = sparsify(1, 2, SparsifyOptions(1), said.append)
    block = json.loads((folder / "dataset.json").read_text())
    assert block["labels"]["ignore"] == 4 and block["nnunetv2_ext"]["sparsify"]["classes_on_no_plane"] == ["rare"]
    assert any("no plane shows rare" in line for line in said)
    assert any("fold 'all'" in line for line in said)  # one labelled case cannot be split


def test_subjects_stay_whole(phantom, world: Path) -> None:
    phantom(num_train=12)
    subjects = {f"phantom_{i:03d}": f"s{i // 2}" for i in range(12)}
    folder = sparsify(1, 2, SparsifyOptions(4, test_share=0.17, subjects=subjects))
    block = json.loads((folder / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert len(block["test"]) == 2 and len({subjects[c] for c in block["test"]}) == 1
    assert len({subjects[c] for c in block["labelled"]}) == 2 and block["subjects"] == subjects
    splits = json.loads((world.parent / "preprocessed" / folder.name / "splits_final.json").read_text())
    assert [len(fold["val"]) for fold in splits] == [2, 2]


def rename(source: Path, names: dict[str, str]) -> None:
    """Cases of a raw dataset, images and labels."""
    for folder in ("imagesTr", "labelsTr"):
        for file in sorted((source / folder).iterdir()):
            for old, new in names.items():
                if file.name.startswith(old):
                    file.rename(file.with_name(file.name.replace(old, new)))


@pytest.fixture
def paired(phantom) -> Path:
    """Six cases of three patients, as their names say."""
    source = phantom()
    rename(source, {f"phantom_00{n}": f"pat{n // 2}_{'LR'[n % 2]}" for n in range(6)})
    return source


def test_a_test_set_that_divides_what_looks_like_pairs_is_refused(paired: Path, world: Path, capsys) -> None:
    command = ["sparsify", "-d", "1", "--labelled", "2", "--test-share", "0.34", "-o"]
    assert main([*command, "2"]) == 2
    error = capsys.readouterr().err
    assert "pat0_L and pat0_R look like one subject" in error and not (world / "Dataset002_Phantom").exists()
    (expression,) = re.findall(r"subject: ('.*?') would make 3 subjects of 6 cases", error)
    assert main([*command, "2", "--group-regex", shlex.split(expression)[0]]) == 0  # the remedy works
    block = json.loads((world / "Dataset002_Phantom" / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert len({case[:4] for case in block["test"]}) == 1 and len(block["test"]) == 2
    assert main([*command, "3", "--allow-split-subjects"]) == 0
    block = json.loads((world / "Dataset003_Phantom" / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert len({case[:4] for case in block["test"]}) == 2


def test_what_looks_like_pairs_is_pointed_out(paired: Path, capsys) -> None:
    assert main(["sparsify", "-d", "1", "-o", "2", "--labelled", "2"]) == 0
    out = capsys.readouterr().out
    assert "WARNING: pat0_L and pat0_R look like one subject" in out and "--group-regex" in out


def test_thicken_only_says_how_to_keep_pairs_whole(paired: Path, world: Path, capsys) -> None:
    sparsify(1, 2, SparsifyOptions(6), say=lambda line: None)
    thicken = ["sparsify", "-d", "2", "--thicken-only", "-o"]
    assert main([*thicken, "3"]) == 0
    (expression,) = re.findall(
        r"WARNING: .* one subject: ('.*?') would .* give it as --group-regex", capsys.readouterr().out
    )
    assert main([*thicken, "4", "--group-regex", shlex.split(expression)[0]]) == 0
    assert "look like one subject" not in capsys.readouterr().out
    splits = json.loads((world.parent / "preprocessed" / "Dataset004_Phantom" / "splits_final.json").read_text())
    assert len(splits) == 3 and all(len({case[:4] for case in fold["val"]}) == 1 for fold in splits)
    block = json.loads((world / "Dataset004_Phantom" / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert block["subjects"]["pat2_R"] == block["subjects"]["pat2_L"] != block["subjects"]["pat1_L"]


def test_recorded_subjects_of_the_source_are_kept(paired: Path, world: Path) -> None:
    """As the record says, not as the names look."""
    content = json.loads((paired / "dataset.json").read_text())
    subjects = {f"pat{n}_{side}": side for n in range(3) for side in "LR"}
    (paired / "dataset.json").write_text(json.dumps(content | {"nnunetv2_ext": {"subjects": subjects}}))
    assert main(["sparsify", "-d", "1", "-o", "2", "--labelled", "3", "--test-share", "0.5"]) == 0
    block = json.loads((world / "Dataset002_Phantom" / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert len({subjects[case] for case in block["test"]}) == 1 and block["subjects"] == subjects


# ---- what is refused: nothing may be left behind


def refused(world: Path, message: str, *arguments: Any) -> None:
    before = sorted(p.name for p in world.iterdir())
    with pytest.raises(ValueError, match=message):
        sparsify(*arguments)
    assert sorted(p.name for p in world.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SparsifyOptions(0), "choose 1 to 6"),
        (SparsifyOptions(7), "choose 1 to 6"),
        (SparsifyOptions(1.5), "share above 0 and up to 1"),
        (SparsifyOptions(1, test_share=1.0), "--test-share"),
        (SparsifyOptions(1, test_share=0.01), "--test-share 0.01 of 6 cases is none"),
        (SparsifyOptions(1, axes=(0, 3)), "axes 0, 1 and 2"),
        (SparsifyOptions(1, axes=()), "axes 0, 1 and 2"),
        (SparsifyOptions(1, axes=(0,) * 100), "100 planes are asked for on axis 0"),
        (SparsifyOptions(1, rule="best"), "largest or middle"),
        (SparsifyOptions(1, configuration="3d_lowres"), "known from plans only"),
    ],
)
def test_impossible_options(phantom, world: Path, options: SparsifyOptions, message: str) -> None:
    phantom()
    refused(world, message, 1, 2, options)


@pytest.mark.parametrize("where", ["raw", "preprocessed", "results"])
def test_taken_id(phantom, world: Path, where: str) -> None:
    phantom()
    (world.parent / where / "Dataset002_Other").mkdir()
    refused(world, "dataset id 2 is taken by Dataset002_Other", 1, 2, SparsifyOptions(1))


def test_missing_dataset(world: Path) -> None:
    refused(world, "there is no dataset 9 in", 9, 2, SparsifyOptions(1))


def test_regions_and_sparse_data(phantom, world: Path) -> None:
    phantom(1, regions=True)
    refused(world, "regions", 1, 5, SparsifyOptions(1))
    phantom(2, ignore=True)
    refused(world, "--thicken-only", 2, 5, SparsifyOptions(1))


def test_label_values_that_are_not_declared(phantom, world: Path) -> None:
    source = phantom()
    for file in (source / "labelsTr").iterdir():
        image = sitk.ReadImage(str(file)) + 7
        sitk.WriteImage(image, str(file))
    refused(world, r"label values that Dataset001_Phantom/dataset.json does not declare \(7", 1, 2, SparsifyOptions(1))


def test_two_dimensional_data(phantom, world: Path) -> None:
    source = phantom(num_train=2)
    for file in [*(source / "imagesTr").iterdir(), *(source / "labelsTr").iterdir()]:
        image = sitk.ReadImage(str(file))
        sitk.WriteImage(image[:, :, 8:9], str(file))
    refused(world, "two-dimensional", 1, 2, SparsifyOptions(1))


def test_thicken_only_refuses_dense_and_planeless_data(phantom, world: Path) -> None:
    phantom(1)
    with pytest.raises(ValueError, match="no ignore label"):
        thicken_dataset(1, 5)
    source = phantom(2, ignore=True)
    for file in (source / "labelsTr").iterdir():
        sitk.WriteImage(sitk.ReadImage(str(file)) * 0 + 3, str(file))
    before = sorted(p.name for p in world.iterdir())
    with pytest.raises(ValueError, match="no case of Dataset002_Phantom has an annotated plane"):
        thicken_dataset(2, 5)
    assert sorted(p.name for p in world.iterdir()) == before


def test_an_error_half_way_leaves_nothing(phantom, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phantom()
    written = []

    def fail_at_the_third(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) == 3:
            raise OSError("disk full")

    monkeypatch.setattr(SimpleITKIO, "write_seg", fail_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        sparsify(1, 2, SparsifyOptions(2))
    assert [p.name for p in world.iterdir()] == ["Dataset001_Phantom"]


def test_the_command(phantom, world: Path, tmp_path: Path, capsys) -> None:
    """One real call with a share, an expression and two axes; one with a mistake."""
    phantom()
    environment = {k: os.environ[k] for k in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    command = ["nnUNetv2_ext", "sparsify", "-d", "1", "-o", "2", "--labelled", "0.5", "--planes", "0,2,2"]
    done = run_command([*command, "--group-regex", r"(\d+)$"], environment, tmp_path)
    assert "3 labelled and 3 unlabelled cases" in done.stdout and "nnUNetv2_plan_and_preprocess -d 2" in done.stdout
    block = json.loads((world / "Dataset002_Phantom" / "dataset.json").read_text())["nnunetv2_ext"]["sparsify"]
    assert [[len(i) for i in e["planes"]] for e in block["labelled"].values()] == [[1, 0, 2]] * 3
    assert block["subjects"]["phantom_000"] == "000"
    assert main(command[1:]) == 2
    assert "nnUNetv2_ext sparsify: dataset id 2 is taken by Dataset002_Phantom" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --labelled N"),
        (["--labelled", "3", "--thicken-only"], "either --labelled N"),
        (["--labelled", "many"], "number of cases or a share"),
        (["--labelled", "3", "--planes", "x"], "list of array axes"),
        (
            ["--labelled", "1", "-p", "nnUNetPlanz"],
            "Dataset001_Phantom has no plans nnUNetPlanz: run nnUNetv2_plan_experiment",
        ),
        (["--thicken-only", "-p", "nnUNetPlanz"], "has no plans nnUNetPlanz"),
        (["--thicken-only", "--rule", "middle"], "choose planes in a dense dataset: leave them out"),
        (["--thicken-only", "--test-share", "0.2"], "choose planes in a dense dataset: leave them out"),
    ],
)
def test_mistyped_commands(world: Path, phantom, capsys, arguments: list[str], message: str) -> None:
    phantom(num_train=1)
    assert main(["sparsify", "-d", "1", "-o", "2", *arguments]) == 2
    assert message in capsys.readouterr().err
