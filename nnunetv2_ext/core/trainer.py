"""ExtTrainer: nnUNetTrainer with loss passes, settings, exact resume, logs and clean interruption.

A method subclasses it once (in its own package), overrides the few hooks marked *method hook*, always calling ``super()``, and can then be
combined with another method by inheriting from both. nnU-Net's own hooks stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pydantic import BaseModel
from torch import Tensor, distributed, nn

from nnunetv2_ext.core import checkpoint as checkpoints
from nnunetv2_ext.core import randomness
from nnunetv2_ext.core import settings as ext_settings
from nnunetv2_ext.core.compat import require_supported_nnunet
from nnunetv2_ext.core.fewshot import select_train_cases
from nnunetv2_ext.core.files import atomic_torch_save, atomic_write_text, require_writable
from nnunetv2_ext.core.interruption import StopRequest
from nnunetv2_ext.core.logs import EpochLog, progress_bar
from nnunetv2_ext.core.step import Batch, LossPass, Term, backward_passes

# Under AMP the GradScaler skips steps with non-finite gradients, which is normal now and then; so many in a row are not
MAX_NONFINITE_UNDER_AMP = 20


class ExtTrainer(nnUNetTrainer):
    """Base of all our trainers.

    Attributes:
        method_settings: *method hook*; block name to pydantic model, merged over all base classes.
        default_settings: *method hook*; dotted keys whose default differs for this trainer.
        settings: the resolved settings.
        generator: the methods' own random stream, on the device, per rank; it leaves nnU-Net's augmentation stream untouched, so runs of
            one seed see the same batches whatever the method draws.
        global_step: optimiser steps done, over all epochs.
    """

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {}
    default_settings: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = torch.device("cuda")
    ) -> None:
        require_supported_nnunet()
        self.is_continued = bool(plans.get("continue_training"))
        resolved = ext_settings.resolve(
            self.settings_model(), trainer_defaults=self.default_settings, plans=plans.get(ext_settings.PLANS_KEY)
        )
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
            require_writable(Path(self.output_folder))
        except OSError as error:
            raise ValueError(f"the results folder cannot be written ({error}); check nnUNet_results, its rights and the disk") from error
        if not self.label_manager.foreground_labels:
            raise ValueError(f"dataset.json of {self.plans_manager.dataset_name} declares no foreground label; there is nothing to learn")
        self._apply_settings(resolved)
        self.generator: torch.Generator  # -> initialize
        self.global_step = 0
        self.last_batch: dict | None = None
        self.epoch_log: EpochLog | None = None  # -> on_train_start
        self.epochs_without_improvement = 0
        self._nonfinite_steps = 0
        self._train_cases: list[str] | None = None
        self._partial_epoch: dict[str, Any] | None = None  # set while a checkpoint is written, or after one was read, within an epoch
        self._random_states: list[dict[str, Any]] | None = None  # one per rank, from the checkpoint
        self._log_state: dict[str, Any] | None = None
        self._stop: StopRequest | None = None

    # ---- settings -------------------------------------------------------------------------------------------------------------------
    @classmethod
    def settings_model(cls) -> type[ext_settings.CommonSettings]:
        """The pydantic model of this trainer's settings: the common keys and the block of each method it inherits from."""
        methods: dict[str, type[BaseModel]] = {}
        for base in reversed(cls.__mro__):
            methods.update(vars(base).get("method_settings", {}))
        return ext_settings.settings_model(cls.__name__, methods)

    def _apply_settings(self, resolved: ext_settings.Resolved) -> None:
        s = resolved.settings
        self.resolved, self.settings = resolved, s
        self.num_epochs = s.num_epochs
        self.num_iterations_per_epoch = s.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = s.num_val_iterations_per_epoch
        self.initial_lr = s.initial_lr
        self.weight_decay = s.weight_decay
        self.save_every = s.save_every
        plans = self.plans_manager.plans
        if not self.was_initialized:  # initialize() spreads both over the DDP ranks
            self.oversample_foreground_percent = s.oversample_foreground_percent
            if s.batch_size is not None:
                plans["configurations"][self.configuration_name]["batch_size"] = s.batch_size
                self.configuration_manager.configuration["batch_size"] = s.batch_size
        # build_network_architecture is called on the class by the predictor, which knows the plans and nothing else
        plans[ext_settings.PLANS_KEY] = s.model_dump(mode="json")

    def _require_same_structure_as_other_folds(self) -> None:
        plans_file = Path(self.output_folder_base) / "plans.json"
        others = [p.parent.name for p in Path(self.output_folder_base).glob("fold_*/checkpoint_*.pth")]
        others = sorted({name for name in others if name != f"fold_{self.fold}"})
        if not others or not plans_file.is_file():
            return
        block = yaml.safe_load(plans_file.read_text()).get(ext_settings.PLANS_KEY) or {}
        theirs, ours = ext_settings.flatten_layer(block, type(self.settings)), ext_settings.flatten(self.settings)
        for key, field in ext_settings.fields_by_key(type(self.settings)).items():
            if ext_settings.is_marked(field, "structural") and key in theirs and theirs[key] != ours[key]:
                raise ValueError(
                    f"{', '.join(others)} in {self.output_folder_base} were trained with {key}={theirs[key]}, this fold has {key}={ours[key]}: "
                    "all folds of a model folder share one network. Use the same value, or another plans name (-p) for the new one"
                )

    # ---- set-up ---------------------------------------------------------------------------------------------------------------------
    def initialize(self) -> None:
        """Seed (if asked to), then build network, optimiser and loss as nnU-Net does."""
        seed = self.settings.seed
        if seed is not None:
            randomness.seed_everything(seed + self.local_rank)
        super().initialize()
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(((torch.initial_seed() if seed is None else seed) + 7919 * (self.local_rank + 1)) % 2**63)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split, with the training list cut down to ``train_cases``; the validation list is untouched."""
        train, validation = super().do_split()
        chosen = select_train_cases(train, self.settings.train_cases, self.settings.train_cases_seed)
        if self.settings.train_cases is not None:
            self.print_to_log_file(f"train_cases: {len(chosen)} of {len(train)} training cases: {', '.join(chosen)}")
            if self._train_cases is not None and self._train_cases != chosen:
                raise ValueError(
                    f"this training was started on {', '.join(self._train_cases)}, but train_cases now selects {', '.join(chosen)}; restore the "
                    "split or the settings, or start a new training without --c"
                )
            self._train_cases = chosen
        return chosen, validation

    def get_tr_and_val_datasets(self):
        """nnU-Net's datasets; raises ValueError if no training case has a foreground voxel."""
        train, validation = super().get_tr_and_val_datasets()
        for case in train.identifiers:
            locations = train.load_case(case)[3]["class_locations"]
            # the tuple that starts with -1 holds every annotated voxel, background included
            if any(len(where) for label, where in locations.items() if not (isinstance(label, tuple) and label[0] == -1)):
                return train, validation
        raise ValueError(
            f"none of the {len(train.identifiers)} training cases of fold {self.fold} has a foreground voxel: check the labels "
            "(nnUNetv2_plan_and_preprocess --verify_dataset_integrity) and the split"
        )

    def get_training_transforms(self, *args, **kwargs):
        """nnU-Net's augmentation; with a ``seed`` without the part that depends on the clock."""
        transforms = super().get_training_transforms(*args, **kwargs)
        if self.settings.seed is not None:
            randomness.make_repeatable(transforms)
        return transforms

    def on_train_start(self) -> None:
        """Print and write the settings, start the logs, then nnU-Net's own start."""
        self._require_same_structure_as_other_folds()
        self.print_to_log_file(
            f"Settings of {type(self).__name__} (`nnUNetv2_ext settings {type(self).__name__}` explains them):\n"
            + ext_settings.describe(self.settings, self.resolved.sources),
            add_timestamp=False,
        )
        super().on_train_start()
        if self.settings.seed is not None:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        if self.local_rank == 0:
            header = f"# {type(self).__name__}, fold {self.fold}. To repeat: {ext_settings.ENVIRONMENT_VARIABLE}=<this file>\n"
            content = yaml.safe_dump(ext_settings.flatten(self.settings), sort_keys=False)
            atomic_write_text(Path(self.output_folder) / "nnunetv2_ext_settings.yaml", header + content)
        self.epoch_log = EpochLog(
            Path(self.output_folder), enabled=self.local_rank == 0, tensorboard=self.settings.tensorboard, warn=self.print_to_log_file
        )
        if self._log_state is not None:
            self.epoch_log.load_state_dict(self._log_state, self.current_epoch)
        self.logger.loggers.append(self.epoch_log)

    # ---- one step -------------------------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch, network: Callable[[Tensor], Any] | None = None) -> Any:
        """*Method hook.* Logits of ``batch.data``; a network that needs to know the cases gets them here.

        Args:
            batch: data, and the case ids it belongs to.
            network: the trained network, or another one of the same kind (a teacher).

        Returns:
            ``(B, heads, *S)``, or the list over deep-supervision resolutions.
        """
        return (self.network if network is None else network)(batch.data)

    def loss_passes(self, batch: Batch) -> list[LossPass]:
        """*Method hook.* The passes of this step; methods put theirs before the supervised one, which stays last and is nnU-Net's own."""
        return [LossPass("supervised", lambda: {"supervised": Term(self.loss(self.forward(batch), batch.target))})]

    def clip_gradients(self) -> Tensor:
        """*Method hook.* Clip after unscaling, as nnU-Net: total norm 12. Returns the norm before clipping, 0-dim."""
        return nn.utils.clip_grad_norm_(self.network.parameters(), 12)

    def after_step(self) -> None:
        """*Method hook.* Called after the optimiser step, also when the scaler skipped it; ``global_step`` is still this step's."""

    def train_step(self, batch: dict) -> dict:
        """Replaces nnUNetTrainer.train_step: all loss passes, then one unscale, clip, optimiser step, scaler update and ``after_step``.

        Returns:
            ``loss``, the supervised term as in a plain run, every named term, and ``grad_norm``; 0-dim arrays.

        Raises:
            ValueError: a term is not finite; the weights are still those of the step before.
        """
        self.last_batch = batch
        on_device = Batch.from_loader(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        values = backward_passes(self.loss_passes(on_device), self.network, self.device, self.grad_scaler)
        if self.grad_scaler is None:
            figures = self._read(values)
            self._require_finite(figures, on_device.keys)
            figures |= self._read({"grad_norm": self.clip_gradients()})
            self.optimizer.step()
        else:
            self.grad_scaler.unscale_(self.optimizer)
            norm = self.clip_gradients()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            figures = self._read(values | {"grad_norm": norm})  # the step's only host sync, after everything is queued
            self._require_finite(figures, on_device.keys)
        self.after_step()
        self.global_step += 1
        return {"loss": figures.get("supervised", next(iter(figures.values()))), **figures}

    @staticmethod
    def _read(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
        host = torch.stack([value.float() for value in values.values()]).cpu().numpy()
        return {name: np.asarray(value) for name, value in zip(values, host, strict=True)}

    def _require_finite(self, figures: dict[str, np.ndarray], cases: Sequence[str]) -> None:
        broken = [name for name, value in figures.items() if name != "grad_norm" and not np.isfinite(value)]
        self._nonfinite_steps = self._nonfinite_steps + 1 if broken else 0
        if self._nonfinite_steps <= (0 if self.grad_scaler is None else MAX_NONFINITE_UNDER_AMP):
            return
        where = f"epoch {self.current_epoch}, step {self.global_step}"
        path = Path(self.output_folder) / "checkpoint_before_nan.pth"
        if self.local_rank == 0 and not self.disable_checkpointing:
            atomic_torch_save(self._checkpoint(completed_epochs=self.current_epoch, random_states=None), path)
        message = (
            f"the loss term(s) {', '.join(f'{n}={figures[n]}' for n in broken)} are not finite at {where}, cases {', '.join(cases)}. The weights from "
            f"before this step are in {path}. Check these cases for NaN or extreme intensities; else lower initial_lr"
        )
        self.print_to_log_file(f"ERROR: {message}")
        raise ValueError(message)

    # ---- one epoch ------------------------------------------------------------------------------------------------------------------
    def epoch_figures(self) -> dict[str, float]:
        """*Method hook.* Figures of the finished epoch for the log, named ``method/figure``; called with the training part done."""
        return {}

    def draw_panel(self, path: Path) -> None:
        """*Method hook.* Draw what the method does with ``last_batch`` to ``path`` (PNG). Must not touch global random state."""

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """nnU-Net's, plus every named term's mean over the steps (and ranks) that had it."""
        names = dict.fromkeys(name for output in train_outputs for name in output if name != "loss")
        means: dict[str, float] = {}
        for name in names:
            values = np.array([output[name] for output in train_outputs if name in output], dtype=np.float64)
            finite = values[np.isfinite(values)]
            means[name if name == "grad_norm" else f"loss/{name}"] = float(finite.mean()) if finite.size else float("nan")
        per_rank = self._gather(means)
        averaged = {name: float(np.mean([rank[name] for rank in per_rank if name in rank])) for name in means}
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        if self.epoch_log is not None:
            self.epoch_log.add(averaged | self.epoch_figures(), self.current_epoch)

    def on_epoch_end(self) -> None:
        """nnU-Net's; the latest checkpoint is written last, with the final best EMA, so that a continued run compares as an unbroken one."""
        best_before, save_every = self._best_ema, self.save_every
        epoch = self.current_epoch
        self.save_every = self.num_epochs + epoch + 2  # never due inside super()
        try:
            super().on_epoch_end()
        finally:
            self.save_every = save_every
        self.epochs_without_improvement = 0 if self._best_ema != best_before else self.epochs_without_improvement + 1
        if self.epoch_log is not None and self.local_rank == 0:
            self.epoch_log.end_epoch(epoch)
            self.epoch_log.plot(Path(self.output_folder) / "progress_ext.png")
            self._try_to_draw_panel(epoch)
        if (epoch + 1) % save_every == 0 and epoch + 1 < self.num_epochs:
            self._save_latest(completed_epochs=epoch + 1)

    def _try_to_draw_panel(self, epoch: int) -> None:
        every = self.settings.panel_every
        if not every or (epoch % every and epoch + 1 != self.num_epochs) or self.last_batch is None:
            return
        state = randomness.get_random_state(self.generator)
        try:
            self.draw_panel(Path(self.output_folder) / f"panel_epoch_{epoch:04d}.png")
        except Exception as error:  # a picture must never end a training
            self.print_to_log_file(f"WARNING: the picture of epoch {epoch} could not be drawn: {type(error).__name__}: {error}")
        finally:
            randomness.set_random_state(state, self.generator)

    @property
    def stopped_early(self) -> bool:
        """Whether ``early_stop_patience`` is used up."""
        patience = self.settings.early_stop_patience
        return patience is not None and self.epochs_without_improvement >= patience

    def run_training(self) -> None:
        """Replaces nnUNetTrainer.run_training: the same calls in the same order, and between steps a look at signals and the stop file."""
        self.on_train_start()
        with StopRequest(Path(self.output_folder) / "stop") as self._stop:
            if self._random_states is not None and self.local_rank < len(self._random_states):
                randomness.set_random_state(self._random_states[self.local_rank], self.generator)
            while self.current_epoch < self.num_epochs and not self.stopped_early:
                self._run_epoch()
        if self.stopped_early:
            self.print_to_log_file(
                f"Early stop: {self.epochs_without_improvement} epochs without a better moving average of the pseudo Dice."
            )
        self.on_train_end()

    def _run_epoch(self) -> None:
        self.on_epoch_start()
        self.on_train_epoch_start()
        outputs: list[dict] = self._partial_epoch["outputs"] if self._partial_epoch else []
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

    def _next_batch(self, loader: Any, outputs: list[dict], state: dict | None = None) -> dict:
        try:
            return next(loader)
        except RuntimeError:
            # Ctrl-C and SLURM signal the loader's workers too, and they may die before we look
            self._stop_if_requested(outputs, state)
            raise

    def _stop_if_requested(self, outputs: list[dict], state: dict | None = None) -> None:
        assert self._stop is not None
        requested = self._stop.requested
        if self.is_ddp:  # all ranks must leave at the same step
            flag = torch.tensor(float(requested), device=self.device)
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            requested = bool(flag.item())
        if not requested:
            return
        self._partial_epoch = {"outputs": outputs}
        self._save_latest(self.current_epoch, state)
        if self.local_rank == 0:
            reason = self._stop.reason
            self._stop.stop_file.unlink(missing_ok=True)
            kept = "nothing was saved (--disable_checkpointing)" if self.disable_checkpointing else "checkpoint_latest.pth is written, --c continues"
            self.print_to_log_file(f"Stopped by {reason} in epoch {self.current_epoch} after {len(outputs)} training steps; {kept}.")
        for loader in (self.dataloader_train, self.dataloader_val):
            if hasattr(loader, "_finish"):
                loader._finish()
        raise SystemExit(self._stop.exit_code)

    def _gather(self, value: Any) -> list[Any]:
        if not self.is_ddp:
            return [value]
        values: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
        return values

    # ---- checkpoints ----------------------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """*Method hook.* What the method needs to continue, by method name; tensors and plain values."""
        return {}

    def load_method_state(self, states: dict[str, Any]) -> None:
        """*Method hook.* Counterpart of ``method_state``; the own name may be missing (a checkpoint of plain nnU-Net)."""

    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """*Method hook.* Weights that plain nnU-Net's network of the same plans loads, from a checkpoint of this trainer.

        Args:
            checkpoint: as read from the file.
            weights: which network; ``student`` is the one that was trained.

        Raises:
            ValueError: no such network.
        """
        if weights != "student":
            raise ValueError(f"{cls.__name__} has no {weights!r} weights to export; it has: student")
        return checkpoint["network_weights"]

    def save_checkpoint(self, filename: str) -> None:
        """Replaces nnUNetTrainer.save_checkpoint: its keys and ours, written atomically (temporary file, fsync, rename)."""
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
        # nnU-Net writes its dictionary straight to the file, so its keys are repeated here; a test compares them with upstream's
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
            model = type(self.settings)
            self._apply_settings(ext_settings.resume(model, extension["settings"], self.resolved, strict=self.is_continued))
        if not self.was_initialized:
            self.initialize()
        checkpoints.check_weights(checkpoint["network_weights"], self.network, path)
        super().load_checkpoint(str(path))
        if extension is None:
            self.print_to_log_file(f"{path} is a checkpoint of plain nnU-Net: the method's state starts fresh.")
            self.global_step = self.current_epoch * self.num_iterations_per_epoch
            self.load_method_state({})
            return
        self.global_step = extension["global_step"]
        self.epochs_without_improvement = extension["epochs_without_improvement"]
        self._train_cases = extension["train_cases"]
        self._partial_epoch = extension["partial_epoch"]
        self._random_states = extension["random_states"]
        self._log_state = extension["log"]
        self.load_method_state(extension["methods"])
