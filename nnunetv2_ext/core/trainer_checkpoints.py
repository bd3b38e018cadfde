"""CheckpointTrainer: what a checkpoint holds, how it is written, and how a training takes it up again.

Besides nnU-Net's keys it holds one key of ours: settings, random states, the unfinished epoch, the log and the methods'
state.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from nnunetv2_ext.core import checkpoint as checkpoints
from nnunetv2_ext.core import randomness
from nnunetv2_ext.core import settings as ext_settings
from nnunetv2_ext.core.files import atomic_torch_save
from nnunetv2_ext.core.logs import EpochLog
from nnunetv2_ext.core.resolve import resume
from nnunetv2_ext.core.trainer_data import DataTrainer
from nnunetv2_ext.core.training_modules import load_states

TRAINING_MODULES = "training_modules"  # name of their group in the optimiser


class CheckpointTrainer(DataTrainer):
    """The part of ExtTrainer that saves and loads."""

    global_step = 0  # optimiser steps done, over all epochs
    epochs_without_improvement = 0  # epochs since the moving average of the validation score was last best
    epoch_log: EpochLog | None = None  # this run's CSV and TensorBoard log; None before on_train_start
    _partial_epoch: dict[str, Any] | None = None  # while a checkpoint is written, or after one was read, in an epoch
    _random_states: list[dict[str, Any]] | None = None  # one per rank, from the checkpoint
    _log_state: dict[str, Any] | None = None
    _is_resumed = False  # a checkpoint was loaded
    _group_is_aside = False  # the training modules' group of the optimiser
    _score: float | None = None  # moving average of the validation score

    def save_checkpoint(self, filename: str) -> None:
        """Replaces nnUNetTrainer.save_checkpoint: its keys and ours, written atomically (temporary, fsync, rename)."""
        self._save(Path(filename), self.current_epoch + 1)

    def _save_latest(self, completed_epochs: int, state: dict[str, Any] | None = None) -> None:
        self._save(Path(self.output_folder) / "checkpoint_latest.pth", completed_epochs, state)

    def _save(self, path: Path, completed_epochs: int, state: dict[str, Any] | None = None) -> None:
        states = self._gather(state or randomness.get_random_state(self.generator))
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        atomic_torch_save(self._checkpoint(completed_epochs, states), path)

    def _gather(self, value: Any) -> list[Any]:
        if not self.is_ddp:
            return [value]
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    def _checkpoint(
        self, completed_epochs: int, random_states: list[dict[str, Any]] | None, global_step: int | None = None
    ) -> dict[str, Any]:
        # nnU-Net writes its dictionary straight to the file, so its keys are repeated here; a test compares them with
        # upstream's
        return {
            "network_weights": checkpoints.unwrap(self.network).state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            # an epoch that is not finished has logged its learning rate and start already
            "logging": {name: values[:completed_epochs] for name, values in self.logger.get_checkpoint().items()},
            "_best_ema": self._best_ema,
            "current_epoch": completed_epochs,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            checkpoints.EXTENSION_KEY: {
                "format": checkpoints.FORMAT,
                "settings": ext_settings.flatten(self.settings),
                "global_step": self.global_step if global_step is None else global_step,
                "epochs_without_improvement": self.epochs_without_improvement,
                "train_cases": self._train_cases,
                "partial_epoch": self._partial_epoch,
                "random_states": random_states,
                "log": None if self.epoch_log is None else self.epoch_log.state_dict(),
                "methods": self.method_state(),
                "training_modules": {name: module.state_dict() for name, module in self.training_modules.items()},
                "score": self._score,
            },
        }

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's, after checking that settings and architecture fit, and then our own state.

        Raises:
            ValueError: broken file with no other to fall back to, conflicting settings, or another architecture.
        """
        checkpoint, path, warning = checkpoints.read_or_fall_back(Path(filename_or_checkpoint))
        if warning:
            self.print_to_log_file(warning)
        extension = checkpoint.get(checkpoints.EXTENSION_KEY)
        if extension is not None:
            checkpoints.require_known_format(extension, path)
            model = type(self.settings)
            self._apply_settings(resume(model, extension["settings"], self.resolved, strict=self.is_continued))
        if not self.was_initialized:
            self.initialize()
        checkpoints.check_weights(checkpoint["network_weights"], self.network, path)
        with self._optimizer_as_in(checkpoint), checkpoints.all_of_torch_load():
            super().load_checkpoint(str(path))
        self._is_resumed = True
        self.my_init_kwargs["plans"] = self.plans_manager.plans  # with today's settings, not the checkpoint's
        if extension is None:
            self.print_to_log_file(f"{path} is a checkpoint of plain nnU-Net: the method's state starts fresh.")
            self.global_step = self.current_epoch * self.num_iterations_per_epoch
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.weight_decay  # the checkpoint's came with the optimiser's state
            self.load_method_state({})
            self._score = self._logged_score()
            return
        self.global_step = extension["global_step"]
        self.epochs_without_improvement = extension["epochs_without_improvement"]
        self._train_cases = extension["train_cases"]
        self._partial_epoch = extension["partial_epoch"]
        # the file is memory-mapped; Windows would not replace it
        self._random_states = copy.deepcopy(extension["random_states"])
        self._log_state = extension["log"]
        self._score = extension["score"] if "score" in extension else self._logged_score()
        states = extension.get("training_modules", {})  # checkpoints of older versions have none
        for text in load_states(self.training_modules, states, type(self).__name__):
            self.print_to_log_file(text)
        self.load_method_state(extension["methods"])

    def _logged_score(self) -> float | None:
        """Of a checkpoint that does not say: nnU-Net's moving average of the pseudo Dice."""
        logged = self.logger.get_value("ema_fg_dice", step=None)
        return logged[-1] if logged and not math.isnan(logged[-1]) else None

    @contextmanager
    def _optimizer_as_in(self, checkpoint: dict[str, Any]) -> Iterator[None]:
        """Without the training modules' group while a checkpoint without one (plain nnU-Net's) is loaded.

        A group loses its name if the checkpoint has none for it, as those of older versions.
        """
        groups = self.optimizer.param_groups
        names = [group.get("name") for group in groups]
        known = len(checkpoint["optimizer_state"]["param_groups"])
        ours = [group for group in groups if group.get("name") == TRAINING_MODULES]
        if not ours or known == len(groups):
            yield
            for name, group in zip(names, self.optimizer.param_groups):
                if name is not None:
                    group["name"] = name
            return
        groups.remove(ours[0])
        self._group_is_aside = True  # some base trainers configure their optimiser again while they load
        try:
            yield
        finally:
            self._group_is_aside = False
            self.optimizer.add_param_group({key: v for key, v in ours[0].items() if key in ("params", "name")})
