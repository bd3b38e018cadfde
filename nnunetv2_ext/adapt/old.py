"""The model's own training data, if it is at hand: cases to replay, and validation cases to see what is forgotten."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.adapt.model import FinishedModel
from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.data.find import PREPROCESSED, RESULTS
from nnunetv2_ext.data.preprocessed import Preprocessed, plans_key
from nnunetv2_ext.data.subjects import divided, subjects_of_dataset


@dataclass(frozen=True)
class OldData:
    """Preprocessed cases of the model's own dataset."""

    data: Preprocessed
    previous: Path | None  # segmentations by the previous stage of a cascade

    def split(self, fold: str, group_regex: str | None = None) -> tuple[list[str], list[str], str]:
        """Cases to replay, cases to see forgetting by, and a remark.

        A fold's training cases are replayed, without those of a subject that validates. Fold ``all`` was trained on
        all cases, so nothing is left to see forgetting by.
        """
        if fold == "all":
            return self.data.cases, [], "fold all was trained on every old case, so forgetting cannot be measured"
        if not self.data.splits_file.is_file():
            remark = f"{self.data.splits_file} is missing, so which old cases fold {fold} did not see is unknown"
            return self.data.cases, [], f"{remark}, and forgetting is not measured"
        splits = read_json(self.data.splits_file)
        if not fold.isdecimal() or int(fold) >= len(splits):
            return self.data.cases, [], f"{self.data.splits_file.name} has no fold {fold}: forgetting is not measured"
        there = set(self.data.cases)
        train, validation = (sorted(there.intersection(splits[int(fold)][part])) for part in ("train", "val"))
        subjects = subjects_of_dataset(self.data.dataset_json, [*train, *validation], group_regex)
        held_out = set(divided(train, validation, subjects))
        return [case for case in train if (subjects or {}).get(case, case) not in held_out], validation, ""

    def truth_file(self, case: str) -> Path:
        """The case's label before preprocessing, of which nnU-Net keeps a copy."""
        return self.data.base / "gt_segmentations" / f"{case}{self.data.dataset_json['file_ending']}"


def find_old_data(model: FinishedModel) -> OldData | str:
    """The model's preprocessed dataset in nnUNet_preprocessed, or why it cannot be used."""
    root, name = os.environ.get(PREPROCESSED), model.plans.dataset_name
    if not root:
        return f"{PREPROCESSED} is not set"
    base = Path(root) / name
    plans_file = base / f"{model.plans.plans_name}.json"
    for file in (plans_file, base / "dataset.json"):
        if not file.is_file():
            return f"{file} is not there"
    plans = PlansManager(read_json(plans_file))
    if model.configuration_name not in plans.available_configurations:
        return f"{plans_file} has no configuration {model.configuration_name}"
    dataset_json: dict[str, Any] = read_json(base / "dataset.json")
    configuration = plans.get_configuration(model.configuration_name)
    data = Preprocessed(base, plans, configuration, model.configuration_name, dataset_json)
    if plans_key(plans.plans_name, configuration.configuration) != plans_key(
        plans.plans_name, model.configuration.configuration
    ):
        return f"{plans_file} is not the plan that the model was preprocessed with"
    if dataset_json["labels"] != model.dataset_json["labels"]:
        return f"{base / 'dataset.json'} has other labels than the model"
    if not data.folder.is_dir():
        return f"{data.folder} is not there"
    previous = None
    if (stage := model.configuration.previous_stage_name) is not None:
        trainer = model.folder.name.partition("__")[0]
        first = f"{trainer}__{model.plans.plans_name}__{stage}"
        roots = [model.folder.parent, *([Path(os.environ[RESULTS]) / name] if os.environ.get(RESULTS) else [])]
        folders = [parent / first / "predicted_next_stage" / model.configuration_name for parent in roots]
        previous = next((folder for folder in folders if folder.is_dir()), None)
        if previous is None:
            return f"{folders[0]} with the previous stage's segmentations is not there"
    return OldData(data, previous)
