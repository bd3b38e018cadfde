"""A preprocessed configuration that RADA can train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.data.fingerprint import stale_intensities
from nnunetv2_ext.data.preprocessed import Preprocessed, open_preprocessed
from nnunetv2_ext.data.raw import require_consecutive_labels
from nnunetv2_ext.rada.annotation.annotations import Annotation, require_annotations, survey_labels, warnings
from nnunetv2_ext.rada.requirements import require_ignore_label, require_plain_labels, require_volumes


@dataclass(frozen=True)
class SparsePreprocessed(Preprocessed):
    """A preprocessed 3-D configuration with an ignore label."""

    ignore: int

    def survey(self) -> dict[str, Annotation]:
        """What is annotated in every case, cached beside nnU-Net's files.

        Raises:
            ValueError: nothing anywhere, a case is missing, or a label that dataset.json does not declare.
        """
        states = {case: self.file_state(case) for case in self.cases}
        found = survey_labels(self, "planes", states, lambda case: np.asarray(self.read_case(case)[1][0]), self.ignore)
        require_annotations(found, set(self.plans.get_label_manager(self.dataset_json).all_labels))
        return found

    def warnings(self, annotations: dict[str, Annotation]) -> list[str]:
        """What a user should know before training, of annotations and plans."""
        found = warnings(annotations, self.dataset_json["labels"])
        return found + stale_intensities(self.plans.plans, self.base, self.folder)


def open_sparse(dataset: int | str, configuration: str, plans_name: str = "nnUNetPlans") -> SparsePreprocessed:
    """Open what ``nnUNetv2_plan_and_preprocess`` made.

    Raises:
        ValueError: it is missing, 2-D, a cascade, has regions or no ignore label.
    """
    found = open_preprocessed(dataset, configuration, plans_name, files=False)
    sparse = require_trainable(found.base, found.plans, configuration, found.dataset_json)
    sparse.require_files()
    return sparse


def require_trainable(
    base: Path, plans: PlansManager, configuration_name: str, dataset_json: dict[str, Any]
) -> SparsePreprocessed:
    """The configuration, if RADA can train on it.

    Raises:
        ValueError: it is 2-D or a cascade, or its labels are regions, not consecutive, or have no ignore label.
    """
    configuration = plans.get_configuration(configuration_name)
    require_volumes(configuration.patch_size, configuration_name)
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"the configuration {configuration_name} is a cascade, and RADA's networks have no input for the "
            f"segmentation of {configuration.previous_stage_name}: use 3d_fullres or 3d_lowres"
        )
    require_plain_labels(dataset_json["labels"], base.name)
    require_consecutive_labels(dataset_json["labels"], base.name)
    ignore = require_ignore_label(plans.get_label_manager(dataset_json).ignore_label, base.name)
    return SparsePreprocessed(base, plans, configuration, configuration_name, dataset_json, ignore)
