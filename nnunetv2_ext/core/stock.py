"""Plain nnU-Net's network of a training: what an exported model has to fit."""

from collections.abc import Mapping
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn


def stock_network(init_args: Mapping[str, Any], trainer: type[nnUNetTrainer] = nnUNetTrainer) -> nn.Module:
    """Plain nnU-Net's network for a trainer's `init_args`, on the meta device: names and shapes without memory.

    `trainer` is one of nnU-Net's own; some build another network of the same plans.
    """
    plans = PlansManager(init_args["plans"])
    configuration = plans.get_configuration(init_args["configuration"])
    dataset_json = init_args["dataset_json"]
    with torch.device("meta"):
        return trainer.build_network_architecture(
            plans,
            configuration,
            determine_num_input_channels(plans, configuration, dataset_json),
            plans.get_label_manager(dataset_json).num_segmentation_heads,
            True,
        )


def stock_shapes(init_args: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of the state of `stock_network`."""
    return {name: value.shape for name, value in stock_network(init_args).state_dict().items()}
