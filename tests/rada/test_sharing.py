"""A trained model leaves home: folds as an ensemble, mirrored, and from a zip, by nnU-Net's own predictor."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

from nnunetv2_ext.cli.dispatch import main
from nnunetv2_ext.core.checkpoint import read
from nnunetv2_ext.core.export import export_model
from tests.rada.trainers import mixed_keys, sparse_batch

pytestmark = pytest.mark.usefixtures("no_pictures")

FINAL = "checkpoint_final.pth"


@pytest.fixture
def model(make_rada, tiny_clip) -> Path:
    """Folds 0 and 1 with active semantic heads; their banks differ, and so do the axes their networks hold."""
    settings = f"rada.semantics=clip rada.clip_model={tiny_clip.name} rada.clip_weights={tiny_clip.weights}"
    for fold in (0, 1):
        trainer = make_rada(settings, fold=fold)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        trainer.train_step(sparse_batch(trainer, mixed_keys(trainer)))
        if fold == 1:
            trainer.rada_network.bank.set_views([(0, 2), (0,), (2,)])
        with torch.no_grad():
            for member in trainer.rada_network.members:
                member.head.gate.fill_(3.0)
        trainer.save_checkpoint(str(Path(trainer.output_folder) / FINAL))
        for name in ("progress.png", "validation/summary.json"):  # nnU-Net's export wants them
            file = Path(trainer.output_folder) / name
            file.parent.mkdir(exist_ok=True)
            file.touch()
    return Path(trainer.output_folder_base)


@pytest.fixture
def plain_model(make_rada, tmp_path) -> Path:
    """Fold 0 without semantics, after a step; in another folder of results than `model`."""
    trainer = make_rada("rada.semantics=off", results=tmp_path / "plain")
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(sparse_batch(trainer, mixed_keys(trainer)))
    trainer.save_checkpoint(str(Path(trainer.output_folder) / FINAL))
    return Path(trainer.output_folder_base)


def predicting_with(model: Path, infer: str) -> Path:
    """The model folder, told to predict so."""
    plans = json.loads((model / "plans.json").read_text())
    plans["nnunetv2_ext"]["rada"]["infer"] = infer
    (model / "plans.json").write_text(json.dumps(plans))
    return model


def predictor_of(model: Path, folds: tuple[int, ...], mirrored: bool = False) -> Any:
    # Gaussian weights in half precision round the corners of a patch to nothing
    options = {"use_mirroring": mirrored, "use_gaussian": False, "allow_tqdm": False}
    predictor = nnUNetPredictor(device=torch.device("cpu"), **options)
    predictor.initialize_from_trained_model_folder(str(model), folds, FINAL)
    return predictor


def predicted(model: Path, folds: tuple[int, ...]) -> torch.Tensor:
    """Logits (C, X, Y, Z) of a fixed volume."""
    volume = torch.randn(1, 20, 28, 18, generator=torch.Generator().manual_seed(0))
    return predictor_of(model, folds).predict_logits_from_preprocessed_data(volume).float()


def test_folds_with_other_banks_and_views_are_an_ensemble(model):
    alone = [predicted(model, (fold,)) for fold in (0, 1)]
    assert float((alone[0] - alone[1]).abs().max()) > 0.1
    for folds in ((0, 1), (1, 0)):  # a fold leaves nothing behind for the next one
        torch.testing.assert_close(predicted(model, folds), (alone[0] + alone[1]) / 2, atol=0.02, rtol=0.02)


def test_mirrored_prediction_and_a_zip_installed_elsewhere(model, tmp_path, monkeypatch):
    predictor = predictor_of(model, (0,), mirrored=True)
    assert predictor.allowed_mirroring_axes == (0, 1, 2)
    patch = torch.randn(1, *predictor.configuration_manager.patch_size, generator=torch.Generator().manual_seed(1))
    network = predictor.network.eval()
    with torch.no_grad():
        flips = [axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n)]
        expected = torch.stack([network(patch[None].flip(axes)).flip(axes)[0] for axes in flips]).mean(0)
    found = predictor.predict_logits_from_preprocessed_data(patch).float()
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)

    expected = predicted(model, (0, 1))
    dataset, fresh = model.parent.name, tmp_path / "fresh"
    export_pretrained_model(
        dataset,
        str(tmp_path / "model.zip"),
        ("3d_fullres",),
        "nnUNetTrainerRADA",
        "tiny",
        folds=(0, 1),
        save_checkpoints=(FINAL,),
        strict=False,
    )
    fresh.mkdir()
    monkeypatch.setenv("nnUNet_results", str(fresh))
    install_model_from_zip_file(str(tmp_path / "model.zip"))
    assert torch.equal(predicted(fresh / dataset / model.name, (0, 1)), expected)


def test_an_export_names_no_local_file_and_predicts_without_this_package(model, tiny_clip, tmp_path, monkeypatch):
    """``rada.clip_weights`` may be a path; it is in the source's plans and checkpoints, which a zip takes along."""
    paths = str(tiny_clip.weights).encode(), str(tmp_path).encode()
    for file in ("plans.json", f"fold_0/{FINAL}"):
        assert paths[0] in (model / file).read_bytes()
    written = export_model(model, tmp_path / "out", "net2", edits=["drop-semantics"])
    assert len(written) == 2
    for file in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert not any(path in file.read_bytes() for path in paths), file
    shutil.move(tiny_clip.weights, tmp_path / "away")
    try:
        monkeypatch.delenv("nnUNet_extTrainer")
        assert bool(predicted(tmp_path / "out", (0, 1)).isfinite().all())
    finally:
        shutil.move(tmp_path / "away", tiny_clip.weights)


