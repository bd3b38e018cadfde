"""Export: a model that plain nnU-Net predicts with, the source untouched, and nothing left behind by a failure."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext
from tests.core.signed.training import nnUNetTrainerSigned, nnUNetTrainerWide, nnUNetTrainerWithHead

FINAL = "fold_0/checkpoint_final.pth"


def save_model(trainer: nnUNetTrainer, fold: int = 0, checkpoint: str = "checkpoint_final.pth") -> Path:
    """A model folder as a training leaves it, after two steps on made-up batches."""
    randomness.seed_everything(fold)
    trainer.initialize()
    patch = trainer.configuration_manager.patch_size
    for _ in range(2):
        targets = [
            torch.randint(0, 3, (2, 1, *[round(p * s) for p, s in zip(patch, scale)])).to(torch.int16)
            for scale in trainer._get_deep_supervision_scales()
        ]
        trainer.train_step({"data": torch.randn(2, 1, *patch), "target": targets, "keys": ["a", "b"]})
    trainer.save_checkpoint(str(Path(trainer.output_folder) / checkpoint))
    folder = Path(trainer.output_folder_base)
    save_json(trainer.plans_manager.plans, folder / "plans.json", sort_keys=False)
    save_json(trainer.dataset_json, folder / "dataset.json", sort_keys=False)
    (folder / "dataset_fingerprint.json").write_text("{}")
    results = Path(trainer.output_folder)
    (results / "progress.png").write_bytes(b"picture")
    (results / "panel_epoch_0000.png").write_bytes(b"ours")
    (results / "debug.json").write_text(json.dumps({"dataset_folder": str(folder)}))
    (results / "validation").mkdir(exist_ok=True)
    case = {name: str(results / "validation" / "a.nii.gz") for name in ("prediction_file", "reference_file")}
    save_json({"foreground_mean": {"Dice": 0.5}, "metric_per_case": [case]}, results / "validation" / "summary.json")
    return folder


@pytest.fixture
def model(make_trainer) -> Path:
    """nnUNetTrainerMedContext__tiny__3d_fullres with fold 0."""
    return save_model(make_trainer(nnUNetTrainerMedContext))


def read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_same(first: dict, second: dict) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def logits(folder: Path, folds: tuple[int, ...] = (0,)) -> torch.Tensor:
    """What nnU-Net's predictor makes of one made-up volume."""
    predictor = nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    volume = torch.randn(1, 18, 26, 20, generator=torch.Generator().manual_seed(0))
    return predictor.predict_logits_from_preprocessed_data(volume)


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_the_export_is_a_stock_checkpoint_with_the_chosen_weights(model, tmp_path, weights):
    before = fingerprint(model)
    written = export_model(model, tmp_path / "out", weights)
    assert written == [tmp_path / "out" / FINAL]
    assert fingerprint(model) == before, "the source is only read"

    source, exported = read(model / FINAL), read(written[0])
    teacher = source["nnunetv2_ext"]["methods"]["medcontext"]["teacher"]
    assert_same(exported["network_weights"], source["network_weights"] if weights == "student" else teacher)
    assert not all(torch.equal(teacher[key], source["network_weights"][key]) for key in teacher)
    assert exported["trainer_name"] == "nnUNetTrainer"
    assert not {"nnunetv2_ext", "optimizer_state", "grad_scaler_state"} & set(exported)
    assert "nnunetv2_ext" not in exported["init_args"]["plans"]
    assert exported["inference_allowed_mirroring_axes"] == source["inference_allowed_mirroring_axes"]
    plans = json.loads((tmp_path / "out" / "plans.json").read_text())
    assert "nnunetv2_ext" not in plans and plans["plans_name"] == "tiny"


def test_nnunet_without_this_package_gives_the_same_logits(model, tmp_path, monkeypatch):
    ours = logits(model)
    export_model(model, tmp_path / "student")
    export_model(model, tmp_path / "teacher", "teacher")
    monkeypatch.delenv("nnUNet_extTrainer")
    with pytest.raises(RuntimeError, match="nnUNetTrainerMedContext"):
        logits(model)
    assert torch.equal(logits(tmp_path / "student"), ours)
    teacher = logits(tmp_path / "teacher")
    assert not torch.equal(teacher, ours)
    checkpoint = read(model / FINAL)
    checkpoint["network_weights"] = checkpoint["nnunetv2_ext"]["methods"]["medcontext"]["teacher"]
    checkpoint["trainer_name"] = "nnUNetTrainer"
    torch.save(checkpoint, model / FINAL)
    assert torch.equal(teacher, logits(model))


