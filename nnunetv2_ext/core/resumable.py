"""ResumableTrainer: a training that can be stopped at any step and continued as if it had not been.

Between steps the loop looks for signals and the stop file. A checkpoint holds, besides nnU-Net's keys, one key of ours:
settings, random states, the unfinished epoch, the log and the methods' state.
"""

from __future__ import annotations

import copy
import math
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from nnunetv2_ext.core import checkpoint as checkpoints
from nnunetv2_ext.core import randomness
from nnunetv2_ext.core import settings as ext_settings
from nnunetv2_ext.core.configured import ConfiguredTrainer
from nnunetv2_ext.core.files import atomic_torch_save
from nnunetv2_ext.core.interruption import StopRequest
from nnunetv2_ext.core.labelmaps import foreground_names
from nnunetv2_ext.core.logs import EpochLog
from nnunetv2_ext.core.progress import progress_bar


class ResumableTrainer(ConfiguredTrainer):
    """The part of ExtTrainer that runs the epochs, saves and loads.

    Attributes:
        global_step: optimiser steps done, over all epochs.
        epoch_log: this run's CSV and TensorBoard log; None before on_train_start.
        epochs_without_improvement: epochs since the moving average of the pseudo Dice was last best.
    """

    global_step = 0
    epochs_without_improvement = 0
    epoch_log: EpochLog | None = None
    _stop: StopRequest | None = None
    _partial_epoch: dict[str, Any] | None = (
        None  # set while a checkpoint is written, or after one was read, within an epoch
    )
    _random_states: list[dict[str, Any]] | None = None  # one per rank, from the checkpoint
    _log_state: dict[str, Any] | None = None
    _is_resumed = False  # a checkpoint was loaded

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def on_train_start(self) -> None:
        """Start the epoch log after nnU-Net's own start."""
        super().on_train_start()
        self.epoch_log = EpochLog(
            Path(self.output_folder),
            enabled=self.local_rank == 0,
            tensorboard=self.settings.tensorboard,
            warn=self.print_to_log_file,
            class_names=foreground_names(self.dataset_json, self.label_manager),
        )
        if self._log_state is not None:
            # stopped during validation: the training part's figures are in the row of the epoch that is continued
            in_validation = self._partial_epoch is not None and self._partial_epoch["trained"]
            self.epoch_log.load_state_dict(self._log_state, self.current_epoch + in_validation)
        self.logger.loggers.append(self.epoch_log)

    def on_train_end(self) -> None:
        """nnU-Net's, then close the log."""
        super().on_train_end()
        if self.epoch_log is not None:
            self.epoch_log.close()

    def on_epoch_end(self) -> None:
        """nnU-Net's; the latest checkpoint is written last.

        It then holds the final best EMA, so that a continued run compares as an unbroken one.
        """
        save_every, epoch = self.save_every, self.current_epoch
        # nnU-Net's rule for checkpoint_best.pth, which is written inside super() and must hold the new count
        ema = self.logger.get_value("ema_fg_dice", step=-1)
        if not math.isnan(ema):  # validation batches without foreground say nothing
            improved = self._best_ema is None or ema > self._best_ema
            self.epochs_without_improvement = 0 if improved else self.epochs_without_improvement + 1
        self.save_every = self.num_epochs + epoch + 2  # never due inside super()
        try:
            super().on_epoch_end()
        finally:
            self.save_every = save_every
        self.after_epoch(epoch)
        if (epoch + 1) % save_every == 0 and epoch + 1 < self.num_epochs:
            self._save_latest(completed_epochs=epoch + 1)

    def after_epoch(self, epoch: int) -> None:
        """Complete the log's row of the epoch that just ended."""
        if self.epoch_log is not None:
            self.epoch_log.end_epoch(epoch)
            self.epoch_log.plot()

    @property
    def stopped_early(self) -> bool:
        """Whether ``early_stop_patience`` is used up."""
        patience = self.settings.early_stop_patience
        return patience is not None and self.epochs_without_improvement >= patience

    def run_training(self) -> None:
        """Replaces nnUNetTrainer.run_training: the same calls in the same order.

        Between steps it looks at signals and the stop file.
        """
        self.on_train_start()
        if self.current_epoch < self.num_epochs and not self.stopped_early:
            self._set_old_checkpoints_aside()
        with StopRequest(Path(self.output_folder) / "stop") as self._stop:
            if self._random_states is not None and self.local_rank < len(self._random_states):
                randomness.set_random_state(self._random_states[self.local_rank], self.generator)
            self._random_states = None
            while self.current_epoch < self.num_epochs and not self.stopped_early:
                self._run_epoch()
        late_signal = self._stop_code() > 1
        if self.stopped_early:
            self.print_to_log_file(
                f"Early stop: {self.epochs_without_improvement} epochs "
                "without a better moving average of the pseudo Dice."
            )
        self.on_train_end()
        if late_signal:  # it came after the last look; the training is complete, the validation would be killed
            self.print_to_log_file(f"Stopped by {self._stop.reason} after training; --val runs the validation.")
            raise SystemExit(self._stop.exit_code)

    def _set_old_checkpoints_aside(self) -> None:
        """nnU-Net's ``--c`` prefers checkpoint_final.pth, so an old one would undo what is trained from here on."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        folder = Path(self.output_folder)
        if self._is_resumed:  # a finished training gets longer
            if (folder / "checkpoint_final.pth").is_file():
                (folder / "checkpoint_final.pth").replace(folder / "checkpoint_latest.pth")
            return
        for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"):
            if (folder / name).is_file():
                (folder / name).replace(folder / f"previous_{name}")
                self.print_to_log_file(f"{name} of an earlier training in {folder} is kept as previous_{name}.")

    def _run_epoch(self) -> None:
        self.on_epoch_start()
        self.on_train_epoch_start()
        outputs = self._outputs_of_partial_epoch()
        self._partial_epoch = None
        total = self.num_iterations_per_epoch
        with progress_bar(total, f"epoch {self.current_epoch}", self.local_rank == 0) as bar:
            bar.update(len(outputs))
            while len(outputs) < total:
                self._stop_if_requested(outputs)
                outputs.append(self.train_step(self._next_batch(self.dataloader_train, outputs)))
                bar.update(1, loss=float(outputs[-1]["loss"]))
        # a stop during validation resumes at its start, with the random numbers it started with
        state = randomness.get_random_state(self.generator)
        self.on_train_epoch_end(outputs)
        with torch.no_grad():
            self.on_validation_epoch_start()
            val_outputs = []
            for _ in range(self.num_val_iterations_per_epoch):
                self._stop_if_requested(outputs, state)
                val_outputs.append(self.validation_step(self._next_batch(self.dataloader_val, outputs, state)))
            self.on_validation_epoch_end(val_outputs)
        self.on_epoch_end()

    def _outputs_of_partial_epoch(self) -> list[dict]:
        per_rank = self._partial_epoch["outputs"] if self._partial_epoch else [[]]
        return per_rank[self.local_rank if self.local_rank < len(per_rank) else 0]

    def _next_batch(self, loader: Any, outputs: list[dict], state: dict | None = None) -> dict:
        try:
            return next(loader)
        except RuntimeError:
            # Ctrl-C and SLURM signal the loader's workers too, and they may die before we look. Under DDP the other
            # ranks may be inside the step by now and would wait for this one in another collective
            if not self.is_ddp:
                self._stop_if_requested(outputs, state)
            raise

    def _stop_if_requested(self, outputs: list[dict], state: dict | None = None) -> None:
        assert self._stop is not None
        if not self._stop_code():
            return
        self._partial_epoch = {"outputs": self._gather(outputs), "trained": state is not None}
        self._save_latest(self.current_epoch, state)
        if self.local_rank == 0:
            reason = self._stop.reason
            self._stop.stop_file.unlink(missing_ok=True)
            kept = (
                "nothing was saved (--disable_checkpointing)"
                if self.disable_checkpointing
                else "checkpoint_latest.pth is written, --c continues"
            )
            self.print_to_log_file(
                f"Stopped by {reason} in epoch {self.current_epoch} after {len(outputs)} training steps; {kept}."
            )
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "_finish"):
                loader._finish()
        if self.is_ddp:
            distributed.barrier()  # one that ends makes torch.multiprocessing end the others, who may still be writing
        raise SystemExit(self._stop.exit_code)

    def _stop_code(self) -> int:
        """0: go on, 1: the stop file, else the signal's number. The same on all ranks: they must leave at one step."""
        assert self._stop is not None
        code = int(self._stop.signal or self._stop.requested)
        if self.is_ddp:
            flag = torch.tensor(code, device=self.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            code = int(flag)
            if code > 1:
                self._stop.signal = signal.Signals(code)
        return code

    def _gather(self, value: Any) -> list[Any]:
        if not self.is_ddp:
            return [value]
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """*Method hook.* What the method needs to continue, by method name; tensors and plain values."""
        return {}

    def load_method_state(self, states: dict[str, Any]) -> None:
        """*Method hook.* Counterpart of ``method_state``; the own name may be missing (plain nnU-Net's checkpoint)."""

    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """*Method hook.* Weights from this trainer's checkpoint that plain nnU-Net's network of the same plans loads.

        Args:
            checkpoint: as read from the file.
            weights: which network; ``student`` is the one that was trained.

        Raises:
            ValueError: no such network.
        """
        if weights != "student":
            raise ValueError(f"{cls.__name__} has no {weights!r} weights to export; it has: student")
        return checkpoint["network_weights"]

    @classmethod
    def without_patient_data(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """*Method hook.* The checkpoint without what its weights hold of patients, still a model of this trainer.

        Raises:
            ValueError: there is nothing to strip.
        """
        raise ValueError(f"models of {cls.__name__} keep no guide bank; export without --strip-bank")

    @classmethod
    def without_semantics(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """*Method hook.* The checkpoint with its semantic heads closed, so that its networks are plain nnU-Net's.

        Raises:
            ValueError: there are none.
        """
        raise ValueError(f"models of {cls.__name__} have no semantic heads; export without --drop-semantics")

    @classmethod
    def without_subjects(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """*Method hook.* The checkpoint without what tells whether a given case was trained with, otherwise the same.

        Raises:
            ValueError: there is nothing to blank.
        """
        raise ValueError(f"models of {cls.__name__} keep no guide bank; export without --blank-groups")

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

    def _checkpoint(self, completed_epochs: int, random_states: list[dict[str, Any]] | None) -> dict[str, Any]:
        # nnU-Net writes its dictionary straight to the file, so its keys are repeated here; a test compares them with
        # upstream's
        return {
            "network_weights": checkpoints.unwrap(self.network).state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": {name: values[:completed_epochs] for name, values in self.logger.get_checkpoint().items()},
            "_best_ema": self._best_ema,
            "current_epoch": completed_epochs,
            "init_args": self.my_init_kwargs,
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            checkpoints.EXTENSION_KEY: {
                "format": checkpoints.FORMAT,
                "settings": ext_settings.flatten(self.settings),
                "global_step": self.global_step,
                "epochs_without_improvement": self.epochs_without_improvement,
                "train_cases": self._train_cases,
                "partial_epoch": self._partial_epoch,
                "random_states": random_states,
                "log": None if self.epoch_log is None else self.epoch_log.state_dict(),
                "methods": self.method_state(),
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
            self._apply_settings(
                ext_settings.resume(model, extension["settings"], self.resolved, strict=self.is_continued)
            )
        if not self.was_initialized:
            self.initialize()
        checkpoints.check_weights(checkpoint["network_weights"], self.network, path)
        super().load_checkpoint(str(path))
        self._is_resumed = True
        self.my_init_kwargs["plans"] = self.plans_manager.plans  # with today's settings, not the checkpoint's
        if extension is None:
            self.print_to_log_file(f"{path} is a checkpoint of plain nnU-Net: the method's state starts fresh.")
            self.global_step = self.current_epoch * self.num_iterations_per_epoch
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.weight_decay  # the checkpoint's came with the optimiser's state
            self.load_method_state({})
            return
        self.global_step = extension["global_step"]
        self.epochs_without_improvement = extension["epochs_without_improvement"]
        self._train_cases = extension["train_cases"]
        self._partial_epoch = extension["partial_epoch"]
        self._random_states = copy.deepcopy(
            extension["random_states"]
        )  # the file is memory-mapped; Windows would not replace it
        self._log_state = extension["log"]
        self.load_method_state(extension["methods"])
