"""Trainers ready to step, and their batches."""

from pathlib import Path

import pytest
import torch

from nnunetv2_ext.bench.candidates import Candidate
from nnunetv2_ext.bench.subject import Subject, Target, dry_environment, synthetic_batch


def test_synthetic_batches_have_the_shapes_and_only_valid_labels() -> None:
    target = [torch.zeros(2, 1, 8, 8, 8, dtype=torch.int16), torch.zeros(2, 1, 4, 4, 4, dtype=torch.int16)]
    real = {"data": torch.zeros(2, 3, 8, 8, 8), "target": target, "keys": ["a", "b"]}
    found = synthetic_batch(real, num_labels=3)
    assert found["data"].shape == real["data"].shape and found["data"].std() > 0.9
    assert [t.shape for t in found["target"]] == [t.shape for t in target]
    assert found["target"][0].unique().tolist() == [0, 1, 2] and found["target"][0].dtype == torch.int16
    assert found["keys"] == ["a", "b"] and real["data"].abs().max() == 0


def test_synthetic_regions_are_zeros_and_ones() -> None:
    real = {"data": torch.zeros(2, 1, 8, 8), "target": torch.zeros(2, 3, 8, 8, dtype=torch.int16), "keys": []}
    assert synthetic_batch(real, num_labels=4)["target"].unique().tolist() == [0, 1]


def test_plain_and_ours_get_the_same_weights_and_the_same_patches(tiny, tmp_path: Path, monkeypatch) -> None:
    for name, value in tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("nnUNet_ext_settings")
    target = Target(tiny.name, "3d_fullres", "tiny")
    with dry_environment() as folder:
        plain, ours = (Subject(Candidate(name), target) for name in ("nnUNetTrainer", "nnUNetTrainerMedContext"))
        assert Path(ours.trainer.output_folder).is_relative_to(folder)
        with ours.turn("predict") as predict:
            predict()
            assert not ours.trainer.network.training and isinstance(
                ours.trainer.network(ours.batches["real"]["data"]), torch.Tensor
            )
        assert ours.trainer.network.training and ours.trainer.network.decoder.deep_supervision
    assert not folder.exists()
    for kind in ("real", "synthetic"):
        assert torch.equal(plain.batches[kind]["data"], ours.batches[kind]["data"])
    for a, b in zip(plain.trainer.network.parameters(), ours.trainer.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.tensor(ours.batches["real"]["data"].shape), torch.tensor([2, 1, 16, 24, 16]))
    with pytest.raises(ValueError, match="takes no settings"), dry_environment():
        Subject(Candidate("nnUNetTrainer", "seed=1"), target)
