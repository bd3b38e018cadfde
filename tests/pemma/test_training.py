"""Start, training, prediction without the base, export; the base never changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_ext.cli import main
from nnunetv2_ext.core.checkpoint import read
from nnunetv2_ext.pemma.missing import KeepMissing
from nnunetv2_ext.pemma.network import is_present
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from tests.conftest import TinyDataset
from tests.pemma.conftest import base_file, plans_of

pytestmark = pytest.mark.usefixtures("no_pictures")
SHORT = "num_epochs=1 num_iterations_per_epoch=3 num_val_iterations_per_epoch=1 panel_every=1 initial_lr=0.05"
SMALL_JRAS = "jras.key_dim=8 jras.value_dim=4 jras.num_guides=2 jras.bank_size=24"
_models: dict[str, Path] = {}


@pytest.fixture
def model(new: Any, extended: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished model folder; its base has been deleted since."""
    if "a" not in _models:
        base = shutil.copytree(extended.model, tmp_path_factory.mktemp("base") / "model")  # type: ignore[arg-type]
        trainer = new(f"pemma.base={base} seed=1 {SHORT}", results=tmp_path_factory.mktemp("results"))
        trainer.run_training()
        ours = {id(p) for p in trainer.network.adapters.parameters()}
        assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == ours
        shutil.rmtree(base)
        _models["a"] = Path(trainer.output_folder_base)
    return _models["a"]


@pytest.fixture
def other_site(model: Path, new: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model of the same base, which went on from the first one's adapters."""
    if "b" not in _models:
        settings = f"pemma.base={{model}} pemma.start_from={model} seed=2 {SHORT}"
        trainer = new(settings, results=tmp_path_factory.mktemp("other"))
        trainer.run_training()
        _models["b"] = Path(trainer.output_folder_base)
    return _models["b"]


def predicted(folder: Path, files: list[Path], output: Path) -> bytes:
    """The label map of one case, as stock nnU-Net writes it."""
    output.mkdir()
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    predictor.predict_from_files_sequential([[str(file) for file in files]], [str(output / "case")])
    return (output / "case.nii.gz").read_bytes()


def test_a_finished_model_has_what_it_needs_and_the_base_as_it_was(model: Path, extended: TinyDataset) -> None:
    fold = model / "fold_0"
    facts = json.loads((fold / "pemma.json").read_text())
    assert facts["old_channels"] == ["T1"] and facts["new_channels"] == ["T2"] and len(facts["base_sha256"]) == 64
    assert facts["base_trainer"] == "nnUNetTrainer" and 0 < facts["share"] == facts["trainable"] / facts["of_base"]
    assert (fold / "panel_epoch_0000.png").is_file()
    assert "pemma/present" in (fold / "epochs.csv").read_text()
    ours, theirs = read(fold / "checkpoint_final.pth")["network_weights"], read(base_file(extended))["network_weights"]
    base = {name.removeprefix("base."): value for name, value in ours.items() if name.startswith("base.")}
    assert list(base) == list(theirs) and all(torch.equal(base[name], theirs[name]) for name in base)


@pytest.mark.parametrize("mask", [False, True])
def test_without_the_channel_the_file_is_that_of_the_base_byte_for_byte(model, extended, tmp_path, mask) -> None:
    t1, t2 = sorted(extended.images_ts.glob("*.nii.gz"))
    zeros = tmp_path / "case_0001.nii.gz"
    image = sitk.ReadImage(str(t1)) * 0
    sitk.WriteImage(image, str(zeros))
    folders = [shutil.copytree(folder, tmp_path / name) for folder, name in ((model, "new"), (extended.model, "old"))]
    for folder in folders if mask else ():
        plans = json.loads((folder / "plans.json").read_text())
        masks = plans["configurations"]["2d"]["use_mask_for_norm"]
        plans["configurations"]["2d"]["use_mask_for_norm"] = [True] * len(masks)
        (folder / "plans.json").write_text(json.dumps(plans))
    old = predicted(folders[1], [t1], tmp_path / "a")
    assert predicted(folders[0], [t1, zeros], tmp_path / "b") == old
    assert predicted(folders[0], [t1, t2], tmp_path / "c") != old
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a" / "case.nii.gz")))
    assert len(np.unique(labels)) > 1


def test_a_checkpoint_is_continued_when_the_base_is_gone(model: Path, new: Any, tmp_path: Path) -> None:
    results = shutil.copytree(model.parents[1], tmp_path / "copy")
    trainer = new("pemma.channel_dropout=0", continued=True, results=results)
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.load_checkpoint(str(file))
    saved = read(file)["network_weights"]
    assert all(torch.equal(value, saved[name]) for name, value in trainer.network.state_dict().items())
    assert trainer.method_state()["pemma"]["base_trainer"] == "nnUNetTrainer" and trainer.old_channels == 1


def test_the_first_step_starts_at_the_base(new: Any, extended: TinyDataset, fixed_batches: Any) -> None:
    trainer = new()
    trainer.initialize()
    [batch] = fixed_batches(trainer, 1)
    assert batch["data"].shape[1] == 2
    with torch.no_grad():
        ours = trainer.network.train()(batch["data"])
        base = trainer.network.base(batch["data"][:, :1].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, base, strict=True))
    weights = read(base_file(extended))["network_weights"]
    assert torch.equal(trainer.network.base.state_dict()["encoder.stages.0.0.convs.0.conv.weight"], weights["encoder.stages.0.0.convs.0.conv.weight"])  # fmt: skip  # noqa: E501


