"""Models without patients: plain nnU-Net's weights, and a J-RAS model with an empty bank."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.jras.strip import without_bank, without_groups
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS
from nnunetv2_ext.trainers.nnUNetTrainerMedContextJRAS import nnUNetTrainerMedContextJRAS
from tests.jras.conftest import empty

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def trained(make_trainer, small_jras, tmp_path):
    """``trained(cls, settings)``: a trainer after two steps on the real data, and its checkpoint."""

    def train(cls: type, settings: str = ""):
        trainer = make_trainer(cls, f"{small_jras} seed=3 {settings}", configuration="2d")
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)])
        path = tmp_path / "checkpoint.pth"
        trainer.save_checkpoint(str(path))
        return trainer, path

    return train


@pytest.mark.parametrize("cls", [nnUNetTrainerJRAS, nnUNetTrainerMedContextJRAS])
def test_the_exported_weights_load_into_plain_nnunet_and_predict_as_without_guides(trained, make_trainer, cls):
    trainer, path = trained(cls)
    plain = make_trainer(nnUNetTrainer, configuration="2d")
    plain.initialize()
    x = torch.randn(2, 1, 24, 24)
    for weights in ["student", *(["teacher"] if cls is nnUNetTrainerMedContextJRAS else [])]:
        source = trainer.network if weights == "student" else trainer.teacher.module
        source.decoder.deep_supervision = True
        plain.network.load_state_dict(cls.export_weights(read(path), weights))
        guided = source.eval()(x)
        kept = source.bank.state_dict()
        empty(source.bank)
        assert all(torch.equal(a, b) for a, b in zip(source(x), plain.network.eval()(x)))
        assert not torch.equal(guided[0], source(x)[0])
        source.bank.load_state_dict(kept)


def test_an_unknown_kind_of_weights_is_refused(trained):
    _, path = trained(nnUNetTrainerJRAS)
    with pytest.raises(ValueError, match="teacher"):
        nnUNetTrainerJRAS.export_weights(read(path), "teacher")


@pytest.mark.parametrize("cls", [nnUNetTrainerJRAS, nnUNetTrainerMedContextJRAS])
def test_a_stripped_checkpoint_holds_no_image_and_predicts_on_the_plain_path(trained, tmp_path, cls):
    trainer, path = trained(cls)
    stripped = tmp_path / "stripped.pth"
    torch.save(without_bank(read(path)), stripped)
    content = stripped.read_bytes()
    for row in range(len(trainer.network.bank)):  # torch's files are not compressed, so an image's bytes would be found
        piece = trainer.network.bank.images[row].contiguous().numpy().tobytes()
        assert piece in path.read_bytes() and piece not in content
    for case in trainer._bank_state["cases"]:
        assert case.encode() not in content
    weights = read(stripped)["network_weights"]
    empty(trainer.network.bank)
    expected = trainer.network.eval()(torch.ones(1, 1, 24, 24))
    trainer.network.load_state_dict(weights)
    assert trainer.network.bank.is_empty
    assert all(torch.equal(a, b) for a, b in zip(expected, trainer.network(torch.ones(1, 1, 24, 24))))


def test_without_groups_the_model_predicts_the_same_and_names_nobody(trained):
    trainer, path = trained(nnUNetTrainerJRAS)
    blank = without_groups(read(path))
    assert EXTENSION_KEY not in blank and blank["network_weights"]["bank.groups"].abs().max() == 0
    x = torch.randn(1, 1, 24, 24)
    expected = trainer.network.eval()(x)
    trainer.network.load_state_dict(blank["network_weights"])
    assert all(torch.equal(a, b) for a, b in zip(expected, trainer.network(x)))