def test_every_fold_is_exported_with_what_nnunet_shares(model, make_trainer, tmp_path, monkeypatch):
    save_model(make_trainer(nnUNetTrainerMedContext, fold=1), fold=1)
    shutil.copy(model / FINAL, model / "fold_0" / "checkpoint_best.pth")
    written = export_model(model, tmp_path / "deep" / "er" / "out")
    expected = [
        "dataset.json",
        "dataset_fingerprint.json",
        "fold_0/checkpoint_final.pth",
        "fold_0/progress.png",
        "fold_0/validation/summary.json",
        "fold_1/checkpoint_final.pth",
        "fold_1/progress.png",
        "fold_1/validation/summary.json",
        "plans.json",
    ]
    assert sorted(fingerprint(tmp_path / "deep" / "er" / "out")) == expected
    assert len(written) == 2 and all(path.is_file() for path in written)
    export_model(model, tmp_path / "with_best", best=True)
    assert sorted(fingerprint(tmp_path / "with_best")) == sorted([*expected, "fold_0/checkpoint_best.pth"])
    ours = logits(model, (0, 1))
    monkeypatch.delenv("nnUNet_extTrainer")
    assert torch.equal(logits(tmp_path / "deep" / "er" / "out", (0, 1)), ours)
    assert not torch.equal(logits(tmp_path / "deep" / "er" / "out", (0,)), ours)


def test_results_of_the_trained_network_do_not_go_with_other_weights(model, tmp_path):
    told: list[str] = []
    export_model(model, tmp_path / "student", tell=told.append)
    assert told == []
    export_model(model, tmp_path / "teacher", "teacher", tell=told.append)
    (line,) = told
    assert "left out progress.png and validation/" in line and "evaluate it" in line
    assert sorted(fingerprint(tmp_path / "teacher")) == [
        "dataset.json",
        "dataset_fingerprint.json",
        FINAL,
        "plans.json",
    ]


def test_no_path_of_the_training_machine_is_in_the_export(model, tmp_path):
    description = json.loads((model / "dataset.json").read_text())
    files = {"dataset": {"a": {"label": str(tmp_path / "a.nii.gz")}}, "training": [str(tmp_path / "a.nii.gz")]}
    (model / "dataset.json").write_text(json.dumps(description | files))
    checkpoint = read(model / FINAL)
    checkpoint["init_args"]["dataset_json"].update(files)
    torch.save(checkpoint, model / FINAL)
    export_model(model, tmp_path / "out")
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == description
    (case,) = json.loads((tmp_path / "out" / "fold_0" / "validation" / "summary.json").read_text())["metric_per_case"]
    assert case == {"prediction_file": "a.nii.gz", "reference_file": "a.nii.gz"}


def test_an_unfinished_fold_is_exported_from_its_latest_checkpoint_without_an_older_validation(model, tmp_path):
    (model / FINAL).rename(model / "fold_0" / "checkpoint_latest.pth")
    shutil.copy(model / "fold_0" / "checkpoint_latest.pth", model / "fold_0" / "checkpoint_before_nan.pth")
    (written,) = export_model(model, tmp_path / "out")
    assert written.name == "checkpoint_latest.pth"
    assert sorted(p.name for p in (tmp_path / "out" / "fold_0").iterdir()) == ["checkpoint_latest.pth", "progress.png"]


def test_best_is_refused_where_there_is_none(model, tmp_path):
    with pytest.raises(ValueError, match=r"no fold of .* has a checkpoint_best\.pth; export without --best"):
        export_model(model, tmp_path / "out", best=True)
    assert not (tmp_path / "out").exists()


