"""A preprocessed configuration that RADA can train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_ext.data.fingerprint import stale_intensities
from nnunetv2_ext.rada.annotation.annotations import Annotation, cache_path, require_annotations, survey_cases, warnings
from nnunetv2_ext.rada.requirements import (
    require_ignore_label,
    require_plain_labels,
    require_single_stage,
    require_volumes,
)


@dataclass(frozen=True)
class Preprocessed:
    """A preprocessed 3-D configuration with an ignore label."""

    base: Path  # nnUNet_preprocessed/<Dataset>
    plans: PlansManager
    configuration: ConfigurationManager
    configuration_name: str
    dataset_json: dict[str, Any]
    ignore: int

    @property
    def folder(self) -> Path:
        """Of the configuration."""
        return self.base / self.configuration.data_identifier

    def survey(self) -> dict[str, Annotation]:
        """What is annotated in every case, cached beside nnU-Net's files.

        Raises:
            ValueError: nothing anywhere, a case is missing, or a label that dataset.json does not declare.
        """
        cases = infer_dataset_class(str(self.folder)).get_identifiers(str(self.folder))
        found = survey_cases(self.folder, cases, self.ignore, cache_path(self.base, self.configuration.data_identifier))
        require_annotations(found, set(self.plans.get_label_manager(self.dataset_json).all_labels))
        return found

    def warnings(self, annotations: dict[str, Annotation]) -> list[str]:
        """What a user should know before training, of annotations and plans."""
        found = warnings(annotations, self.dataset_json["labels"])
        return found + stale_intensities(self.plans.plans, self.base, self.folder)


def require_trainable(
    base: Path, plans: PlansManager, configuration_name: str, dataset_json: dict[str, Any]
) -> Preprocessed:
    """The configuration, if RADA can train on it.

    Raises:
        ValueError: it is 2-D or a cascade, or its labels are regions or have no ignore label.
    """
    configuration = plans.get_configuration(configuration_name)
    require_volumes(configuration.patch_size, configuration_name)
    require_single_stage(configuration.previous_stage_name, configuration_name)
    require_plain_labels(dataset_json["labels"], base.name)
    ignore = require_ignore_label(plans.get_label_manager(dataset_json).ignore_label, base.name)
    return Preprocessed(base, plans, configuration, configuration_name, dataset_json, ignore)