@pytest.mark.parametrize("number", [1, 3])
def test_an_exported_network_is_that_network_alone_bit_for_bit(plain_model, tmp_path, monkeypatch, number):
    expected = predicted(predicting_with(plain_model, f"single:{number}"), (0,))
    assert not torch.equal(predicted(predicting_with(plain_model, "mean"), (0,)), expected)
    assert main(["export", str(plain_model), str(tmp_path / "out"), "--weights", f"net{number}"]) == 0
    checkpoint = read(tmp_path / "out" / "fold_0" / FINAL)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and "nnunetv2_ext" not in checkpoint
    monkeypatch.delenv("nnUNet_extTrainer")  # nnU-Net finds its own trainers only
    assert torch.equal(predicted(tmp_path / "out", (0,)), expected)


def test_the_command_refuses_active_heads_and_drops_them_when_told(model, plain_model, tmp_path, capsys):
    """Dropped, the network is ``rada.infer=single:1`` of the same weights with the semantics off."""
    out = tmp_path / "out"
    assert main(["export", str(model), str(out), "--weights", "net1"]) == 2
    assert "semantic head of net1 is active (gate 3)" in capsys.readouterr().err and not out.exists()
    assert main(["export", str(model), str(out), "--weights", "student", "--drop-semantics"]) == 2
    assert "net1|net2|net3" in capsys.readouterr().err and not out.exists()
    assert main(["export", str(model), str(out), "--weights", "net1", "--drop-semantics"]) == 0
    active = predicted(predicting_with(model, "single:1"), (0,))
    # the same weights in a model that was never given heads: both folders belong to the same dataset and trainer
    source = read(model / "fold_0" / FINAL)
    off = tmp_path / "off"
    (off / "fold_0").mkdir(parents=True)
    plans = json.loads((model / "plans.json").read_text())
    plans["nnunetv2_ext"]["rada"] |= {"semantics": "off", "infer": "single:1"}
    (off / "plans.json").write_text(json.dumps(plans))
    shutil.copy(model / "dataset.json", off)
    weights = {name: w for name, w in source["network_weights"].items() if ".network." in name or name == "bank.views"}
    empty = {"bank.image": torch.zeros(3, 3, 0), "bank.text": torch.zeros(3, 0)}
    torch.save(source | {"network_weights": weights | empty}, off / "fold_0" / FINAL)
    expected = predicted(off, (0,))
    assert torch.equal(predicted(out, (0,)), expected) and not torch.equal(active, expected)
    assert main(["export", str(plain_model), str(tmp_path / "none"), "--weights", "net1", "--drop-semantics"]) == 2
    assert "no semantic heads" in capsys.readouterr().err
