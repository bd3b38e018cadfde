"""The common setting ``augmentation``: nnU-Net's variants under every trainer."""

from __future__ import annotations

from typing import Any

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import (
    nnUNetTrainerDA5,
    nnUNetTrainerDA5ord0,
)
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

from nnunetv2_ext.parts.augmentation import VARIANTS
from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext

CLASSES = {
    "nnunet": nnUNetTrainer,
    "da5": nnUNetTrainerDA5,
    "da5_ord0": nnUNetTrainerDA5ord0,
    "none": nnUNetTrainerNoDA,
}


def pipeline(trainer: Any) -> tuple[list[str], Any, Any]:
    rotation, dummy, size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    patch = trainer.configuration_manager.patch_size
    found = trainer.get_training_transforms(patch, rotation, None, axes, dummy, use_mask_for_norm=[False])
    return [type(t).__name__ for t in found.transforms], (rotation, dummy, list(size), axes), trainer


def test_every_name_of_the_setting_has_a_class() -> None:
    assert VARIANTS == CLASSES


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("cls", [nnUNetTrainerExt, nnUNetTrainerMedContext])
@pytest.mark.parametrize("name", CLASSES)
def test_it_is_the_variants_own(name: str, cls: Any, configuration: str, make_trainer) -> None:
    stock = make_trainer(CLASSES[name], "", configuration=configuration)
    ours = make_trainer(cls, f"augmentation={name}", configuration=configuration)
    for trainer in (stock, ours):
        trainer.initialize()
    theirs, mine = pipeline(stock), pipeline(ours)
    assert mine[:2] == theirs[:2]
    assert ours.inference_allowed_mirroring_axes == stock.inference_allowed_mirroring_axes


def test_without_mirroring_no_variant_mirrors(make_trainer) -> None:
    trainer = make_trainer(nnUNetTrainerExt, "augmentation=da5 mirroring=false", configuration="2d")
    trainer.initialize()
    names, (_, _, _, axes), _ = pipeline(trainer)
    assert axes is None and trainer.inference_allowed_mirroring_axes is None and "MirrorTransform" not in names


def test_a_name_that_does_not_exist_is_refused_with_those_that_do(make_trainer) -> None:
    with pytest.raises(ValueError, match="da5"):
        make_trainer(nnUNetTrainerExt, "augmentation=da7")
