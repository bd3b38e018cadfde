"""Trainers of a method that is not in the package."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.medcontext.training import MedContextTraining


class nnUNetTrainerSigned(MedContextTraining):
    """Signs its weights, and trains as another method does."""


class nnUNetTrainerWithHead(ExtTrainer):
    """Trains another network than plain nnU-Net: with a head that prediction does not use."""

    @staticmethod
    def build_network_architecture(
        plans_manager: Any, configuration_manager: Any, num_input: int, num_output: int, deep_supervision: bool = True
    ) -> nn.Module:
        network = ExtTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input, num_output, deep_supervision
        )
        network.projection = nn.Conv3d(16, 2, 1)
        return network


class nnUNetTrainerWide(ExtTrainer):
    """Trains another network than plain nnU-Net: of the same names, with a wider first convolution."""

    @staticmethod
    def build_network_architecture(
        plans_manager: Any, configuration_manager: Any, num_input: int, num_output: int, deep_supervision: bool = True
    ) -> nn.Module:
        network = ExtTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input, num_output, deep_supervision
        )
        first = network.encoder.stages[0][0].convs[0]
        first.conv = first.all_modules[0] = nn.Conv3d(num_input, 4, 5, padding=2)
        return network
