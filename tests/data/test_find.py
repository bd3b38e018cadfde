"""Finding result folders and refusing what is not there."""

import re
from pathlib import Path

import pytest

from nnunetv2_ext.data import find


def test_a_folder_name_is_taken_apart(world) -> None:
    folder = world.train("nnUNetTrainer", folds=("1", "0"))
    (folder / "fold_all").mkdir()
    model = find.find_trainer(world.root / "results", world.name, "nnUNetTrainer", "nnUNetPlans", "3d_fullres")
    assert (model.trainer, model.plans, model.configuration) == ("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
    assert model.folder == folder and model.dataset == world.name
    assert model.folds() == ["0", "1", "all"]
    (folder.parent / "ensembles").mkdir()
    assert [m.trainer for m in find.models_of(folder.parent)] == ["nnUNetTrainer"]


@pytest.mark.parametrize(
    ("trainer", "plans", "configuration", "message"),
    [
        (
            "nnUNetTrainerMedContxt",
            "nnUNetPlans",
            "3d_fullres",
            "did you mean nnUNetTrainerMedContext? -tr",
        ),
        ("nnUNetTrainer", "other", "3d_fullres", "no results of the plans other of nnUNetTrainer in"),
        ("nnUNetTrainer", "nnUNetPlans", "2d", "no results of the configuration 2d of nnUNetTrainer in"),
    ],
)
def test_what_is_not_there_is_answered_by_what_is(trainer, plans, configuration, message, world) -> None:
    world.train("nnUNetTrainer")
    world.train("nnUNetTrainer", plans="small")
    world.train("nnUNetTrainerMedContext")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        find.find_trainer(world.root / "results", world.name, trainer, plans, configuration)
    if plans == "other":
        assert str(error.value).endswith("-p takes nnUNetPlans, small")


def test_another_dataset(world) -> None:
    world.train("nnUNetTrainer")
    with pytest.raises(ValueError, match=r"no dataset Dataset006_y in .*results \(it has Dataset005_x\); .*--results"):
        find.find_trainer(world.root / "results", "Dataset006_y", "nnUNetTrainer", "nnUNetPlans", "3d_fullres")


@pytest.mark.parametrize("depth", ["results", "model", "fold"])
def test_a_run_is_a_results_folder_a_model_or_a_fold(depth: str, world) -> None:
    model = world.train("nnUNetTrainer", folds=("1",))
    folder = {"results": model.parent.parent, "model": model, "fold": model / "fold_1"}[depth]
    found, fold = find.find_in(folder, world.name, "nnUNetPlans", "3d_fullres")
    assert found.folder == model and fold == ("1" if depth == "fold" else None)
    with pytest.raises(ValueError, match="another -p or -c" if depth == "results" else "give -p and -c that fit"):
        find.find_in(folder, world.name, "small", "3d_fullres")


def test_a_run_that_could_be_two(world) -> None:
    world.train("nnUNetTrainer")
    world.train("nnUNetTrainerMedContext")
    with pytest.raises(ValueError, match="more than one model of"):
        find.find_in(world.root / "results", world.name, "nnUNetPlans", "3d_fullres")
    with pytest.raises(ValueError, match="does not exist"):
        find.find_in(world.root / "nowhere", 5, "nnUNetPlans", "3d_fullres")


def test_the_dataset_by_id_also_from_results_alone(world, monkeypatch) -> None:
    model = world.train("nnUNetTrainer")
    for variable in ("preprocessed", "raw", "results"):
        monkeypatch.delenv(f"nnUNet_{variable}")
    where = ("nnUNetPlans", "3d_fullres")
    assert find.find_trainer(world.root / "results", "5", "nnUNetTrainer", *where).folder == model
    assert find.find_in(world.root / "results", "5", *where)[0].folder == model
    (world.root / "results").rename(world.root / "fold_results")
    assert find.find_in(world.root / "fold_results", "5", *where)[1] is None
    (world.root / "fold_results").rename(world.root / "results")
    with pytest.raises(ValueError, match="no model of dataset 6 with plans"):
        find.find_in(world.root / "results", "6", *where)
    (model.parent.parent / "Dataset005_y").mkdir()
    with pytest.raises(ValueError, match=r"dataset 5 is ambiguous in .*; give the full name"):
        find.find_trainer(world.root / "results", "5", "nnUNetTrainer", *where)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's three folders with datasets 4 and 40 in raw, and 4 without dataset.json in preprocessed."""
    for name in ("raw/Dataset004_x", "raw/Dataset040_y", "preprocessed/Dataset004_x", "results"):
        (tmp_path / name).mkdir(parents=True)
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    (tmp_path / "raw" / "Dataset004_x" / "dataset.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("dataset", [4, "4", "004", "Dataset004_x"])
def test_a_dataset_is_found_by_id_or_name(dataset, folders: Path) -> None:
    assert find.find_dataset(dataset, find.RAW) == folders / "raw" / "Dataset004_x"
    assert find.find_dataset(dataset, find.PREPROCESSED, find.RAW).parent.name == "preprocessed"
    assert find.find_dataset_json(dataset) == folders / "raw" / "Dataset004_x" / "dataset.json"
    assert find.datasets_of_id(4) == ["Dataset004_x"] and find.datasets_of_id(5) == []


def test_the_variables_are_read_when_asked(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(folders / "results"))
    with pytest.raises(ValueError, match=r"no dataset 4 in \S*results \(it has none\); correct the id or name"):
        find.find_dataset(4, find.RAW)
    monkeypatch.setenv("nnUNet_raw", str(folders / "nowhere"))
    with pytest.raises(ValueError, match=r"nowhere \(which does not exist\)"):
        find.find_dataset(4, find.RAW)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(ValueError, match="nnUNet_raw is not set; export nnUNet_raw=FOLDER"):
        find.find_dataset(4, find.RAW)
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ValueError, match="nnUNet_preprocessed and nnUNet_raw, which are not set; give -djfile"):
        find.find_dataset_json(4)


def test_what_there_is_instead_and_the_next_command(folders: Path) -> None:
    message = r"no dataset 40 in .*preprocessed \(it has Dataset004_x\); run nnUNetv2_plan_and_preprocess -d 40$"
    with pytest.raises(ValueError, match=message):
        find.find_dataset(40, find.PREPROCESSED)
    for wrong in ("Dataset040", "../raw/Dataset004_x", "", "hippocampus", "-4", "٤x"):
        with pytest.raises(ValueError, match=r"no dataset .* in .* \(it has Dataset004_x, Dataset040_y\)"):
            find.find_dataset(wrong, find.RAW)
    (folders / "raw" / "Dataset004_z").mkdir()
    with pytest.raises(ValueError, match=r"ambiguous in .*: Dataset004_x, Dataset004_z; give the full name"):
        find.find_dataset("4", find.RAW)


def test_a_checkpoint_that_is_not_there_is_answered_by_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a trained model \(plans.json is missing\)"):
        find.find_checkpoint(tmp_path, "0")
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="there is no checkpoint"):
        find.find_checkpoint(tmp_path, "0")
    (tmp_path / "fold_1").mkdir()
    (tmp_path / "fold_1" / "checkpoint_latest.pth").touch()
    with pytest.raises(ValueError, match=r"there is fold_1/checkpoint_latest.pth"):
        find.find_checkpoint(tmp_path, "1")
    assert find.find_checkpoint(tmp_path, "1", "checkpoint_latest.pth").is_file()
