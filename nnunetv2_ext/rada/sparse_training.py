"""Training on sparsely annotated cases: what is refused, the planes, the split and the batches."""

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from nnunetv2_ext.data.split import clean_fold, write_split_if_absent
from nnunetv2_ext.data.subjects import subjects_of_dataset
from nnunetv2_ext.parts.unlabelled_cases import UnlabelledCases
from nnunetv2_ext.rada.annotation.annotations import Annotation, log_lines
from nnunetv2_ext.rada.annotation.cases import CaseSource, cache_root, case_sources
from nnunetv2_ext.rada.annotation.lost import erased_annotations, require_planes_survived
from nnunetv2_ext.rada.annotation.preprocessed import SparsePreprocessed, require_trainable
from nnunetv2_ext.rada.batches import JoinedStream, TwoStreamLoader, ViewDataset
from nnunetv2_ext.rada.propagation.propagate import propagate_cases
from nnunetv2_ext.rada.settings import RADASettings
from nnunetv2_ext.rada.targets import supervised_target
from nnunetv2_ext.rada.views import AXES, axes_in, view_masks


class SparseTraining(UnlabelledCases):
    """The part of RADATraining that knows the data."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"rada": RADASettings}
    unlabelled_block: ClassVar[str] = "rada"
    # SGTC's 6000 iterations are 24 such epochs; three networks cost 3.5 times a plain step
    default_settings: ClassVar[dict[str, Any]] = {"num_epochs": 250}

    labelled_cases: frozenset[str] = frozenset()  # those with any annotated voxel
    training_data: Any = None  # nnU-Net's dataset of the training cases
    plane_axes: tuple[int, ...] = ()  # on which training cases have planes
    masks: tuple[int, ...]  # per network the view bits it learns from
    preprocessed: SparsePreprocessed
    ignore_label: int

    @property
    def rada(self) -> RADASettings:
        """This method's settings."""
        return self.settings.rada  # type: ignore[attr-defined]  # the block settings_model added

    def initialize(self) -> None:
        """nnU-Net's, after the refusals.

        nnU-Net's own deep supervision stays off: its targets lose thin planes, ours are pooled on the device.

        Raises:
            ValueError: 2-D, cascade, regions, no ignore label.
            NotImplementedError: DDP.
        """
        if self.is_ddp:
            raise NotImplementedError(
                "nnUNetTrainerRADA runs on one GPU: its three networks are trained one after the other, each of which "
                "would need its own DDP wrapper, and nnU-Net saves and loads exactly one. Train without -num_gpus"
            )
        base = Path(self.preprocessed_dataset_folder_base)
        self.preprocessed = require_trainable(base, self.plans_manager, self.configuration_name, self.dataset_json)
        self.ignore_label = self.preprocessed.ignore
        self.enable_deep_supervision = False
        super().initialize()

    # ---- who is labelled ---------------------------------------------------------------------------------------------
    @cached_property
    def annotations(self) -> dict[str, Annotation]:
        """What is annotated in every case of the dataset."""
        return self.preprocessed.survey()

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's: unlabelled cases train in every fold and validate in none (see `split.labelled_splits`).

        Raises:
            ValueError: no labelled case to train on, or none to validate on.
        """
        annotations = self.annotations
        labelled = {case for case, annotation in annotations.items() if annotation.labelled}
        file = self.preprocessed.splits_file
        subjects = subjects_of_dataset(self.dataset_json, annotations, self.settings.group_regex)
        if self.fold != "all" and write_split_if_absent(file, labelled, set(annotations) - labelled, subjects):
            self.print_to_log_file(f"RADA wrote {file}: unlabelled cases are in every fold's training part.")
        train, validation = super().do_split()
        # train_cases counts unlabelled cases too; a split that is to blame is another matter
        if self.settings.train_cases is not None and not labelled.intersection(train):
            raise ValueError(
                f"train_cases chose {len(train)} unlabelled cases and no labelled one: name the cases, with labelled "
                "ones among them, choose more, or another train_cases_seed"
            )
        if self.fold == "all":
            return train, [case for case in validation if case in labelled]
        return clean_fold(train, validation, labelled, self.print_to_log_file)

    # ---- batches -----------------------------------------------------------------------------------------------------
    def get_tr_and_val_datasets(self) -> tuple[ViewDataset, ViewDataset]:
        """nnU-Net's, whose cases carry their view map; before that the planes are checked."""
        annotations, data = self.annotations, self.preprocessed
        lines = [*log_lines(annotations), *data.warnings(annotations), *erased_annotations(data, annotations)]
        self.print_to_log_file("RADA found these planes (slices of the preprocessed arrays):\n" + "\n".join(lines))
        require_planes_survived(data, annotations)
        train, validation = super().get_tr_and_val_datasets()
        self.training_data = train
        self.plane_axes = tuple(
            axis for axis in range(3) if any(axis in annotations[case].planes.axes for case in train.identifiers)
        )
        self.masks = view_masks(self.plane_axes, self.rada.num_networks)
        names = [", ".join(map(str, axes_in(mask))) for mask in self.masks]
        text = "; ".join(f"network {k} learns from planes of axes {name}" for k, name in enumerate(names, 1))
        self.print_to_log_file(f"RADA: {text}.")
        planes = {case: annotation.planes for case, annotation in annotations.items()}
        self.labelled_cases = frozenset(case for case, annotation in annotations.items() if annotation.labelled)
        common = (planes, self.labelled_cases, self.ignore_label)
        return ViewDataset(train, *common, self._propagated()), ViewDataset(validation, *common)

    def training_sources(self) -> list[CaseSource]:
        """The training cases with planes, as embedding and registration want them."""
        assert self.training_data is not None
        planes = {case: self.annotations[case].planes for case in self.training_data.identifiers}
        return case_sources(self.preprocessed, planes, self.configuration_manager.spacing, self.rada.image_channel)

    def _propagated(self) -> dict[str, Path] | None:
        """Files of the training cases' propagated planes; None without registration."""
        if self.rada.registration == "off":
            return None
        root, key = cache_root(self.preprocessed_dataset_folder_base), self.preprocessed.key()
        options = self.ignore_label, self.rada.max_distance, self.print_to_log_file
        return propagate_cases(self.training_sources(), root, key, *options)

    def make_train_loader(self, dataset: ViewDataset, **nnunet_arguments: Any) -> TwoStreamLoader | JoinedStream:
        """Labelled and unlabelled patches in each batch; with a pool the planned batch is all labelled."""
        nnunet_arguments.pop("probabilistic_oversampling")
        share = 1.0 if self.has_unlabelled else self.rada.labelled_share
        loader = TwoStreamLoader(dataset, share, self.rada.min_labelled, **nnunet_arguments)
        number, unlabelled = loader.number_labelled, len(dataset.unlabelled)
        if self.has_unlabelled:
            rest = f", and {number} of the pool"
        elif number < loader.batch_size:
            rest = f" and {loader.batch_size - number} of {unlabelled} unlabelled cases"
        elif unlabelled:
            keeps = f"a batch keeps rada.min_labelled={self.rada.min_labelled} labelled patches; a larger batch_size "
            why = f"{keeps}takes the unlabelled cases in" if self.rada.labelled_share < 1 else "rada.labelled_share=1"
            rest = f"; the {unlabelled} unlabelled cases are left out ({why})"
        else:
            rest = "; there are no unlabelled cases, the networks teach each other on what is not annotated in these"
        labelled = f"{number} patches of {len(dataset.labelled)} labelled cases"
        self.print_to_log_file(f"RADA draws for each batch {labelled}{rest}.")
        if not self.has_unlabelled:
            return loader
        return JoinedStream(self.add_unlabelled(loader, self.training_data, **nnunet_arguments), self.ignore_label)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, on the annotated voxels of the full resolution."""
        return super().validation_step(batch | {"target": supervised_target(batch["target"], AXES, self.ignore_label)})
