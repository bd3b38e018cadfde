"""DataTrainer: which cases a training sees, and the loaders of their patches."""

from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.fewshot import select_train_cases
from nnunetv2_ext.core.orientation import Array, directions_of
from nnunetv2_ext.core.trainer_settings import SettingsTrainer
from nnunetv2_ext.core.workers import in_workers


class DataTrainer(SettingsTrainer):
    """The part of ExtTrainer that knows the data."""

    left_out: tuple[str, ...] = ()  # training cases of the fold that train_cases did not choose; -> do_split
    held_out: tuple[str, ...] = ()  # validation cases; none of fold all, which are the training cases
    _train_cases: list[str] | None = None  # -> do_split, or the checkpoint

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, with the training list cut down to ``train_cases``; the validation list is untouched."""
        train, validation = super().do_split()
        chosen = select_train_cases(train, self.settings.train_cases, self.settings.train_cases_seed)
        self.left_out = tuple(sorted(set(train) - set(chosen)))
        self.held_out = () if self.fold == "all" else tuple(validation)
        if self.settings.train_cases is not None:
            self.print_to_log_file(f"train_cases: {len(chosen)} of {len(train)} training cases: {', '.join(chosen)}")
            if self._train_cases is not None and self._train_cases != chosen:
                raise ValueError(
                    f"this training was started on {', '.join(self._train_cases)}, but train_cases now selects "
                    f"{', '.join(chosen)}; restore the split or the settings, or start a new training without --c"
                )
            self._train_cases = chosen
        return chosen, validation

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's datasets; raises ValueError if no training case has a foreground voxel and the method needs one."""
        train, validation = super().get_tr_and_val_datasets()
        # the tuple that starts with -1 holds every annotated voxel, background included
        if self.needs_foreground and not any(
            len(where)
            for case in train.identifiers
            for label, where in train.load_case(case)[3]["class_locations"].items()
            if not (isinstance(label, tuple) and label[0] == -1)
        ):
            raise ValueError(
                f"none of the {len(train.identifiers)} training cases of fold {self.fold} has a foreground voxel: "
                "check the labels (nnUNetv2_plan_and_preprocess --verify_dataset_integrity) and the split"
            )
        return train, validation

    @property
    def picture_title(self) -> str:
        """Dataset, trainer, configuration and fold, for the titles of pictures."""
        names = self.plans_manager.dataset_name, type(self).__name__, self.configuration_name, f"fold {self.fold}"
        return ", ".join(names)

    def folder_of_case(self, case: str) -> Path:
        """Where a case lies as nnU-Net preprocesses it."""
        return Path(self.preprocessed_dataset_folder)

    def directions_of_case(self, case: str) -> Array | None:
        """Where the axes of a preprocessed case point in the patient (core/orientation.py); None: not known."""
        try:
            properties = load_pickle(str(self.folder_of_case(case) / f"{case}.pkl"))
        except OSError:  # for pictures only
            return None
        return directions_of(properties, self.plans_manager.transpose_forward)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """nnU-Net's, without mirroring if ``mirroring`` says so, as its nnUNetTrainerNoMirroring."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.settings.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_training_transforms(self, *args, **kwargs):
        """nnU-Net's augmentation; with a ``seed`` without the part that depends on the clock."""
        transforms = super().get_training_transforms(*args, **kwargs)
        if self.settings.seed is not None:
            randomness.make_repeatable(transforms)
        return transforms

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Replaces nnUNetTrainer.get_dataloaders, which hard-wires its loader: the same calls in the same order.

        The training loader is ``make_train_loader``'s, and the workers end with the training (core/workers.py).
        """
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        configuration, labels = self.configuration_manager, self.label_manager
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        of_labels = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": labels.foreground_labels,
            "regions": labels.foreground_regions if labels.has_regions else None,
            "ignore_label": labels.ignore_label,
        }
        of_patch = configuration.patch_size, rotation, scales, mirror_axes, dummy_2d
        train_transforms = self.get_training_transforms(
            *of_patch, use_mask_for_norm=configuration.use_mask_for_norm, **of_labels
        )
        validation_transforms = self.get_validation_transforms(scales, **of_labels)
        train, validation = self.get_tr_and_val_datasets()
        common: dict[str, Any] = {
            "batch_size": self.batch_size,
            "final_patch_size": configuration.patch_size,
            "label_manager": labels,
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "sampling_probabilities": None,
            "pad_sides": None,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        loaders = in_workers(
            self.make_train_loader(train, patch_size=initial_patch_size, transforms=train_transforms, **common),
            nnUNetDataLoader(
                validation, patch_size=configuration.patch_size, transforms=validation_transforms, **common
            ),
            pin_memory=self.device.type == "cuda",
        )
        for loader in loaders:  # nnU-Net starts its workers, and finds what does not work, before the first epoch
            next(loader)
        return loaders
