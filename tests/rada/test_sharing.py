"""A trained model leaves home: folds as an ensemble, mirrored, and from a zip, by nnU-Net's own predictor."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

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
