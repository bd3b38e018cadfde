"""Variants of the plans of the tiny datasets, and what a cascade reads."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from tests.conftest import TinyDataset, random_batches

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


def with_model(
    dataset: TinyDataset, root: Path, configuration: str, plans: dict[str, Any] | None = None, steps: int = 0
) -> TinyDataset:
    """The dataset with a plain nnU-Net of its first channel, of these plans, after some steps on noise."""
    plans, dataset_json = copy.deepcopy(plans or dataset.plans()), dataset.dataset_json()
    for one in plans["configurations"].values():
        one |= {key: one[key][:1] for key in ("normalization_schemes", "use_mask_for_norm") if key in one}
    dataset_json["channel_names"] = {"0": dataset_json["channel_names"]["0"]}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in dataset.environment(root).items():
            patch.setenv(key, value)
        torch.manual_seed(1)
        arguments = plans | {"continue_training": False}, configuration, 0, dataset_json, torch.device("cpu")
        trainer = nnUNetTrainer(*arguments)
        trainer.initialize()
        for batch in random_batches(trainer, steps, labels=2):
            trainer.train_step(batch)
        model = Path(trainer.output_folder_base)
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    for name, content in (("plans", plans), ("dataset", dataset_json)):
        (model / f"{name}.json").write_text(json.dumps(content))
    (model / "fold_1").mkdir()
    (model / "fold_1" / "checkpoint_final.pth").hardlink_to(model / "fold_0" / "checkpoint_final.pth")
    return replace(dataset, model=model)


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
