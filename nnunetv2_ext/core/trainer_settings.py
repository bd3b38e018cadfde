"""SettingsTrainer: nnUNetTrainer that takes settings and a seed."""

import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core import settings as ext_settings
from nnunetv2_ext.core.compat import require_supported_nnunet
from nnunetv2_ext.core.files import atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.hooks import MethodHooks
from nnunetv2_ext.core.resolve import Resolved, resolve
from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE, to_yaml

Model = TypeVar("Model", bound=ext_settings.Settings)

# nnUNetTrainer's own values of the attributes that are settings here; another one is a base trainer's choice
_STOCK = {
    "num_epochs": 1000,
    "num_iterations_per_epoch": 250,
    "num_val_iterations_per_epoch": 50,
    "initial_lr": 1e-2,
    "weight_decay": 3e-5,
    "oversample_foreground_percent": 0.33,
    "save_every": 50,
}


def method_settings_in(plans: dict[str, Any], method: str, model: type[Model]) -> Model:
    """A method's settings from the plans of a model folder, for who knows nothing else: the predictor.

    Raises:
        ValueError: plans without this package's block, as in nnUNet_preprocessed, or a value that is not valid.
    """
    block = plans.get(ext_settings.PLANS_KEY)
    if block is None or method not in block:
        raise ValueError(
            f"the plans have no block {ext_settings.PLANS_KEY!r} with the settings of {method!r}; every training "
            "writes it into the plans.json of its model folder: use that file"
        )
    return ext_settings.from_model_folder(block[method], model, method)


def merged_over_bases(cls: type, attribute: str) -> dict[str, Any]:
    """A class-level dictionary, with the entries of the same dictionary of all base classes; the subclass's win."""
    merged: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        merged.update(vars(base).get(attribute, {}))
    return merged


class SettingsTrainer(MethodHooks, nnUNetTrainer):
    """The part of ExtTrainer that knows the settings."""

    # keys without a block; rooms above core offer further ones (parts/settings.py)
    common_settings: ClassVar[type[ext_settings.CommonSettings]] = ext_settings.CommonSettings
    # the methods' own random stream, on the device, per rank; it leaves nnU-Net's augmentation stream untouched, so
    # runs of one seed see the same batches whatever the method draws
    generator: torch.Generator  # -> initialize
    save_every: int

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  # nnUNetTrainer's signature; it fails on any other
    ) -> None:
        require_supported_nnunet()
        if not os.environ.get("nnUNet_results"):
            raise ValueError(
                "nnUNet_results is not set, so there is no place for the results: export nnUNet_results=FOLDER "
                "(`nnUNetv2_ext doctor` looks at all three of nnU-Net's folders)"
            )
        self.is_continued = bool(plans.get("continue_training"))
        resolved = resolve(
            self.settings_model(), trainer_defaults=self.trainer_defaults(), plans=plans.get(ext_settings.PLANS_KEY)
        )
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            raise ValueError(
                f"the results folder cannot be written ({error}); check nnUNet_results, its rights and the disk"
            ) from error
        require_writable(Path(self.output_folder))
        if self.needs_foreground and not self.label_manager.foreground_labels:
            raise ValueError(
                f"dataset.json of {self.plans_manager.dataset_name} declares no foreground label; "
                "there is nothing to learn"
            )
        self._apply_settings(self._with_values_of_base_trainer(resolved))

    def _with_values_of_base_trainer(self, resolved: Resolved) -> Resolved:
        """What nobody set stays as the base trainer's constructor left it (nnU-Net's Primus: AdamW at 3e-4)."""
        values = {
            key: getattr(self, key)
            for key, stock in _STOCK.items()
            if key not in resolved.sources and getattr(self, key) != stock
        }
        sources = resolved.sources | dict.fromkeys(values, "base trainer")
        return Resolved(resolved.settings.model_copy(update=values), sources)

    @classmethod
    def settings_model(cls) -> type[ext_settings.CommonSettings]:
        """The pydantic model of this trainer's settings: the common keys and a block per method it inherits from."""
        common = [vars(base)["common_settings"] for base in cls.__mro__ if "common_settings" in vars(base)]
        return ext_settings.settings_model(cls.__name__, merged_over_bases(cls, "method_settings"), common)

    @classmethod
    def trainer_defaults(cls) -> dict[str, Any]:
        """``default_settings`` of this trainer and of all that it inherits from."""
        return merged_over_bases(cls, "default_settings")

    def _apply_settings(self, resolved: Resolved) -> None:
        s = resolved.settings
        self.resolved, self.settings = resolved, s
        plans = self.plans_manager.plans
        for key in _STOCK:  # initialize() spreads the percentage and the batch size over the DDP ranks
            if key != "oversample_foreground_percent" or not self.was_initialized:
                setattr(self, key, getattr(s, key))
        if not self.was_initialized and s.batch_size is not None:
            plans["configurations"][self.configuration_name]["batch_size"] = s.batch_size
            self.configuration_manager.configuration["batch_size"] = s.batch_size
        # build_network_architecture is called on the class by the predictor, which knows the plans and nothing else
        plans[ext_settings.PLANS_KEY] = s.model_dump(mode="json")

    def initialize(self) -> None:
        """Seed (if asked to), then build network, optimiser and loss as nnU-Net does."""
        seed = self.settings.seed
        if seed is not None:
            randomness.seed_everything(seed + self.local_rank)
        self.generator = torch.Generator(self.device)  # before nnU-Net's, which builds what may draw from it
        self.generator.manual_seed(
            ((torch.initial_seed() if seed is None else seed) + 7919 * (self.local_rank + 1)) % 2**63
        )
        super().initialize()

    def on_train_start(self) -> None:
        """Check the other folds, print the settings, nnU-Net's own start, write the settings beside the checkpoints."""
        self._require_same_structure_as_other_folds()
        self.print_to_log_file(
            f"Settings of {type(self).__name__} (`nnUNetv2_ext settings {type(self).__name__}` explains them):\n"
            + ext_settings.describe(self.settings, self.resolved.sources),
            add_timestamp=False,
        )
        super().on_train_start()
        if self.settings.seed is not None:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        if self.local_rank == 0:
            header = f"# {type(self).__name__}, fold {self.fold}. To repeat: {ENVIRONMENT_VARIABLE}=<this file>\n"
            content = to_yaml(ext_settings.flatten(self.settings))
            atomic_write_text(Path(self.output_folder) / "nnunetv2_ext_settings.yaml", header + content)

    def _require_same_structure_as_other_folds(self) -> None:
        plans_file = Path(self.output_folder_base) / "plans.json"
        others = [p.parent.name for p in Path(self.output_folder_base).glob("fold_*/checkpoint_*.pth")]
        others = sorted({name for name in others if name != f"fold_{self.fold}"})
        if not others or not plans_file.is_file():
            return
        # not as YAML, which reads JSON's 1e-05 as a string
        block = read_json(plans_file).get(ext_settings.PLANS_KEY) or {}
        renamed = ext_settings.renamed_keys(type(self.settings))
        theirs = {renamed.get(k, k): v for k, v in ext_settings.flatten_layer(block, type(self.settings)).items()}
        ours = ext_settings.flatten(self.settings)
        for key, field in ext_settings.fields_by_key(type(self.settings)).items():
            if ext_settings.is_marked(field, "structural") and key in theirs and theirs[key] != ours[key]:
                raise ValueError(
                    f"{', '.join(others)} in {self.output_folder_base} were trained with {key}={theirs[key]}, "
                    f"this fold has {key}={ours[key]}: all folds of a model folder share one network. "
                    "Use the same value, or another plans name (-p) for the new one"
                )
