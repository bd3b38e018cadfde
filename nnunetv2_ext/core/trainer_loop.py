"""LoopTrainer: a training that can be stopped at any step and continued as if it had not been.

Between steps the loop looks for signals and the stop file.
"""

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.hooks import MethodHooks
from nnunetv2_ext.core.interruption import StopRequest
from nnunetv2_ext.core.labelmaps import foreground_names
from nnunetv2_ext.core.logs import EpochLog
from nnunetv2_ext.core.outside import methods_of
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.core.trainer_checkpoints import CheckpointTrainer


class LoopTrainer(CheckpointTrainer):
    """The part of ExtTrainer that runs the epochs."""

    first_step_of_epoch = 0  # ``global_step`` with which the running epoch began
    _epoch_score: float | None = None  # of the epoch that ends
    _stop: StopRequest | None = None

    def on_train_start(self) -> None:
        """Start the epoch log after nnU-Net's own start; a new training names the papers to cite, as nnU-Net does."""
        papers = [method.citation for method in methods_of(type(self)) if method.citation]
        if papers and self.local_rank == 0 and not self._is_resumed:
            frame = "#" * 71
            asked = f"Please cite, besides nnU-Net, when using {type(self).__name__}:"
            self.print_to_log_file("\n".join(["", frame, asked, *papers, frame, ""]), add_timestamp=False)
        super().on_train_start()
        self.epoch_log = EpochLog(
            Path(self.output_folder),
            enabled=self.local_rank == 0,
            tensorboard=self.settings.tensorboard,
            warn=self.print_to_log_file,
            class_names=foreground_names(self.dataset_json, self.label_manager),
            title=self.picture_title,
            healthy={k: v for c in reversed(type(self).mro()) for k, v in vars(c).get("healthy_figures", {}).items()},
            beside=self.logger.loggers,
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

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """nnU-Net's figures where there is a Dice, and the score that best checkpoint, early stop and log go by."""
        if val_outputs and "tp_hard" in val_outputs[0]:
            super().on_validation_epoch_end(val_outputs)
        else:
            self._log_no_dice(val_outputs)
        score = self._epoch_score = self.validation_score(val_outputs)
        if score is not None and not math.isnan(score):  # validation batches without foreground say nothing
            # the logger's rule, but one NaN does not stay in the average for ever
            self._score = score if self._score is None else self._score * 0.9 + 0.1 * score
        if self.epoch_log is not None and self._scores_otherwise and score is not None:
            figures = {"validation_score/value": float(score), "validation_score/moving_average": self._score}
            self.epoch_log.add({k: v for k, v in figures.items() if v is not None}, self.current_epoch)

    @property
    def _scores_otherwise(self) -> bool:
        return type(self).validation_score is not MethodHooks.validation_score

    def _log_no_dice(self, val_outputs: list[dict]) -> None:
        """What nnU-Net logs after validation, where there is no Dice: its on_epoch_end reads all of it."""
        losses = [float(np.mean(output["loss"])) for output in val_outputs if "loss" in output]
        per_rank = self._gather(float(np.mean(losses)) if losses else math.nan)
        classes = max(1, self.label_manager.num_segmentation_heads - (not self.label_manager.has_regions))
        self.logger.log("mean_fg_dice", math.nan, self.current_epoch)
        self.logger.log("dice_per_class_or_region", [math.nan] * classes, self.current_epoch)
        self.logger.log("val_losses", float(np.mean(per_rank)), self.current_epoch)

    def on_epoch_end(self) -> None:
        """nnU-Net's; the checkpoints are written after it, by our score, the latest one last.

        It then holds the final best score, so that a continued run compares as an unbroken one.
        """
        save_every, epoch = self.save_every, self.current_epoch
        best: float | None = self._best_ema
        self.save_every, self._best_ema = self.num_epochs + epoch + 2, math.inf  # neither is due inside super()
        try:
            super().on_epoch_end()
        finally:
            self.save_every, self._best_ema = save_every, best
        score = self._epoch_score
        if score is None and self.settings.early_stop_patience is not None and epoch == 0:
            self.print_to_log_file("WARNING: early_stop_patience has no effect: this training has no validation score.")
        if score is not None and not math.isnan(score):
            assert self._score is not None
            improved = best is None or math.isnan(best) or self._score > best
            self.epochs_without_improvement = 0 if improved else self.epochs_without_improvement + 1
            if improved:
                self._best_ema = self._score
                what = "moving average of the validation score" if self._scores_otherwise else "EMA pseudo Dice"
                self.print_to_log_file(f"Yayy! New best {what}: {np.round(self._score, decimals=4)}")
                self._save(Path(self.output_folder) / "checkpoint_best.pth", completed_epochs=epoch + 1)
        self.after_epoch(epoch)
        every = self.settings.keep_every
        if every and (epoch + 1) % every == 0:
            self._save(Path(self.output_folder) / f"checkpoint_epoch_{epoch + 1:04d}.pth", completed_epochs=epoch + 1)
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
                "without a better moving average of the validation score."
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
        kept = sorted(path.name for path in folder.glob("checkpoint_epoch_*.pth"))  # keep_every
        for name in ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth", *kept):
            if (folder / name).is_file():
                (folder / name).replace(folder / f"previous_{name}")
                self.print_to_log_file(f"{name} of an earlier training in {folder} is kept as previous_{name}.")

    def _run_epoch(self) -> None:
        self.on_epoch_start()
        self.on_train_epoch_start()
        outputs = self._outputs_of_partial_epoch()
        self._partial_epoch = None
        self.first_step_of_epoch = self.global_step - len(outputs)
        total = self.num_iterations_per_epoch
        with progress_bar(total, f"epoch {self.current_epoch}", self.local_rank == 0) as bar:
            bar.update(len(outputs))
            while len(outputs) < total:
                self._stop_if_requested(outputs)
                outputs.append(self.train_step(self._next_batch(self.dataloader_train, outputs)))
                bar.set_postfix(loss=float(outputs[-1]["loss"]), refresh=False)
                bar.update()
        # a stop during validation resumes at its start, with the random numbers it started with
        state = randomness.get_random_state(self.generator)
        self.on_train_epoch_end(outputs)
        with torch.no_grad():
            self.on_validation_epoch_start()
            val_outputs: list[dict] = []
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
            self._stop.remove_files()
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
