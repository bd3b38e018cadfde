"""A trainer that brings its own network writes it into the plans, where nnU-Net's predictor looks for it."""

from collections.abc import Mapping
from typing import Any


def replace_architecture(trainer: Any, architecture: Mapping[str, Any]) -> None:
    """Let the trainer's configuration name another network; called before nnU-Net's ``initialize`` builds it.

    The plans in nnUNet_preprocessed stay. Those of the model folder and of the checkpoints get the architecture, so
    deep-supervision resolutions, prediction and ensembles follow it without code of the trainer.

    Args:
        trainer: nnU-Net's; its plans and configuration manager are changed.
        architecture: as in nnU-Net's plans.
    """
    configurations = trainer.plans_manager.plans["configurations"]
    own = configurations[trainer.configuration_name]
    configurations[trainer.configuration_name] = {**own, "architecture": dict(architecture)}
    trainer.configuration_manager.configuration["architecture"] = dict(architecture)


def require_2d(trainer: Any, name: str) -> None:
    """Raise ValueError for a 3-D configuration; ``name`` is of the network."""
    patch = list(trainer.configuration_manager.patch_size)
    if len(patch) != 2:
        raise ValueError(
            f"{trainer.configuration_name} of {trainer.plans_manager.dataset_name} is 3-D (patch {patch}), and {name} "
            "is a 2-D network: train the configuration 2d"
        )
