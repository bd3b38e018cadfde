"""The finished model that is adapted: nnU-Net's own, an exported one, or one of ours that plain nnU-Net loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, first_difference, read
from nnunetv2_ext.core.export import portable
from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.core.labelmaps import foreground_names, structures_of
from nnunetv2_ext.core.quiet import quiet
from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.core.stock import stock_network
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.data.find import find_checkpoint


@dataclass(frozen=True)
class FinishedModel:
    """A model folder, its folds that are adapted, and nnU-Net's trainer whose network they have."""

    folder: Path
    files: Mapping[str, Path]  # fold ("0", "all") to checkpoint
    plans: PlansManager
    dataset_json: dict[str, Any]
    configuration_name: str
    trainer: type[nnUNetTrainer]  # one of nnU-Net's own
    mirror_axes: tuple[int, ...] | None
    group_regex: str | None = None  # finds the subject in the name of an old case; a setting of our trainers

    @cached_property
    def configuration(self) -> ConfigurationManager:
        """Of the plans."""
        return self.plans.get_configuration(self.configuration_name)

    @cached_property
    def labels(self) -> LabelManager:
        """nnU-Net's."""
        return self.plans.get_label_manager(self.dataset_json)

    @property
    def names(self) -> list[str]:
        """Foreground classes or regions, in the order of the network's heads."""
        return foreground_names(self.dataset_json, self.labels)

    @property
    def structures(self) -> dict[str, Any]:
        """Name to label value, or to the values of a region."""
        return structures_of(self.dataset_json, self.labels)

    @property
    def channels(self) -> list[str]:
        """Names of the image channels."""
        return channel_names(self.dataset_json)

    def checkpoint(self, fold: str) -> dict[str, Any]:
        """Of a fold, as one of nnU-Net's own trainer, without what only continuing needs.

        Raises:
            ValueError: it is damaged, or its network is not one that nnU-Net builds.
        """
        return _as_stock(self.files[fold], self.trainer)

    def network(self) -> nn.Module:
        """As nnU-Net builds it to predict; its weights are random."""
        return self.trainer.build_network_architecture(
            self.plans,
            self.configuration,
            determine_num_input_channels(self.plans, self.configuration, self.dataset_json),
            self.labels.num_segmentation_heads,
            enable_deep_supervision=False,
        )


def open_model(folder: Path, folds: Sequence[str] = (), checkpoint: str = "checkpoint_final.pth") -> FinishedModel:
    """The model in a folder.

    Args:
        folder: TRAINER__PLANS__CONFIGURATION, or an exported one.
        folds: those that are adapted; none: all that have the checkpoint.
        checkpoint: name of its file in each fold.

    Raises:
        ValueError: not a model folder, no such fold, a damaged checkpoint, or a network that nnU-Net does not build.
    """
    there = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}"))
    chosen = list(dict.fromkeys(folds)) or there or ["0"]  # of which find_checkpoint says that it is not there
    files = {fold: find_checkpoint(folder, fold, checkpoint) for fold in chosen}
    first = read(files[chosen[0]])
    trainer = _own(_found(first.get("trainer_name", "")))
    for file in files.values():
        _as_stock(file, trainer)
    axes = first.get("inference_allowed_mirroring_axes")
    plans = {key: value for key, value in read_json(folder / "plans.json").items() if key != PLANS_KEY}
    return FinishedModel(
        folder,
        files,
        PlansManager(plans),
        read_json(folder / "dataset.json"),
        first["init_args"]["configuration"],
        trainer,
        None if axes is None else tuple(axes),
        (first.get(EXTENSION_KEY) or {}).get("settings", {}).get("group_regex"),
    )


def _found(name: str) -> type[nnUNetTrainer] | None:
    """A trainer by name, of nnU-Net's, ours or others; None if it is not installed here."""
    with quiet():  # nnU-Net prints where it looks
        try:
            return recursive_find_trainer_class_by_name(name)
        except RuntimeError:
            return None


def _own(trainer: type[nnUNetTrainer] | None) -> type[nnUNetTrainer]:
    """Of nnU-Net's own trainers the one that a trainer is, or is derived from.

    Of one that is not installed nnUNetTrainer: the weights show whether its network is that one's.
    """
    classes = trainer.__mro__ if trainer is not None else ()
    return next((cls for cls in classes if cls.__module__.startswith("nnunetv2.")), nnUNetTrainer)


def _as_stock(file: Path, trainer: type[nnUNetTrainer]) -> dict[str, Any]:
    checkpoint = read(file)
    name = checkpoint.get("trainer_name", "an unnamed trainer")
    weights: Mapping[str, Tensor] = checkpoint["network_weights"]
    found = _found(name)
    if found is not None and issubclass(found, ExtTrainer):
        weights = found.export_weights(checkpoint, "student")
    difference = first_difference(stock_network(checkpoint["init_args"], trainer).state_dict(), weights)
    if difference:
        part, there, here = difference
        raise ValueError(
            f"{file} is of {name}, whose network is not plain nnU-Net's ({part} is {here} there and {there} in "
            "nnU-Net's): export the model first (nnUNetv2_ext export), or adapt one of a plain trainer"
        )
    return portable(checkpoint) | {"network_weights": dict(weights), "trainer_name": trainer.__name__}
