"""nnU-Net's learning-rate schedule for parameter groups of different rates."""

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class ScaledPolyLR(PolyLRScheduler):
    """nnU-Net's schedule, times each group's `lr_scale`; nnU-Net's own writes one rate into all groups."""

    def step(self, current_step: int | None = None) -> None:
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
