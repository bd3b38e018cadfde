"""Methods with random convolutions of their input: each trains, with the augmentation of DA5 as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nnunetv2_ext.core.outside import load_trainer, trainer_of


@pytest.mark.parametrize("where", ["workers", "device"])
@pytest.mark.parametrize(
    ("name", "further"), [("nnUNetTrainerMedContext", "augmentation=da5"), ("nnUNetTrainerJRAS", "")]
)
def test_a_method_trains_on_convolved_patches(make_trainer, name: str, further: str, where: str) -> None:
    cls = load_trainer(name)
    facts: Any = trainer_of(cls)
    smallest = " ".join(f"{key}={value}" for key, value in facts.smallest.items())
    seen = []
    for gin in (0, 0.5):
        settings = f"seed=1 gin={gin} gin_on={where} batch_size=4 {further} {smallest}"
        trainer = make_trainer(cls, settings, configuration="3d_fullres")
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        batch = next(trainer.dataloader_train)
        figures = trainer.train_step(batch)
        assert all(np.isfinite(value) for value in figures.values())
        seen.append(float(figures["supervised"]))
        assert (trainer._gin is not None) == (gin > 0)
    assert float(trainer._gin.probability) == 0.5 and seen[0] != seen[1]
