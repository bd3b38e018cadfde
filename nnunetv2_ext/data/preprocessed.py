"""A preprocessed configuration of a dataset, as ``nnUNetv2_plan_and_preprocess`` leaves it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.data.find import PREPROCESSED, find_dataset, read_plans
from nnunetv2_ext.data.raw import require_consecutive_labels

WRITTEN = (".b2nd", "_seg.b2nd", ".npz", ".pkl")  # by preprocessing; .npy files are unpacked in trainings
# what of a configuration decides how the preprocessed files look
_PREPROCESSING = (
    "data_identifier",
    "preprocessor_name",
    "normalization_schemes",
    "use_mask_for_norm",
    "spacing",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)


@dataclass(frozen=True)
class Preprocessed:
    """A preprocessed configuration."""

    base: Path  # nnUNet_preprocessed/DatasetXXX_name
    plans: PlansManager
    configuration: ConfigurationManager
    configuration_name: str  # 3d_fullres
    dataset_json: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Of the configuration."""
        return self.base / self.configuration.data_identifier

    @property
    def splits_file(self) -> Path:
        """nnU-Net's, which need not exist."""
        return self.base / "splits_final.json"

    @cached_property
    def cases(self) -> list[str]:
        """All cases in the folder, sorted."""
        return sorted(self._dataset_class.get_identifiers(str(self.folder)))

    @cached_property
    def _dataset_class(self) -> Any:
        try:
            return infer_dataset_class(str(self.folder))
        except (AssertionError, KeyError, OSError) as error:  # empty, gone, or with files of another kind
            raise ValueError(
                f"{self.folder} does not hold preprocessed cases only ({type(error).__name__}): {self._remedy}"
            ) from error

    @property
    def is_cascaded(self) -> bool:
        """Whether it reads a previous stage."""
        return self.configuration.previous_stage_name is not None

    def with_plans(self, plans: dict[str, Any], configuration: str) -> "Preprocessed":
        """The same dataset with other plans."""
        manager = PlansManager(plans)
        return replace(
            self,
            plans=manager,
            configuration=manager.get_configuration(configuration),
            configuration_name=configuration,
        )

    def build_network(self) -> nn.Module:
        """Plain nnU-Net's network of the plans, with fresh weights, on the CPU."""
        channels = determine_num_input_channels(self.plans, self.configuration, self.dataset_json)
        heads = self.plans.get_label_manager(self.dataset_json).num_segmentation_heads
        return nnUNetTrainer.build_network_architecture(self.plans, self.configuration, channels, heads, True)

    def require_files(self) -> None:
        """Raise ValueError if the configuration's folder is missing."""
        if not self.folder.is_dir():
            command = f"nnUNetv2_plan_and_preprocess -d {self.base.name[7:10]} -c {self.configuration_name}"
            raise ValueError(f"{self.folder} is missing: run {command}")

    @property
    def _remedy(self) -> str:
        options = f"-d {self.base.name[7:10]} -plans_name {self.plans.plans_name} -c {self.configuration_name}"
        return f"preprocess the dataset again (nnUNetv2_preprocess {options})"

    def read_case(self, case: str) -> tuple[Any, Any, dict[str, Any]]:
        """Image ``(C, X, Y, Z)``, label ``(1, X, Y, Z)``, read as they are sliced, and nnU-Net's properties.

        Raises:
            ValueError: the case is not there or damaged; names it.
        """
        dataset = self._dataset_class(str(self.folder), [case])
        try:
            image, label, _, properties = dataset.load_case(case)
            return image, label, properties
        except Exception as error:  # blosc2, numpy and pickle have their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ValueError(f"case {case} cannot be read from {self.folder} ({reason}): {self._remedy}") from error

    def read_previous_stage(self, case: str, folder: Path) -> np.ndarray:
        """The previous stage's segmentation ``(X, Y, Z)`` of a case, as it left it for the next stage of a cascade.

        Raises:
            ValueError: the case is not there or damaged; names it.
        """
        dataset = self._dataset_class(str(self.folder), [case], str(folder))
        try:
            return np.asarray(dataset.load_case(case)[2][:])
        except Exception as error:  # as in `read_case`
            raise ValueError(
                f"case {case}: the previous stage's segmentation is not in {folder} ({type(error).__name__}): "
                "finish the previous stage's training of the same fold, with its validation"
            ) from error

    def file_state(self, case: str) -> list[list[Any]]:
        """Name, size and time of a case's files, which change if it is preprocessed again; for caches.

        Raises:
            ValueError: the case is not there.
        """
        files = [self.folder / f"{case}{ending}" for ending in WRITTEN]
        state = [[file.name, *file_stamp(file)] for file in files if file.is_file()]
        if not state:
            raise ValueError(f"case {case} is not in {self.folder}: {self._remedy}")
        return state

    def key(self) -> dict[str, Any]:
        """The part of the plans that the files depend on; JSON-serialisable."""
        return plans_key(self.plans.plans_name, self.configuration.configuration)


def plans_key(plans_name: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration of the plans that preprocessed files depend on; JSON-serialisable."""
    return {"plans": plans_name, **{name: configuration[name] for name in _PREPROCESSING if name in configuration}}


def file_stamp(file: Path) -> list[int]:
    """Size, and time of the last change in nanoseconds."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def open_preprocessed(
    dataset: int | str, configuration: str, plans_name: str = "nnUNetPlans", files: bool = True
) -> Preprocessed:
    """What nnU-Net preprocessed of a dataset, by id or name, for a configuration; `files`: its folder must be there.

    Raises:
        ValueError: the dataset, its plans, the configuration or the files are missing; says what there is instead.
    """
    base = find_dataset(dataset, PREPROCESSED)
    remedy = f"run nnUNetv2_plan_and_preprocess -d {dataset} -c {configuration}"
    plans = PlansManager(read_plans(base, plans_name, remedy))
    if configuration not in plans.available_configurations:
        raise ValueError(
            f"the plans {plans_name} have no configuration {configuration!r}: -c takes "
            + ", ".join(plans.available_configurations)
        )
    dataset_json = read_json(base / "dataset.json")
    if not isinstance(dataset_json, dict) or (lack := {"labels", "file_ending"} - set(dataset_json)):
        what = f"has no {' and no '.join(sorted(lack))}" if isinstance(dataset_json, dict) else "is not an object"
        raise ValueError(f"{base / 'dataset.json'} {what}: copy that of nnUNet_raw, or {remedy}")
    require_consecutive_labels(dataset_json["labels"], base.name)
    try:
        of = plans.get_configuration(configuration)
        _ = of.patch_size, of.spacing, of.data_identifier, of.batch_size, plans.transpose_forward
    except (KeyError, TypeError) as error:
        raise ValueError(f"{base / plans_name}.json is damaged ({type(error).__name__}: {error}): {remedy}") from error
    found = Preprocessed(base, plans, of, configuration, dataset_json)
    if files:
        found.require_files()
    return found
