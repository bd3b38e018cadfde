"""The finished model that gets a channel: reading it, and what a dataset and its plans must share with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_ext.core.checkpoint import first_difference, read
from nnunetv2_ext.core.stock import stock_network
from nnunetv2_ext.data.cache import file_hash
from nnunetv2_ext.data.channels import OF_CT, channel_names

FINAL = "checkpoint_final.pth"
# what of a configuration the base's weights know; patch and batch size may be others
_KNOWN = (
    "architecture",
    "spacing",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
    "preprocessor_name",
)
_PER_CHANNEL = ("normalization_schemes", "use_mask_for_norm")


@dataclass(frozen=True)
class Base:
    """A checkpoint of plain nnU-Net's network."""

    file: Path
    weights: Mapping[str, Tensor]
    plans: Mapping[str, Any]
    configuration: Mapping[str, Any]  # complete, without what it inherits from
    configuration_name: str
    dataset_json: Mapping[str, Any]
    trainer: str
    sha256: str  # of the file

    @property
    def channels(self) -> list[str]:
        """Names of its channels, in order."""
        return channel_names(self.dataset_json)


def read_base(path: Path, fold: int | str, key: str = "pemma.base") -> Base:
    """The base for a fold.

    Args:
        path: a model folder, of which the checkpoint of the same fold is taken; or a fold's folder, or a checkpoint.
        fold: of the training that adapts it.
        key: what named it, for messages.

    Raises:
        ValueError: no such file, no such fold, or not a model of plain nnU-Net's network on images alone.
    """
    file = checkpoint_of(path, fold, key)
    checkpoint = read(file)
    init, weights = checkpoint.get("init_args") or {}, checkpoint["network_weights"]
    name, trainer = init.get("configuration"), str(checkpoint.get("trainer_name", "an unnamed trainer"))
    if name is None:
        raise ValueError(f"{file} has no init_args, so its plans are not known: give the checkpoint of a finished fold")
    configuration = PlansManager(init["plans"]).get_configuration(name)
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"{file} is the second stage of a cascade, whose channels of the first stage would stand between the old "
            "and the new ones: give a model of 3d_fullres or 2d"
        )
    if difference := first_difference(stock_network(init).state_dict(), weights):
        part, there, here = difference
        raise ValueError(
            f"{file} is of {trainer}, whose network is not plain nnU-Net's ({part} is {here} there and {there} in "
            "nnU-Net's): run nnUNetv2_ext export first and give the exported folder"
        )
    plans = init["plans"]
    facts = plans, configuration.configuration, name, init["dataset_json"], trainer
    return Base(file, weights, *facts, file_hash(file))


def checkpoint_of(path: Path, fold: int | str, key: str) -> Path:
    """The file that a setting names: a checkpoint, that of a fold's folder, or that of a model folder's same fold.

    Raises:
        ValueError: no such file or fold; names the setting.
    """
    path = path.expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{key}={path} does not exist: give a model folder TRAINER__PLANS__CONFIGURATION")
    if (path / FINAL).is_file():
        return path / FINAL
    file = path / f"fold_{fold}" / FINAL
    if not file.is_file():
        there = sorted(p.relative_to(path).as_posix() for p in path.glob(f"fold_*/{FINAL}"))
        remedy = f"give one of its files, {', '.join(there)}" if there else "give a model folder of a finished training"
        raise ValueError(
            f"{key}={path}: fold {fold} starts from fold {fold} there, and {file} does not exist: {remedy}"
        )
    return file


def misfit(
    base: Base, plans: Mapping[str, Any], configuration: Mapping[str, Any], dataset_json: Mapping[str, Any]
) -> str | None:
    """The first thing in which a dataset and its plans differ from the base's, in words; None: they fit.

    Args:
        base: with C0 channels.
        plans: of the new dataset; all but the channels behind the first C0 must be as the base knows them.
        configuration: of these plans, complete.
        dataset_json: of the new dataset.
    """
    if said := misfit_of_dataset(base, dataset_json):
        return said
    number = len(base.channels)
    pairs: list[tuple[str, Any, Any]] = [(key, base.configuration.get(key), configuration.get(key)) for key in _KNOWN]
    pairs += [
        (key, list(base.configuration.get(key, ()))[:number], list(configuration.get(key, ()))[:number])
        for key in _PER_CHANNEL
    ]
    pairs += [("transpose_forward", base.plans.get("transpose_forward"), plans.get("transpose_forward"))]
    for channel, scheme in enumerate(base.configuration["normalization_schemes"][:number]):
        if scheme == OF_CT:
            there, here = (_intensities(p).get(str(channel)) for p in (base.plans, plans))
            pairs.append((f"the intensities of {base.channels[channel]}", there, here))
    for key, there, here in pairs:
        if there != here:
            return f"{key} is {_short(there)} in the base's plans and {_short(here)} in these"
    return None


def misfit_of_dataset(base: Base, dataset_json: Mapping[str, Any]) -> str | None:
    """`misfit` of what dataset.json says: channels, labels, file ending."""
    old, names = base.channels, channel_names(dataset_json)
    if names[: len(old)] != old:
        if sorted(set(old) - set(names)):
            return f"the base's channels are {_listed(old)} and the dataset's {_listed(names)}: names differ"
        return f"the base's channels are {_listed(old)}, and they are not the first of the dataset's {_listed(names)}"
    if len(names) == len(old):
        return f"the dataset has the base's channels {_listed(names)} and no further one"
    if there := _first_other(base.dataset_json["labels"], dataset_json["labels"]):
        return there
    for key in ("regions_class_order", "file_ending"):
        there, here = base.dataset_json.get(key), dataset_json.get(key)
        if there != here:
            return f"{key} is {there} in the base's dataset.json and {here} in this one"
    return None


def _first_other(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    for name in [*there, *here]:
        values = [_plain(labels[name]) if name in labels else "missing" for labels in (there, here)]
        if values[0] != values[1]:
            return f"the label {name} is {values[0]} in the base's dataset.json and {values[1]} in this one"
    return None if list(there) == list(here) else "the base's dataset.json lists the labels in another order"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _intensities(plans: Mapping[str, Any]) -> Mapping[str, Any]:
    return plans.get("foreground_intensity_properties_per_channel") or {}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
