"""ExtTrainer: one training step as loss passes, and around it what every training needs (core/hooks.py)."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.compat import CLIP_NORM, clip_norm_in
from nnunetv2_ext.core.files import atomic_torch_save
from nnunetv2_ext.core.step import Batch, backward_passes
from nnunetv2_ext.core.trainer_checkpoints import TRAINING_MODULES
from nnunetv2_ext.core.trainer_loop import LoopTrainer
from nnunetv2_ext.core.training_modules import average_gradients, require_own_parameters, same_on_all_ranks

# Under AMP the GradScaler skips steps with non-finite gradients, which is normal now and then (its first scale, 2^16,
# can be halved 16 times in a row); more in a row are not, nor is a scale that has fallen this far: at 0 it lets a NaN
# through
MAX_NONFINITE_UNDER_AMP = 20
MIN_SCALE = 2.0**-10

DIVERGED = 10  # times the first epoch's training loss


class ExtTrainer(LoopTrainer):
    """Base of all our trainers: nnUNetTrainer with loss passes, settings, exact resume, logs and clean interruption.

    What a method overrides is in core/hooks.py.
    """

    last_batch: dict | None = None  # the loader's, on the CPU, for pictures
    _nonfinite_steps = 0
    _term_weights: Mapping[str, float] = MappingProxyType({})  # of each term, when it was last computed

    @cached_property
    def training_modules(self) -> dict[str, nn.Module]:  # type: ignore[override]
        """What ``build_training_modules`` returned, ready to train; built when the optimiser asks for it."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            modules = self.build_training_modules()
        require_own_parameters(modules, self.network, type(self).__name__)
        for name, module in modules.items():
            module = module.to(self.device)
            modules[name] = same_on_all_ranks(module) if self.is_ddp else module
            if self._do_i_compile():
                modules[name].compile()  # in place: the names of its weights stay
        return modules

    @property
    def total_steps(self) -> int:
        """T, the optimiser steps of the whole training."""
        return self.num_epochs * self.num_iterations_per_epoch

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's, or the base trainer's, with the training modules in a group of their own."""
        optimizer, scheduler = super().configure_optimizers(*args, **kwargs)
        parameters = [p for module in self.training_modules.values() for p in module.parameters()]
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if parameters and not self._group_is_aside and id(parameters[0]) not in known:
            optimizer.add_param_group({"params": parameters, "name": TRAINING_MODULES})
            if hasattr(scheduler, "base_lrs"):  # torch's own schedulers keep a rate per group from their start
                optimizer.param_groups[-1].setdefault("initial_lr", optimizer.param_groups[-1]["lr"])
                scheduler.base_lrs.append(scheduler.base_lrs[0])
        return optimizer, scheduler

    def trained_parameters(self) -> list[nn.Parameter]:
        """Of the network and of the training modules."""
        return [p for module in (self.network, *self.training_modules.values()) for p in module.parameters()]

    @cached_property
    def clip_norm(self) -> float:  # type: ignore[override]
        """Highest norm of the gradient: the setting, else the base trainer's."""
        if self.settings.clip_norm is not None:
            return self.settings.clip_norm
        mro = type(self).__mro__
        base: Any = next(c for c in mro[mro.index(ExtTrainer) + 1 :] if "train_step" in vars(c))
        norm = clip_norm_in(base.train_step)
        if norm is None:
            self.print_to_log_file(
                f"WARNING: {base.__name__}.train_step does not say at which norm gradients are clipped; "
                f"{CLIP_NORM} is taken, as in nnU-Net. The setting clip_norm says otherwise."
            )
        return CLIP_NORM if norm is None else norm

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; the training modules go into train mode with the network."""
        super().on_train_epoch_start()
        for module in self.training_modules.values():
            module.train()

    def on_validation_epoch_start(self) -> None:
        """nnU-Net's; the training modules go into eval mode with the network."""
        super().on_validation_epoch_start()
        for module in self.training_modules.values():
            module.eval()

    # ---- one step ----------------------------------------------------------------------------------------------------
    def train_step(self, batch: dict) -> dict:
        """Replaces nnUNetTrainer.train_step.

        All loss passes, then one unscale, clip, optimiser step, scaler update and ``after_step``.

        Returns:
            ``loss``, the supervised term as in a plain run, every named term, and ``grad_norm``; 0-dim arrays.

        Raises:
            ValueError: a term or the gradient is not finite; the weights are still those of the step before.
        """
        self.last_batch = batch
        on_device = self.on_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        weights: dict[str, float] = {}
        values = backward_passes(self.loss_passes(on_device), self.network, self.device, self.grad_scaler, weights)
        self._term_weights = {**self._term_weights, **weights}  # a term need not be in every step
        if self.is_ddp:
            average_gradients(self.training_modules.values())
        if self.grad_scaler is None:
            figures = self._read(values | {"grad_norm": self.clip_gradients()})
            self._require_finite(figures, on_device)
            self.optimizer.step()
        else:
            self.grad_scaler.unscale_(self.optimizer)
            norm = self.clip_gradients()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            figures = self._read(values | {"grad_norm": norm})  # waits for the device, after everything is queued
            self._require_finite(figures, on_device)
        self.after_step()
        self.global_step += 1
        return {"loss": figures.get("supervised", next(iter(figures.values()))), **figures}

    def on_device(self, batch: dict) -> Batch:
        """A loader's batch as the hooks want it."""
        return Batch.from_loader(batch, self.device, type(self).__name__)

    @staticmethod
    def _read(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
        host = torch.stack([value.float() for value in values.values()]).cpu().numpy()
        return {name: np.asarray(value) for name, value in zip(values, host, strict=True)}

    def _require_finite(self, figures: dict[str, np.ndarray], batch: Batch) -> None:
        # a term of weight 0 is only logged; nothing learns from it
        broken = [n for n, value in figures.items() if not np.isfinite(value) and self._term_weights.get(n, 1) != 0]
        self._nonfinite_steps = self._nonfinite_steps + 1 if broken else 0
        if not broken:
            return
        what = ", ".join(f"{name}={figures[name]}" for name in broken)
        what += f" at epoch {self.current_epoch}, step {self.global_step}, cases {', '.join(batch.keys)}"
        sick = [key for key, sample in zip(batch.keys, batch.data) if not bool(torch.isfinite(sample).all())]
        if sick:
            what += f" (NaN or infinite intensities in {', '.join(sick)})"
        elif self.grad_scaler is not None:  # it has skipped this step
            if broken != ["grad_norm"]:
                skipped = "step skipped, " if "grad_norm" in broken else ""
                self.print_to_log_file(f"WARNING: {skipped}not finite: {what}")
            if self._nonfinite_steps <= MAX_NONFINITE_UNDER_AMP and self.grad_scaler.get_scale() >= MIN_SCALE:
                return
        path = Path(self.output_folder) / "checkpoint_before_nan.pth"
        kept = "no checkpoint was written (--disable_checkpointing)"
        if not self.disable_checkpointing:  # by any rank: another one may not have met the broken batch
            kept = f"the weights from before this step are in {path}; renamed to checkpoint_latest.pth, --c starts the "
            kept += "epoch again with them"
            atomic_torch_save(self._checkpoint(self.current_epoch, None, self.first_step_of_epoch), path)
        message = f"not finite: {what}; {kept}. Check these cases for NaN or extreme intensities; else lower initial_lr"
        self.print_to_log_file(f"ERROR: {message}")
        raise ValueError(message)

    # ---- one epoch ---------------------------------------------------------------------------------------------------
    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """nnU-Net's, plus every named term's mean over the steps (and ranks) that had it."""
        names = dict.fromkeys(name for output in train_outputs for name in output if name != "loss")
        means: dict[str, float] = {}
        for name in names:
            values = np.array([output[name] for output in train_outputs if name in output], dtype=np.float64)
            finite = values[np.isfinite(values)]
            key = name if name == "grad_norm" else f"loss/{name}"
            means[key] = float(finite.mean()) if finite.size else float("nan")
        per_rank = self._gather(means)
        averaged = {name: float(np.mean([rank[name] for rank in per_rank if name in rank])) for name in means}
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        self._warn_of_divergence(self.logger.get_value("train_losses", step=None))
        if self.epoch_log is not None:
            self.epoch_log.without_weight = {f"loss/{name}" for name, w in self._term_weights.items() if w == 0}
            self.epoch_log.add(averaged | self._try_epoch_figures(), self.current_epoch)

    def _warn_of_divergence(self, losses: list[float]) -> None:
        # nnU-Net's loss starts at a few units and falls towards -1; a finite explosion passes _require_finite
        if losses[-1] > DIVERGED * max(1.0, losses[0]):
            self.print_to_log_file(
                f"WARNING: the training loss is {losses[-1]:.3g}, in the first epoch it was {losses[0]:.3g}: the "
                "training diverges; stop it and start again with a lower initial_lr"
            )

    def _try_epoch_figures(self) -> dict[str, float]:
        try:
            return self.epoch_figures()
        except Exception as error:  # out of memory, say: a figure must never end a training
            self.print_to_log_file(f"WARNING: the method's figures could not be taken: {type(error).__name__}: {error}")
            return {}

    def after_epoch(self, epoch: int) -> None:
        """The log's row, and every ``panel_every`` epochs (and after the last) the method's picture."""
        super().after_epoch(epoch)
        every = self.settings.panel_every
        due = every and (epoch % every == 0 or epoch + 1 == self.num_epochs)
        if not due or self.local_rank != 0 or self.last_batch is None:
            return
        state = randomness.get_random_state(self.generator)
        try:
            self.draw_panel(Path(self.output_folder) / f"panel_epoch_{epoch:04d}.png")
        except Exception as error:  # a picture must never end a training
            self.print_to_log_file(
                f"WARNING: the picture of epoch {epoch} could not be drawn: {type(error).__name__}: {error}"
            )
        finally:
            randomness.set_random_state(state, self.generator)
