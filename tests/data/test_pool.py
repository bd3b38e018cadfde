"""The pool of unlabelled cases: preprocessed as nnU-Net would, leaks refused, the labelled data untouched."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_ext.cli import main as ext_main
from nnunetv2_ext.data import fill_pool as module
from nnunetv2_ext.data import pool as pool_module
from nnunetv2_ext.data.fill_pool import content_hash, fill_pool
from nnunetv2_ext.data.pool import open_pool, pools_folder, read_pool
from nnunetv2_ext.data.preprocessed import open_preprocessed
from tests.conftest import TinyDataset


@pytest.fixture
def own(tiny: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyDataset:
    """A copy of the tiny dataset."""
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(tiny, name), tmp_path / "own" / name)
    dataset = TinyDataset(tmp_path / "own", tiny.dataset_id, tiny.name)
    for key, value in dataset.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)
    return dataset


@pytest.fixture
def scans(own: TinyDataset, tmp_path: Path) -> Path:
    """Three images that the dataset has not: changed copies of its test images."""
    folder = tmp_path / "scans"
    folder.mkdir()
    images = sorted(own.images_ts.glob("*_0000.nii.gz"))
    for number in range(3):
        image = sitk.ReadImage(str(images[number % 2]))
        sitk.WriteImage(image * (1.5 + number), str(folder / f"new_{number}_0000.nii.gz"))
    return folder


def fill(own: TinyDataset, scans: Path, **options: Any) -> Any:
    options = {"configuration": "3d_fullres", "plans": "tiny", "say": lambda line: None, **options}
    return fill_pool(own.dataset_id, images=scans, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres", "3d_lowres"])
def test_a_pool_is_what_the_own_preprocessor_makes_and_the_labelled_data_stay(own, scans, configuration) -> None:
    if configuration == "3d_lowres":
        plans = own.plans()
        known = plans["configurations"]
        known["3d_lowres"] = known["3d_fullres"] | {"data_identifier": "tiny_3d_lowres", "spacing": [2.0, 2.0, 1.0]}
        (own.preprocessed / own.name / "tiny.json").write_text(json.dumps(plans))
    target = open_preprocessed(own.dataset_id, configuration, "tiny", files=False)
    before = content(target.folder), content(own.raw)
    pool = fill(own, scans, configuration=configuration)
    assert (content(target.folder), content(own.raw)) == before
    assert list(pool.cases) == ["new_0", "new_1", "new_2"]
    assert open_pool(target.base, target.plans, target.configuration, configuration) == pool

    folder, case = pool.data_folder, "new_1"
    data, inside, _, properties = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)
    preprocessor = target.configuration.preprocessor_class(verbose=False)
    arguments = target.plans, target.configuration, target.dataset_json
    wanted, seg, _ = preprocessor.run_case([str(scans / f"{case}_0000.nii.gz")], None, *arguments)
    assert np.array_equal(data[:], wanted) and np.array_equal(inside[:], seg)
    assert properties["class_locations"] == {} and pool.cases[case].shape == wanted.shape[1:]
    assert pool.cases[case].files == (str(scans / f"{case}_0000.nii.gz"),)


def test_an_interrupted_pool_is_not_used_and_the_same_command_goes_on(own, scans, monkeypatch) -> None:
    target = open_preprocessed(own.dataset_id, "3d_fullres", "tiny")
    known = target.base, target.plans, target.configuration, "3d_fullres"
    with pytest.raises(ValueError, match=r"no unlabelled cases for 3d_fullres: run nnUNetv2_ext unlabelled -d 001 -c"):
        open_pool(*known)
    done, work = [], module._preprocess_one

    def killed(*arguments: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return work(*arguments)

    monkeypatch.setattr(module, "_preprocess_one", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(own, scans)
    (next(pools_folder(target.base).iterdir()) / "cases" / "new_1.b2nd").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"was interrupted after 1 of 3 cases: run nnUNetv2_ext unlabelled"):
        open_pool(*known)

    again = []
    monkeypatch.setattr(module, "_preprocess_one", lambda *job: again.append(job[-1][0]) or work(*job))
    fill(own, scans)
    assert again == ["new_1", "new_2"] and len(open_pool(*known).cases) == 3
    # a changed file is made anew, the others stay; further folders add to the pool
    image = sitk.ReadImage(str(scans / "new_0_0000.nii.gz"))
    sitk.WriteImage(image * 2, str(scans / "new_0_0000.nii.gz"))
    fill(own, scans)
    assert again[2:] == ["new_0"]
    other = scans.with_name("other")
    other.mkdir()
    sitk.WriteImage(image * 7, str(other / "more_0000.nii.gz"))
    assert len(fill(own, other).cases) == 4


def test_half_a_case_does_not_stay_on_a_full_disk(own, scans, monkeypatch) -> None:
    from nnunetv2.training.dataloading import nnunet_dataset

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(nnunet_dataset, "write_pickle", full)
        with pytest.raises(ValueError, match=r"case new_0 cannot be written to .*No space left.* run the same command"):
            fill(own, scans)
    [folder] = pools_folder(own.preprocessed / own.name).iterdir()
    assert list((folder / "cases").iterdir()) == [] and read_pool(folder).cases == {}
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "atomic_write_text", full)
        with pytest.raises(
            ValueError, match=r"manifest.json cannot be written \(No space left.* look at the free space"
        ):
            fill(own, scans)
    assert len(fill(own, scans).cases) == 3, "the remedy passes"


def labelled(own: TinyDataset) -> Path:
    return min((own.raw / own.name / "imagesTr").glob("*_0000.nii.gz"))


def packed_again(source: Path, target: Path) -> None:
    target.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), compresslevel=1, mtime=77))


def no_channel(own: TinyDataset, scans: Path) -> None:
    (scans / "new_0_0000.nii.gz").rename(scans / "new_0_0001.nii.gz")


def nothing_in_it(own: TinyDataset, scans: Path) -> None:
    image = sitk.ReadImage(str(scans / "new_0_0000.nii.gz"))
    sitk.WriteImage(image * 0, str(scans / "new_0_0000.nii.gz"))


def only_labelled(own: TinyDataset, scans: Path) -> None:
    empty(own, scans)
    for file in (own.raw / own.name / "imagesTr").iterdir():
        shutil.copy(file, scans)


def damaged(own: TinyDataset, scans: Path) -> None:
    (scans / "new_0_0000.nii.gz").write_bytes(b"no image at all")


def empty(own: TinyDataset, scans: Path) -> None:
    for file in scans.iterdir():
        file.unlink()


def of_labelled(own: TinyDataset, scans: Path) -> None:
    packed_again(labelled(own), scans / "x_0000.nii.gz")


def of_test(own: TinyDataset, scans: Path) -> None:
    packed_again(min(own.images_ts.iterdir()), scans / "x_0000.nii.gz")


def twice(own: TinyDataset, scans: Path) -> None:
    packed_again(scans / "new_0_0000.nii.gz", scans / "x_0000.nii.gz")


BAD: dict[str, tuple[Callable[[TinyDataset, Path], Any], str]] = {
    "no folder": (lambda own, s: shutil.rmtree(s), "the folder of images, .*, does not exist"),
    "empty": (empty, "holds no image CASE_0000.nii.gz"),
    "only labelled ids": (only_labelled, "phantom_000, .* and 1 more are labelled of Dataset001_Phantom"),
    "a labelled id": (lambda own, s: shutil.copy(labelled(own), s), "are labelled of .*: move them out"),
    "a test id": (lambda own, s: shutil.copy(min(own.images_ts.iterdir()), s), "are test cases of .*: move them out"),
    "a labelled image": (of_labelled, "case x is the image .*imagesTr"),
    "a test image": (of_test, "case x is the image .*imagesTs.* under another name"),
    "one image twice": (twice, "new_0 and x are the same image"),
    "a channel": (no_channel, "case new_0 has the channels new_0_0001.nii.gz, and the dataset's cases have new_0_0000"),
    "zeros": (nothing_in_it, "case new_0: .* is 0 everywhere"),
    "damaged": (damaged, "new_0_0000.nii.gz cannot be read"),
    "no bytes": (lambda own, s: (s / "new_0_0000.nii.gz").write_bytes(b""), "new_0_0000.nii.gz .*0 bytes: replace"),
    "nearly empty": (
        lambda own, s: (s / "new_0_0000.nii.gz").write_bytes(b"\x1f\x8b\x08"),
        "new_0_0000.nii.gz .*replace the file",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=BAD)
def test_what_must_not_be_in_a_pool_is_named(own, scans, spoil, words) -> None:
    spoil(own, scans)
    with pytest.raises(ValueError, match=words) as refusal:
        fill(own, scans)
    assert "\n" not in str(refusal.value)
    assert not any(pool.cases for folder in pools_folder(own.preprocessed / own.name).glob("*")
                   if (pool := read_pool(folder)))  # fmt: skip


def test_another_plan_than_the_pools_is_refused_by_the_command_and_by_the_reader(own, scans, capsys) -> None:
    fill(own, scans)
    base = own.preprocessed / own.name
    plans = json.loads((base / "tiny.json").read_text())
    # another network is the same preprocessing
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [2, 4, 8]
    (base / "tiny.json").write_text(json.dumps(plans))
    fill(own, scans)
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1.0
    (base / "tiny.json").write_text(json.dumps(plans))
    where = ["-d", str(own.dataset_id), "-c", "3d_fullres", "-p", "tiny", "-i", str(scans), "-np", "1"]
    assert ext_main(["unlabelled", *where]) == 2
    said = capsys.readouterr().err
    assert "was preprocessed with other plans than tiny are now: remove that folder" in said and said.count("\n") == 1
    target = open_preprocessed(own.dataset_id, "3d_fullres", "tiny")
    with pytest.raises(ValueError, match="other plans"):
        open_pool(target.base, target.plans, target.configuration, "3d_fullres")


def test_subjects_of_test_cases_are_refused_and_of_labelled_ones_recorded(own, scans) -> None:
    case = labelled(own).name.removesuffix("_0000.nii.gz")
    test = min(own.images_ts.glob("*_0000.nii.gz")).name.removesuffix("_0000.nii.gz")
    table = scans.with_name("subjects.json")
    names = {p.name.removesuffix("_0000.nii.gz") for f in ("imagesTr", "imagesTs") for p in
             (own.raw / own.name / f).glob("*_0000.nii.gz")} | {f"new_{n}" for n in range(3)}  # fmt: skip
    table.write_text(json.dumps({n: n for n in names} | {"new_0": test}))
    with pytest.raises(ValueError, match=f"1 subjects, such as {test}, have test cases"):
        fill(own, scans, table=table)
    table.write_text(json.dumps({n: n for n in names} | {"new_0": case}))
    said: list[str] = []
    pool = fill(own, scans, table=table, say=said.append)
    assert pool.subjects["new_0"] == pool.subjects[case] == case and test not in pool.subjects
    assert said[0] == "1 subjects also have labelled cases: a fold leaves them out where they validate"


def test_a_spacing_that_no_labelled_case_has_is_told(own, scans) -> None:
    image = sitk.ReadImage(str(scans / "new_0_0000.nii.gz"))
    image.SetSpacing([5.0 * s for s in image.GetSpacing()])
    sitk.WriteImage(image, str(scans / "new_0_0000.nii.gz"))
    said: list[str] = []
    fill(own, scans, say=said.append)
    assert "the spacing of new_0 is outside of the labelled cases' range" in said[0]


def test_a_hash_is_of_the_content_and_gzip_of_any_time(tmp_path) -> None:
    for name, when in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.nii.gz").write_bytes(gzip.compress(b"voxels", mtime=when))
    (tmp_path / "c.nii").write_bytes(b"voxels")
    assert len({content_hash(file) for file in tmp_path.iterdir()}) == 1


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyDataset]:
    """Photographs: one file a case holds three channels."""
    from PIL import Image

    raw = tmp_path / "raw" / "Dataset003_Photo"
    random = np.random.RandomState(0)
    for folder, names in (("imagesTr", "abc"), ("new", "xy")):
        (raw / folder).mkdir(parents=True)
        for name in names:
            pixels = random.randint(1, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(raw / folder / f"{name}_0000.png")
    (raw / "labelsTr").mkdir()
    for name in "abc":
        label = np.zeros((40, 48), dtype=np.uint8)
        label[10:30, 10:30] = 1
        Image.fromarray(label).save(raw / "labelsTr" / f"{name}.png")
    channels = {str(number): "rgb_to_0_1" for number in range(3)}
    labels = {"background": 0, "spot": 1}
    text = {"channel_names": channels, "labels": labels, "numTraining": 3, "file_ending": ".png"}
    (raw / "dataset.json").write_text(json.dumps(text))
    (raw / "new").rename(tmp_path / "new")
    from tests.conftest import plan_and_preprocess

    dataset = TinyDataset(tmp_path, 3, raw.name)
    plan_and_preprocess(dataset, ("2d",))
    for key, value in dataset.environment(tmp_path / "results").items():
        monkeypatch.setenv(key, value)
    yield dataset


def test_photographs_have_three_channels_in_one_file(colours, tmp_path) -> None:
    pool = fill(colours, tmp_path / "new", configuration="2d", plans="nnUNetPlans")
    assert {case.shape for case in pool.cases.values()} == {(1, 40, 48)}
    [data, *_] = open_preprocessed(3, "2d")._dataset_class(str(pool.data_folder)).load_case("x")
    assert data.shape == (3, 1, 40, 48)