class Noise(BasicTransform):
    """As nnU-Net's, which knows nothing of missing channels."""

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        return {**data_dict, "image": data_dict["image"] + 1 + torch.rand(data_dict["image"].shape)}


def test_noise_does_not_fill_a_missing_channel() -> None:
    keep = KeepMissing(Noise(), 1)
    image = torch.zeros(2, 4, 4)
    assert not keep(image=image)["image"][1].any() and keep(image=image)["image"][0].all()
    image[1, 0, 0] = 1
    assert keep(image=image)["image"][1].all()


def test_batches_of_cases_without_the_channel_have_zeros_behind_all_augmentation(new: Any) -> None:
    trainer = new("pemma.base={model} seed=3 gin=1")
    trainer.on_train_start()
    seen: dict[bool, int] = {True: 0, False: 0}
    for _ in range(12):
        batch = next(trainer.dataloader_train)
        for key, present in zip(batch["keys"], is_present(batch["data"][:, 1:]).tolist()):
            seen[present] += 1
            assert present == (key not in ("phantom_003", "phantom_004"))
    assert min(seen.values()) > 3


def test_what_random_convolutions_do_on_the_device_leaves_a_missing_channel_zero(new: Any, fixed_batches: Any) -> None:
    trainer = new("pemma.base={model} gin=1 gin_on=device")
    trainer.on_train_start()
    [batch] = fixed_batches(trainer, 1)
    batch["data"][0, 1] = 0
    found = trainer.on_device(batch).data
    assert is_present(found[:, 1:]).tolist() == [False, True] and not torch.equal(found[:, 0], batch["data"][:, 0])


def test_channel_dropout_takes_the_new_channel_from_a_share_of_the_samples(new: Any, fixed_batches: Any) -> None:
    trainer = new("pemma.base={model} pemma.channel_dropout=0.5 seed=2")
    trainer.initialize()
    given: list[torch.Tensor] = []
    trainer.forward = lambda batch, network=None: given.append(batch.data) or trainer.network(batch.data)
    for batch in fixed_batches(trainer, 20):
        trainer.train_step(batch)
        assert batch["data"][:, 1].any(), "the loader's own stays"
    present = torch.cat([is_present(data[:, 1:]) for data in given])
    assert 8 < int(present.sum()) < 32
    assert all(data[:, 0].any() for data in given)


