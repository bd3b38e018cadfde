"""The picture shows what was read, and drawing it changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nnunetv2_ext.core.labelmaps import target_to_labels
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.jras.panel import ReadingView, draw_reading, view_of_patch
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(params=["2d", "3d_fullres"])
def trainer(make_trainer, small_jras, request):
    trainer = make_trainer(nnUNetTrainerJRAS, f"{small_jras} seed=3", configuration=request.param)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    return trainer


def test_the_view_is_what_the_network_read(trainer):
    batch = Batch.from_loader(trainer.last_batch, trainer.device).select([1])
    found, logits = trainer.read_bank(batch)
    truth = target_to_labels(batch.top_target[0], trainer.label_manager)
    cases = trainer._bank_state["cases"]
    view = view_of_patch(trainer.network, logits, batch.data, batch.keys[0], trainer.label_manager, truth, cases)
    patch = tuple(trainer.configuration_manager.patch_size)
    assert view.name == batch.keys[0] and view.image.shape == view.prediction.shape == view.read.shape == patch
    assert np.array_equal(view.truth, batch.top_target[0, 0].numpy())
    assert view.guides and sum(guide.attention for guide in view.guides) == pytest.approx(1, abs=1e-4)
    bank = trainer.network.bank
    for guide, row in zip(view.guides, found.ids[0].tolist()):
        assert guide.row == row and guide.title == f"guide {cases[row]}" and cases[row] != view.name
        assert guide._replace(case=None).title == f"guide {row} (case hidden)"
        assert np.array_equal(guide.labels, bank.labels[row].numpy())
    # at the resolution of the read itself, the likeliest of the transported masks
    if found.transported.shape[2:] == batch.data.shape[2:]:
        assert np.array_equal(view.read, found.transported[0].argmax(0).numpy())


def test_the_trainer_draws_it_beside_other_methods_pictures_and_changes_nothing(trainer, tmp_path):
    mode, state = trainer.network.training, trainer.generator.get_state()
    trainer.draw_panel(tmp_path / "panel_epoch_0000.png")
    assert trainer.network.training == mode and torch.equal(trainer.generator.get_state(), state)
    assert [p.name for p in tmp_path.glob("*.png")] == ["panel_epoch_0000_guides.png"]
    picture = imread(tmp_path / "panel_epoch_0000_guides.png")
    assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05


def test_a_patch_without_truth_and_guides_can_be_drawn(trainer, tmp_path):
    shape = tuple(trainer.configuration_manager.patch_size)
    empty = np.zeros(shape, int)
    view = ReadingView("case", np.zeros(shape), None, empty, empty, [])
    file = tmp_path / "none.png"
    draw_reading(view, file, "title", trainer.dataset_json, trainer.label_manager, [1] * len(shape))
    assert Path(file).stat().st_size > 1000
