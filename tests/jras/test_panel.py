"""The picture shows what was retrieved, and drawing it changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.jras.panel import GuideView, draw_guides, view_of_batch
from nnunetv2_ext.trainers.nnUNetTrainerJRAS import nnUNetTrainerJRAS

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(params=["2d", "3d_fullres"])
def trainer(make_trainer, small_jras, request):
    trainer = make_trainer(nnUNetTrainerJRAS, f"{small_jras} seed=3", configuration=request.param)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    return trainer


def test_the_view_is_what_the_network_retrieved_for_the_fullest_sample(trainer):
    batch = Batch.from_loader(trainer.last_batch, trainer.device)
    mode, state = trainer.network.training, trainer.generator.get_state()
    view = view_of_batch(trainer, batch)
    assert trainer.network.training == mode and torch.equal(trainer.generator.get_state(), state)
    fullest = int((batch.top_target > 0).flatten(1).sum(1).argmax())
    assert view.name == batch.keys[fullest]
    assert np.array_equal(view.truth, batch.top_target[fullest, 0].numpy())
    assert view.prediction.shape == view.image.shape == tuple(trainer.configuration_manager.patch_size)
    bank, ids = trainer.network.bank, [guide.row for guide in view.guides]
    assert np.allclose([guide.image for guide in view.guides], bank.stored_images(torch.tensor(ids))[:, 0].numpy())
    stored = bank.labels[ids].numpy()
    assert np.array_equal([guide.labels for guide in view.guides], np.where(stored == 255, 0, stored))
    assert sum(guide.weight for guide in view.guides) + view.null_weight == pytest.approx(1, abs=1e-5)
    assert trainer._bank_state["cases"][ids[0]] != view.name
    for number, guide in zip(ids, view.guides):
        assert guide.cosine == pytest.approx(float(trainer.network.last.queries[0] @ bank.keys[number]), abs=1e-5)


def test_the_trainer_draws_it_beside_other_methods_pictures(trainer, tmp_path):
    trainer.draw_panel(tmp_path / "panel_epoch_0000.png")
    assert [p.name for p in tmp_path.glob("*.png")] == ["panel_epoch_0000_guides.png"]
    picture = imread(tmp_path / "panel_epoch_0000_guides.png")
    assert min(picture.shape[:2]) > 100 and picture[..., :3].std() > 0.05


def test_a_patch_without_any_guide_can_be_drawn(trainer, tmp_path):
    shape = tuple(trainer.configuration_manager.patch_size)
    view = GuideView("case", np.zeros(shape), None, np.zeros(shape, int), [], 1.0, 0.5)
    draw_guides(
        view, tmp_path / "none.png", "title", trainer.dataset_json, trainer.label_manager, [1] * view.image.ndim
    )
    assert Path(tmp_path / "none.png").stat().st_size > 1000
