"""nnU-Net's variants of augmentation for every trainer; nothing of them is copied."""

from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import (
    nnUNetTrainerDA5,
    nnUNetTrainerDA5ord0,
)
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

VARIANTS: dict[str, type[nnUNetTrainer]] = {
    "nnunet": nnUNetTrainer,
    "da5": nnUNetTrainerDA5,
    "da5_ord0": nnUNetTrainerDA5ord0,
    "none": nnUNetTrainerNoDA,
}


def variant_geometry(trainer: Any, variant: str) -> tuple[Any, bool, Any, Any]:
    """Rotation, dummy 2-D augmentation, initial patch size and mirror axes of a variant, for another trainer.

    The trainer's ``inference_allowed_mirroring_axes`` follows, as nnU-Net's own method sets it.
    """
    # a trainer of the variant's class with the state of ours: its method may call super()
    cls = VARIANTS[variant]
    stand_in = object.__new__(cls)
    stand_in.__dict__.update(trainer.__dict__)
    found = cls.configure_rotation_dummyDA_mirroring_and_inital_patch_size(stand_in)
    trainer.inference_allowed_mirroring_axes = stand_in.inference_allowed_mirroring_axes
    return found
