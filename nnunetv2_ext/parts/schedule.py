"""nnU-Net's learning-rate schedule for parameter groups of different rates, with a warm-up."""

from typing import Any

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class ScaledPolyLR(PolyLRScheduler):
    """nnU-Net's schedule, times each group's `lr_scale`; nnU-Net's own writes one rate into all groups.

    Args:
        warmup: steps (here epochs) in which the rate rises linearly to the initial one; the decay has the rest.
    """

    ctr: int  # steps counted by the base class

    def __init__(self, optimizer: Any, initial_lr: float, max_steps: int, warmup: int = 0) -> None:
        self.warmup = warmup
        super().__init__(optimizer, initial_lr, max_steps)

    def step(self, current_step: int | None = None) -> None:
        if current_step is None or current_step == -1:
            current_step, self.ctr = self.ctr, self.ctr + 1
        if current_step < self.warmup:
            rate = self.initial_lr * (current_step + 1) / self.warmup
        else:
            share = (current_step - self.warmup) / (self.max_steps - self.warmup)
            rate = self.initial_lr * (1 - share) ** self.exponent
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
