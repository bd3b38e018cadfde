"""Variants of the plans of the tiny datasets, and what a cascade reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import TinyDataset

RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
LOWRES, CASCADE = "3d_lowres", "3d_cascade_fullres"


def residual(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans with nnU-Net's residual encoder, as its ResEnc planners write them."""
    plans = copy.deepcopy(plans)
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            architecture = configuration["architecture"]
            architecture["network_class_name"] = RESENC
            kwargs = architecture["arch_kwargs"]
            kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    return plans


def cascade(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans with a cascade whose first stage has the data of 3d_fullres."""
    plans = copy.deepcopy(plans)
    configurations = plans["configurations"]
    configurations[LOWRES] = copy.deepcopy(configurations["3d_fullres"]) | {"next_stage": CASCADE}
    configurations[CASCADE] = {"inherits_from": "3d_fullres", "previous_stage": LOWRES}
    return plans


def write_first_stage(trainer: Any, dataset: TinyDataset) -> None:
    """What validating the first stage leaves for the second: here the annotation itself."""
    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True)
    identifier = dataset.plans()["configurations"]["3d_fullres"]["data_identifier"]
    reader = trainer.dataset_class or _dataset_class(dataset, identifier)
    data = reader(str(dataset.preprocessed / dataset.name / identifier))
    for case in data.identifiers:
        segmentation = np.asarray(data.load_case(case)[1][0])
        reader.save_seg(np.maximum(segmentation, 0).astype(np.uint8), str(folder / case))


def _dataset_class(dataset: TinyDataset, identifier: str) -> Any:
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    return infer_dataset_class(str(dataset.preprocessed / dataset.name / identifier))