def test_two_sites_have_adapters_of_their_own_beside_one_base(
    model: Path, other_site: Path, extended: TinyDataset, tmp_path: Path
) -> None:
    a, b = (read(folder / "fold_0" / "checkpoint_final.pth")["network_weights"] for folder in (model, other_site))
    base = {f"base.{name}": value for name, value in read(base_file(extended))["network_weights"].items()}
    assert list(a) == list(b)
    differ = {name for name in a if not torch.equal(a[name], b[name])}
    assert differ and all(name.startswith("adapters.") for name in differ)
    assert all(torch.equal(value, weights[name]) for weights in (a, b) for name, value in base.items())
    t1, t2 = sorted(extended.images_ts.glob("*.nii.gz"))
    zeros = tmp_path / "case_0001.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(t1)) * 0, str(zeros))
    old = predicted(extended.model, [t1], tmp_path / "old")  # type: ignore[arg-type]
    without = {predicted(folder, [t1, zeros], tmp_path / f"{i}") for i, folder in enumerate((model, other_site))}
    both = {predicted(folder, [t1, t2], tmp_path / f"{i} both") for i, folder in enumerate((model, other_site))}
    assert without == {old} and len(both | {old}) == 3, "the model folder chooses the adapters"


def test_it_goes_on_from_other_adapters_of_the_same_base(model: Path, new: Any, extended: TinyDataset) -> None:
    """Of a model folder, of a fold's folder or of a file."""
    file = model / "fold_0" / "checkpoint_final.pth"
    before, theirs = file.read_bytes(), read(file)["network_weights"]
    for given in (model, file.parent, file):
        trainer = new(f"pemma.base={{model}} pemma.start_from={given}")
        trainer.initialize()
        assert all(torch.equal(v, trainer.network.state_dict()[n]) for n, v in theirs.items())
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match=r"has other adapters: adapters\.heads\.\S+ is 3 x .* there and missing here"):
        new(f"pemma.base={{model}} pemma.train_heads=false pemma.start_from={file}").initialize()
    with pytest.raises(
        ValueError, match=rf"start_from={model}: fold 1 .*give one of its files, fold_0/checkpoint_final"
    ):
        new(f"pemma.base={{model}} pemma.start_from={model}", fold=1).initialize()
    with pytest.raises(ValueError, match="start_from=/nowhere does not exist"):
        new("pemma.base={model} pemma.start_from=/nowhere").initialize()
    with pytest.raises(ValueError, match="copy it to another folder"):
        new(f"pemma.base={{model}} pemma.start_from={file}", results=model.parents[1]).initialize()


def test_adapters_of_another_base_are_refused(model: Path, new: Any, extended: TinyDataset, tmp_path: Path) -> None:
    other = read(base_file(extended))
    other["network_weights"] = {name: value + 1 for name, value in other["network_weights"].items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="was trained on another base"):
        new(f"pemma.base={tmp_path / 'other.pth'} pemma.start_from={model / 'fold_0'}").initialize()