def test_the_export_can_start_a_stock_training(model, make_trainer, tmp_path):
    """-pretrained_weights with the exported file."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    (path,) = export_model(model, tmp_path / "out", "teacher")
    plain = make_trainer(nnUNetTrainer)
    plain.initialize()
    load_pretrained_weights(plain.network, str(path))
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(plain.network.state_dict()[key], read(path)["network_weights"][key])


def test_others_may_read_the_export_as_they_may_the_source(model, tmp_path):
    model.chmod(0o755)
    export_model(model, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


# ---- bad input ----


def nothing_is_left(folder: Path) -> bool:
    return [p.name for p in folder.iterdir()] == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "not a trained model folder.*plans.json, dataset.json missing"),
        (lambda model: (model / "plans.json").unlink(), "not a trained model folder.*plans.json missing"),
        (lambda model: (model / FINAL).unlink(), r"not a trained model folder.*fold_\*/checkpoint_\*\.pth missing"),
        (lambda model: (model / FINAL).write_bytes(b"PK"), "checkpoint_final.pth is broken or cut short"),
        (lambda model: (model / FINAL).write_bytes((model / FINAL).read_bytes()[:20000]), "broken or cut short"),
        (lambda model: torch.save({"weights": 1}, model / FINAL), "is not an nnU-Net checkpoint"),
    ],
    ids=["no folder", "no plans", "no checkpoint", "no zip", "cut short", "another file"],
)
def test_what_is_no_model_is_refused_in_one_line(model, tmp_path, damage: Callable[[Path], None], message):
    damage(model)
    (tmp_path / "into").mkdir()
    with pytest.raises(ValueError, match=message) as error:
        export_model(model, tmp_path / "into" / "out")
    assert "\n" not in str(error.value)
    assert nothing_is_left(tmp_path / "into")


@pytest.mark.parametrize("where", ["fold_9", "sub", "sub/../fold_0/deep"])
def test_the_output_is_not_a_part_of_the_source(model, where: str) -> None:
    """As fold_9 it would be a fold of the next export, and of every prediction."""
    before = sorted(model.rglob("*"))
    with pytest.raises(ValueError, match="lies in the model folder"):
        export_model(model, model / where)
    assert sorted(model.rglob("*")) == before


def test_a_failure_in_a_later_fold_leaves_nothing_behind(model, tmp_path):
    (model / "fold_1").mkdir()
    (model / "fold_1" / "checkpoint_final.pth").write_bytes(b"")
    (tmp_path / "into").mkdir()
    with pytest.raises(ValueError, match="fold_1"):
        export_model(model, tmp_path / "into" / "out")
    assert nothing_is_left(tmp_path / "into")


def test_an_interrupt_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunetv2_ext.core.export._copy", interrupt)
    (tmp_path / "into").mkdir()
    with pytest.raises(KeyboardInterrupt):
        export_model(model, tmp_path / "into" / "out")
    assert nothing_is_left(tmp_path / "into")


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_existing_output_is_not_touched(model, tmp_path, kind):
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        if kind == "folder":
            (output / "plans.json").write_text("mine")
    before = fingerprint(tmp_path)
    with pytest.raises(ValueError, match=r"out exists; name a folder that does not, or remove it"):
        export_model(model, output)
    assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("neighbour", ["out.partial", ".out", "out.tmp"])
def test_neighbours_of_the_output_are_not_touched(model, tmp_path, neighbour):
    (tmp_path / neighbour).mkdir()
    (tmp_path / neighbour / "precious.txt").write_text("mine")
    export_model(model, tmp_path / "out")
    assert (tmp_path / neighbour / "precious.txt").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_one_line(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="cannot write to the folder"):
        export_model(model, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_a_broken_description_is_named(model, tmp_path, name):
    (model / name).write_text("{'plans_name'")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as JSON \(Expecting property name"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_plain_nnunet_needs_no_export(make_trainer, tmp_path):
    folder = save_model(make_trainer(nnUNetTrainer))
    with pytest.raises(ValueError, match="nnUNetTrainer, which is not one of our trainers; there is nothing to export"):
        export_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trainer_that_is_not_installed_is_one_line(model, tmp_path):
    checkpoint = read(model / FINAL)
    checkpoint["trainer_name"] = "nnUNetTrainerOfSomebody"
    torch.save(checkpoint, model / FINAL)
    with pytest.raises(ValueError, match="nnUNetTrainerOfSomebody, which nnU-Net does not find here") as error:
        export_model(model, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_unknown_weights_name_those_there_are(model, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="no 'taecher' weights to export; it has: student, teacher"):
        export_model(model, tmp_path / "out", "taecher")
    with pytest.raises(ValueError, match=r"no 'teacher' weights to export; it has: student$"):
        ExtTrainer.export_weights(read(model / FINAL), "teacher")


def test_a_checkpoint_without_teacher_says_so(make_trainer, tmp_path):
    folder = save_model(make_trainer(nnUNetTrainerMedContext, "medcontext.beta=0"))
    with pytest.raises(ValueError, match=r"has no teacher .*export --weights student"):
        export_model(folder, tmp_path / "out", "teacher")
    export_model(folder, tmp_path / "out", "student")


def test_only_a_model_with_a_bank_can_be_stripped_of_it(make_trainer, tmp_path):
    folder = save_model(make_trainer(nnUNetTrainerMedContext))
    with pytest.raises(ValueError, match=r"nothing that --strip-bank could take out .*; export without --strip-bank"):
        export_model(folder, tmp_path / "out", edits=["strip-bank"])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def signed(make_trainer, monkeypatch) -> Path:
    folder = save_model(make_trainer(nnUNetTrainerMedContext))
    path = folder / "fold_0" / "checkpoint_final.pth"
    torch.save(read(path) | {"name": "Ada"}, path)
    monkeypatch.setattr(
        "nnunetv2_ext.core.export.recursive_find_trainer_class_by_name", lambda name: nnUNetTrainerSigned
    )
    return folder


@pytest.mark.parametrize(
    ("edits", "trainer_name", "name"),
    [
        ([], "nnUNetTrainer", "Ada"),
        (["initial"], "nnUNetTrainer", "A"),
        (["unsign"], "nnUNetTrainerMedContext", None),
        (["unsign", "initial"], "nnUNetTrainerMedContext", None),
    ],
)
def test_a_method_names_what_can_be_taken_out_of_its_models(signed, tmp_path, edits, trainer_name, name):
    (written,) = export_model(signed, tmp_path / "out", edits=edits)
    checkpoint = read(written)
    assert checkpoint["trainer_name"] == trainer_name and checkpoint.get("name") == name
    assert read(signed / "fold_0" / "checkpoint_final.pth")["name"] == "Ada"


@pytest.mark.parametrize("edits", [[], ["unsign"]])
def test_no_case_that_was_trained_on_is_named_in_the_export(make_trainer, signed, tmp_path, edits):
    """Case ids are patients."""
    folder = save_model(make_trainer(nnUNetTrainerMedContext, "train_cases=[ann_1950]", results=tmp_path / "few"))
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    torch.save(read(checkpoint) | {"name": "Ada"}, checkpoint)
    export_model(folder, tmp_path / "out", edits=edits)
    for source, named in ((folder, True), (tmp_path / "out", False)):
        assert any(b"ann_1950" in p.read_bytes() for p in source.rglob("*") if p.is_file()) == named


@pytest.mark.parametrize(
    ("weights", "edits", "message"),
    [
        ("student", ["unsign", "erase"], "--unsign and --erase exclude each other; choose one of them"),
        ("teacher", ["unsign"], "--unsign writes a model of nnUNetTrainerSigned, .*leave out --weights teacher"),
        ("student", ["rename"], r"--rename could take out \(they know --initial, --unsign, --erase\)"),
    ],
)
def test_edits_that_cannot_be_applied_are_refused(signed, tmp_path, weights, edits, message):
    with pytest.raises(ValueError, match=message):
        export_model(signed, tmp_path / "out", weights, edits)
    assert not (tmp_path / "out").exists()


def test_a_validation_result_goes_along_only_with_what_predicts_the_same(signed, tmp_path):
    assert (signed / "fold_0" / "progress.png").is_file()
    for edit, kept in (("unsign", True), ("erase", False)):
        export_model(signed, tmp_path / edit, edits=[edit])
        assert (tmp_path / edit / "fold_0" / "progress.png").exists() == kept


def test_a_notice_is_told_last(signed, tmp_path):
    told: list[str] = []
    export_model(signed, tmp_path / "out", edits=["erase"], tell=told.append)
    assert told[-1] == "Nothing is left."


# ---- another network than plain nnU-Net's ----


@pytest.mark.parametrize(
    ("cls", "difference"),
    [
        (nnUNetTrainerWithHead, r"projection\.weight is 2 x 16 x 1 x 1 x 1 in the weights and missing in its network"),
        (nnUNetTrainerWide, r"conv\.weight is 4 x 1 x 5 x 5 x 5 in the weights and 4 x 1 x 3 x 3 x 3 in its network"),
    ],
)
def test_a_network_that_plain_nnunet_cannot_load_is_refused(make_trainer, monkeypatch, tmp_path, cls, difference):
    folder = save_model(make_trainer(cls))
    monkeypatch.setattr("nnunetv2_ext.core.export.recursive_find_trainer_class_by_name", lambda name: cls)
    (tmp_path / "into").mkdir()
    with pytest.raises(ValueError, match=difference) as error:
        export_model(folder, tmp_path / "into" / "out")
    assert f"predict with {cls.__name__} and this package" in str(error.value) and "\n" not in str(error.value)
    assert nothing_is_left(tmp_path / "into")


def test_weights_that_lack_a_layer_are_refused(model, tmp_path):
    checkpoint = read(model / FINAL)
    del checkpoint["network_weights"]["decoder.seg_layers.0.bias"]
    torch.save(checkpoint, model / FINAL)
    with pytest.raises(
        ValueError, match=r"decoder\.seg_layers\.0\.bias is missing in the weights and 3 in its network"
    ):
        export_model(model, tmp_path / "out")


def test_plans_whose_network_plain_nnunet_does_not_know_are_refused(model, tmp_path):
    checkpoint = read(model / FINAL)
    architecture = checkpoint["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "nobodys.network.OfThisName"
    torch.save(checkpoint, model / FINAL)
    with pytest.raises(
        ValueError, match=r"plain nnU-Net cannot build the network of .*class could not be found"
    ) as error:
        export_model(model, tmp_path / "out")
    assert "\n" not in str(error.value)
