"""Plans for a dataset of the base's channels and new ones behind them, on which the base is at home."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2_ext.core.files import atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.data.channels import OF_CT, channel_names
from nnunetv2_ext.data.find import PREPROCESSED, dataset_if_there, nnunet_folder
from nnunetv2_ext.data.raw import RawDataset, open_raw
from nnunetv2_ext.data.split import SPLIT, read_split
from nnunetv2_ext.pemma.base import Base, misfit_of_dataset, read_base
from nnunetv2_ext.pemma.channels import look_at, said_of
from nnunetv2_ext.pemma.geometry import compare, lie_of, lies_of_base

PLANS, Z_SCORE = "nnUNetPlans_pemma", "ZScoreNormalization"
KEEPS_ZERO = (Z_SCORE, "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
# of a new channel: nnU-Net reads the entry whatever the normalisation, and those that keep zeros do not use it
_UNUSED = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 0.0)


@dataclass(frozen=True)
class Prepared:
    """Plans that fit, and what is to be known.

    Attributes:
        raw: the dataset.
        base: the model.
        plans: to be written as `file`.
        said: sentences; warnings start with WARNING.
    """

    raw: RawDataset
    base: Base
    plans: dict[str, Any]
    file: Path
    said: list[str] = field(default_factory=list)

    def write(self) -> None:
        """Write plans and dataset.json for nnUNetv2_preprocess.

        Raises:
            ValueError: other plans of this name are there; nothing is overwritten.
        """
        if self.file.is_file() and read_json(self.file) != self.plans:
            raise ValueError(f"{self.file} exists with another plan, which stays as it is: give another name with -p")
        require_writable(self.file.parent)
        description = self.file.parent / "dataset.json"
        if not description.is_file():
            atomic_write_text(description, json.dumps(self.raw.json, indent=4) + "\n")
        atomic_write_text(self.file, json.dumps(self.plans, indent=4) + "\n")


def prepare(dataset: int | str, model: Path, fold: str = "0", scheme: str = Z_SCORE, name: str = PLANS) -> Prepared:
    """Look at a raw dataset and a base; nothing is written.

    Args:
        dataset: id or name in nnUNet_raw, its first channels the base's.
        model: of the base: a model folder, or a checkpoint.
        fold: of the base, whose plans are taken.
        scheme: normalisation of the new channels.
        name: of the plans.

    Raises:
        ValueError: they do not fit, a file is missing or damaged, images lie in different places or have their axes in
            another order than the base's, a scheme that does not keep zeros, or no case has the new channels.
    """
    if scheme not in KEEPS_ZERO:
        why = "it subtracts the mean of all images" if scheme == OF_CT else "it is not one of nnU-Net's that keep zero"
        raise ValueError(
            f"{scheme} does not leave a missing channel at zero ({why}), so that it would not be recognised: use one "
            f"of {', '.join(KEEPS_ZERO)}"
        )
    if fold != "all" and not fold.isdigit():
        raise ValueError(f"-f {fold!r} is neither a number nor all")
    base, raw = read_base(model, fold, "-base"), open_raw(dataset)
    if difference := misfit_of_dataset(base, raw.json):
        raise ValueError(f"{raw.name} does not fit the base {base.file}: {difference}")
    reader = base.plans.get("image_reader_writer")
    if reader not in (None, type(raw.reader).__name__):
        raise ValueError(
            f"{raw.name} is read by {type(raw.reader).__name__} and the base's images by {reader}, which may order "
            'axes in another way: set "overwrite_image_reader_writer" in dataset.json, or convert the files'
        )
    old, names = len(base.channels), channel_names(raw.json)
    looks = look_at(raw, old)
    said = said_of({case: look.state for case, look in looks.items()}, ", ".join(names[old:]))
    said += compare({case: (look.file, lie_of(look.properties)) for case, look in looks.items()}, lies_of_base(base))
    said += _leaks(base, raw, fold)
    file = nnunet_folder(PREPROCESSED) / raw.name / f"{name}.json"
    return Prepared(raw, base, _plans(base, raw.name, names[old:], scheme, name), file, said)


def _plans(base: Base, dataset: str, new: list[str], scheme: str, name: str) -> dict[str, Any]:
    plans = {key: value for key, value in base.plans.items() if key not in (PLANS_KEY, "continue_training")}
    mask = bool(base.configuration["use_mask_for_norm"][0])  # of the image, not of a channel
    configuration = {
        **{key: value for key, value in base.configuration.items() if key not in ("inherits_from", "next_stage")},
        "data_identifier": f"{name}_{base.configuration_name}",
        "normalization_schemes": [*base.configuration["normalization_schemes"], *[scheme] * len(new)],
        "use_mask_for_norm": [*base.configuration["use_mask_for_norm"], *[mask and scheme == Z_SCORE] * len(new)],
    }
    intensities = dict(base.plans["foreground_intensity_properties_per_channel"])
    intensities |= {str(len(base.channels) + number): _UNUSED for number in range(len(new))}
    made = {
        **plans,
        "dataset_name": dataset,
        "plans_name": name,
        "configurations": {base.configuration_name: configuration},
        "foreground_intensity_properties_per_channel": intensities,
    }
    return copy.deepcopy(made)


def _leaks(base: Base, raw: RawDataset, fold: str) -> list[str]:
    """Cases that the base was trained on must not validate."""
    there = dataset_if_there(str(base.plans.get("dataset_name", "")), PREPROCESSED)
    if fold == "all" or there is None or not (there / SPLIT).is_file():
        return []
    folds = read_split(there / SPLIT)
    trained = set(folds[int(fold)]["train"]) if int(fold) < len(folds) else set()
    own = dataset_if_there(raw.name, PREPROCESSED)
    split = read_split(own / SPLIT) if own is not None and (own / SPLIT).is_file() else []
    validating = set(split[int(fold)]["val"] if int(fold) < len(split) else raw.cases)
    if not (leaked := sorted(trained & validating)):
        return []
    target = nnunet_folder(PREPROCESSED) / raw.name / SPLIT
    may = "" if split else "may "
    return [
        f"WARNING: the base's fold {fold} was trained on {len(leaked)} cases that {may}validate "
        f"here, e.g. {leaked[0]}: copy {there / SPLIT} to {target}, if the cases are the same"
    ]