def test_the_base_is_handed_on_as_a_plain_model(model: Path, extended: TinyDataset, tmp_path: Path, capsys) -> None:
    t1, _ = sorted(extended.images_ts.glob("*.nii.gz"))
    assert main(["export", str(model), str(tmp_path / "plain"), "--weights", "base"]) == 0
    exported = read(tmp_path / "plain" / "fold_0" / "checkpoint_final.pth")
    theirs = read(base_file(extended))
    assert exported["trainer_name"] == "nnUNetTrainer"
    assert all(torch.equal(v, theirs["network_weights"][n]) for n, v in exported["network_weights"].items())
    for described in (
        exported["init_args"]["dataset_json"],
        json.loads((tmp_path / "plain" / "dataset.json").read_text()),
    ):
        assert described["channel_names"] == {"0": "T1"}
    plans = json.loads((tmp_path / "plain" / "plans.json").read_text())
    assert plans["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert predicted(tmp_path / "plain", [t1], tmp_path / "a") == predicted(extended.model, [t1], tmp_path / "b")
    assert main(["export", str(model), str(tmp_path / "student")]) == 2
    assert "add --weights base" in capsys.readouterr().err and not (tmp_path / "student").exists()


def test_a_merged_model_predicts_the_same_with_both_channels(
    model: Path, extended: TinyDataset, tmp_path: Path, capsys
) -> None:
    files = sorted(extended.images_ts.glob("*.nii.gz"))
    assert main(["export", str(model), str(tmp_path / "merged"), "--merged"]) == 0
    assert "give it both channels" in capsys.readouterr().out
    weights = read(tmp_path / "merged" / "fold_0" / "checkpoint_final.pth")["network_weights"]
    assert {name.split(".")[1] for name in weights if name.startswith("adapters.")} == {"stem"}
    outputs = []
    for folder in (model, tmp_path / "merged"):
        predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        x = torch.randn(1, 2, 24, 24, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            outputs.append(predictor.network.eval()(x))
    assert torch.allclose(*outputs, atol=1e-5 * float(outputs[0].abs().max()) + 1e-5)
    assert predicted(model, files, tmp_path / "a") and predicted(tmp_path / "merged", files, tmp_path / "b")


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("", r"pemma\.base is not set: name the finished model"),
        ("pemma.base=/nowhere", r"pemma\.base=/nowhere does not exist"),
        ("pemma.base={model} init_from=x.pth", "init_from=x.pth is about weights of the base"),
        ("pemma.base={model} encoder_lr_factor=0.1", "encoder_lr_factor=0.1 is about weights of the base"),
        ("pemma.base={model} freeze_encoder_epochs=1", "freeze_encoder_epochs=1 is about"),
        ("pemma.base={model} pemma.base_channels=2", r"pemma\.base_channels=2, and the base has 1 channels"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(new: Any, settings: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        new(settings).on_train_start()
    assert "\n" not in str(refusal.value)


def test_pretrained_weights_are_refused(new: Any, extended: TinyDataset) -> None:
    def maybe_load_checkpoint(trainer: Any, pretrained_weights_file: str) -> None:
        trainer.initialize()

    with pytest.raises(ValueError, match=r"-pretrained_weights and pemma\.base both"):
        maybe_load_checkpoint(new(), str(base_file(extended)))


def test_a_fold_without_a_base_of_its_own_is_refused(new: Any, extended: TinyDataset) -> None:
    trainer = new(fold=3)
    with pytest.raises(
        ValueError, match=r"fold 3 starts from fold 3 there.*give one of its files, fold_0/checkpoint_final"
    ):
        trainer.initialize()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plans, data: data["labels"].update(organ_3=3),
         "the label organ_3 is missing in the base's dataset.json"),
        (lambda plans, data: data["labels"].pop("organ_2"),
         "the label organ_2 is 2 in the base's dataset.json and missing"),
        (lambda plans, data: data.update(channel_names={"0": "T2", "1": "T1"}),
         "are not the first of the dataset's T2, T1"),
        (lambda plans, data: data.update(channel_names={"0": "FLAIR", "1": "T2"}),
         "the dataset's FLAIR, T2: names differ"),
        (lambda plans, data: plans["configurations"]["2d"].update(spacing=[3.0, 3.0]),
         r"spacing is \[1\.0, 1\.0\] in the"),
        (
            lambda plans, data: plans["configurations"]["2d"]["architecture"]["arch_kwargs"].update(conv_bias=False),
            "architecture is ",
        ),
        (
            lambda plans, data: plans["configurations"]["2d"].update(normalization_schemes=["NoNormalization"] * 2),
            r"normalization_schemes is \['ZScore",
        ),
    ],
)  # fmt: skip
def test_a_base_that_does_not_fit_is_refused_by_the_first_difference(
    new: Any, extended: TinyDataset, change: Any, said: str, monkeypatch
) -> None:
    plans, dataset_json = plans_of(extended), extended.dataset_json()
    change(plans, dataset_json)
    monkeypatch.setattr(TinyDataset, "dataset_json", lambda self: dataset_json)
    trainer = new(plans=plans)
    with pytest.raises(ValueError, match=said) as refusal:
        trainer.initialize()
    assert "\n" not in str(refusal.value) and "does not fit these plans" in str(refusal.value)


def test_a_base_of_another_network_is_refused(new: Any, model: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is of nnUNetTrainerPEMMA, whose network is not plain.*run nnUNetv2_ext export"
    ):
        new(f"pemma.base={model}").initialize()


def test_a_base_of_j_ras_is_refused_and_its_export_is_taken(
    new: Any, make_trainer: Any, extended: TinyDataset, tmp_path: Path, monkeypatch
) -> None:
    """The remedy that the message names passes."""
    plans, alone = (json.loads((extended.model / f"{name}.json").read_text()) for name in ("plans", "dataset"))  # type: ignore[operator]
    with monkeypatch.context() as patch:
        patch.setattr(TinyDataset, "dataset_json", lambda self: alone)
        known = {"plans": plans, "configuration": "2d", "dataset": extended, "results": tmp_path / "results"}
        jras = make_trainer(nnUNetTrainerJRAS, SMALL_JRAS, **known)
        jras.on_train_start()
    jras.save_checkpoint(str(Path(jras.output_folder) / "checkpoint_final.pth"))
    folder = jras.output_folder_base
    with pytest.raises(ValueError, match=r"is of nnUNetTrainerJRAS, whose network is not plain.*nnUNetv2_ext export"):
        new(f"pemma.base={folder}").initialize()
    assert main(["export", folder, str(tmp_path / "plain")]) == 0
    trainer = new(f"pemma.base={tmp_path / 'plain'}")
    trainer.initialize()
    theirs = jras.network.backbone.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.network.base.state_dict().items())


