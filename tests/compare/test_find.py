"""Finding result folders and refusing what is not there."""

import re

import pytest

from nnunetv2_ext.compare import find


def test_a_folder_name_is_taken_apart(world) -> None:
    folder = world.train("nnUNetTrainer", folds=("1", "0"))
    (folder / "fold_all").mkdir()
    model = find.find_trainer(world.root / "results", world.name, "nnUNetTrainer", "nnUNetPlans", "3d_fullres")
    assert (model.trainer, model.plans, model.configuration) == ("nnUNetTrainer", "nnUNetPlans", "3d_fullres")
    assert model.folder == folder and model.root == world.root / "results" and model.dataset == world.name
    assert model.folds() == ["0", "1", "all"]
    (folder.parent / "ensembles").mkdir()
    assert [m.trainer for m in find.models_of(model.root, world.name)] == ["nnUNetTrainer"]


@pytest.mark.parametrize(
    ("trainer", "plans", "configuration", "message"),
    [
        ("nnUNetTrainerMedContxt", "nnUNetPlans", "3d_fullres", "did you mean nnUNetTrainerMedContext? It has nnUNetT"),
        ("nnUNetTrainer", "other", "3d_fullres", "no 3d_fullres results with the plans other in"),
        ("nnUNetTrainer", "nnUNetPlans", "2d", "nnUNetTrainer has no results of 2d"),
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
    with pytest.raises(ValueError, match=r"has no results of Dataset006_y \(it has Dataset005_x\)"):
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
        find.find_in(world.root / "nowhere", None, "nnUNetPlans", "3d_fullres")


def test_the_dataset_by_id_also_from_results_alone(world, monkeypatch) -> None:
    assert find.dataset_name("5", []) == world.name
    world.train("nnUNetTrainer")
    monkeypatch.delenv("nnUNet_preprocessed")
    monkeypatch.delenv("nnUNet_raw")
    assert find.dataset_name("5", [world.root / "results"]) == world.name
    with pytest.raises(ValueError, match="no such dataset"):
        find.dataset_name("6", [world.root / "results"])
