"""ExtTrainer: one training step as loss passes, and the hooks a method overrides.

A method subclasses it once (in its own package), overrides the few hooks marked *method hook*, always calling
``super()``, and can then be combined with another method by inheriting from both. nnU-Net's own hooks stay what they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.files import atomic_torch_save
from nnunetv2_ext.core.step import Batch, LossPass, Term, backward_passes
from nnunetv2_ext.core.trainer_loop import ResumableTrainer

# Under AMP the GradScaler skips steps with non-finite gradients, which is normal now and then (its first scale, 2^16,
# can be halved 16 times in a row); more in a row are not, nor is a scale that has fallen this far: at 0 it lets a NaN
# through
MAX_NONFINITE_UNDER_AMP = 20
MIN_SCALE = 2.0**-10

DIVERGED = 10  # times the first epoch's training loss


class ExtTrainer(ResumableTrainer):
    """Base of all our trainers: nnUNetTrainer with loss passes, settings, exact resume, logs and clean interruption.

    Further *method hooks* are ``method_settings`` and ``default_settings`` (core/trainer_settings.py),
    ``method_state``, ``load_method_state`` and ``export_weights`` (core/trainer_checkpoints.py).
    """

    last_batch: dict | None = None  # the loader's, on the CPU, for pictures
    _nonfinite_steps = 0
    _term_weights: Mapping[str, float] = MappingProxyType({})  # of each term, when it was last computed

    # ---- one step ----------------------------------------------------------------------------------------------------
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
        """*Method hook.* The passes of this step.

        Methods put theirs before the supervised one, which stays last and is nnU-Net's own.
        """
        return [LossPass("supervised", lambda: {"supervised": Term(self.loss(self.forward(batch), batch.target))})]

    def clip_gradients(self) -> Tensor:
        """*Method hook.* Clip after unscaling, as nnU-Net: total norm 12. Returns the norm before clipping, 0-dim."""
        return nn.utils.clip_grad_norm_(self.network.parameters(), 12)

    def after_step(self) -> None:
        """*Method hook.* Called after the optimiser step, also when the scaler skipped it.

        ``global_step`` is still this step's.
        """

    def train_step(self, batch: dict) -> dict:
        """Replaces nnUNetTrainer.train_step.

        All loss passes, then one unscale, clip, optimiser step, scaler update and ``after_step``.

        Returns:
            ``loss``, the supervised term as in a plain run, every named term, and ``grad_norm``; 0-dim arrays.

        Raises:
            ValueError: a term or the gradient is not finite; the weights are still those of the step before.
        """
        self.last_batch = batch
        on_device = Batch.from_loader(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        weights: dict[str, float] = {}
        values = backward_passes(self.loss_passes(on_device), self.network, self.device, self.grad_scaler, weights)
        self._term_weights = {**self._term_weights, **weights}  # a term need not be in every step
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
    def epoch_figures(self) -> dict[str, float]:
        """*Method hook.* Figures of the finished epoch for the log, named ``method/figure``.

        Called with the training part done.
        """
        return {}

    def draw_panel(self, path: Path) -> None:
        """*Method hook.* Draw what the method does with ``last_batch`` to ``path`` (PNG).

        Must not touch global random state.
        """

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """nnU-Net's, plus every named term's mean over the steps (and ranks) that had it."""
        names = dict.fromkeys(name for output in train_outputs for name in output if name != "loss")
        means: dict[str, float] = {}
        for name in names:
            values = np.array([output[name] for output in train_outputs if name in output], dtype=np.float64)
            finite = values[np.isfinite(values)]
            means[name if name == "grad_norm" else f"loss/{name}"] = (
                float(finite.mean()) if finite.size else float("nan")
            )
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