def test_if_no_training_case_has_the_channel_there_is_nothing_to_train(new: Any) -> None:
    trainer = new('pemma.base={model} train_cases=["phantom_003","phantom_004"]')
    with pytest.raises(ValueError, match=r"T2 is missing \(all zeros\) in each of the 2 training cases of fold 0"):
        trainer.on_train_start()


def test_a_dataset_without_a_fingerprint_is_told_what_to_run(new: Any, extended: TinyDataset) -> None:
    fingerprint = extended.preprocessed / extended.name / "dataset_fingerprint.json"
    aside = fingerprint.rename(fingerprint.with_suffix(".aside"))
    try:
        with pytest.raises(ValueError, match=r"fingerprint\.json is missing: run nnUNetv2_extract_fingerprint -d 007"):
            new().on_train_start()
    finally:
        aside.rename(fingerprint)


def test_a_base_of_a_cascade_is_refused(extended: TinyDataset, new: Any, tmp_path: Path) -> None:
    checkpoint = read(base_file(extended))
    plans = json.loads(json.dumps(checkpoint["init_args"]["plans"]))
    plans["configurations"]["2d"]["previous_stage"] = "3d_lowres"
    torch.save(checkpoint | {"init_args": {**checkpoint["init_args"], "plans": plans}}, tmp_path / "cascade.pth")
    with pytest.raises(ValueError, match="is the second stage of a cascade"):
        new(f"pemma.base={tmp_path / 'cascade.pth'}").initialize()


def test_folds_of_other_numbers_of_channels_do_not_meet(model: Path, new: Any) -> None:
    """The number is known before the settings of the folds are compared."""
    trainer = new(fold=1, results=model.parents[1])
    trainer.on_train_start()
    assert trainer.old_channels == 1
