"""TeacherTraining: the life of a moving-average teacher, for methods that have one."""

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.step import top_resolution
from nnunetv2_ext.parts.ramps import momentum
from nnunetv2_ext.parts.teacher import EMATeacher
from nnunetv2_ext.parts.trainer import MethodTrainer


class TeacherTraining(MethodTrainer):
    """Makes ``self.teacher``, lets it follow the network after each step, saves it and takes it up again.

    Its pseudo Dice is logged as ``teacher/pseudo_dice`` beside the network's, of the same validation patches.

    The teacher is an attribute of the trainer, not a part of the network, and travels in the checkpoint under the
    extension's key. Its forward is ``self.forward(batch, self.teacher)``.
    """

    teacher_state: ClassVar[str] = "teacher"  # its key in method_state; combined methods share one teacher

    teacher: EMATeacher | None = None  # -> initialize; none without `wants_teacher`
    _teacher_is_loaded = False
    _teacher_counts: npt.NDArray[Any] | None = None  # (3, structures): tp, fp and fn of the validation under way

    @property
    def wants_teacher(self) -> bool:
        """Whether the settings need one."""
        return True

    def teacher_momentum(self, step: int) -> float:
        """m(t) of the update after global step ``step``."""
        return momentum(step, self.total_steps)

    def initialize(self) -> None:
        """After nnU-Net's: DDP's constructor broadcasts rank 0's weights, so the teacher is copied from the result."""
        super().initialize()
        if self.wants_teacher:
            self.teacher = EMATeacher(unwrap(self.network))
            if self._do_i_compile():
                self.teacher.module.compile()  # in place: unlike torch.compile it keeps the state's keys

    def on_train_start(self) -> None:
        """After nnU-Net's: ``-pretrained_weights`` were loaded since initialize, so a fresh teacher is copied now."""
        super().on_train_start()
        if self.teacher is not None and not self._teacher_is_loaded:
            self.teacher.copy_from(unwrap(self.network))

    def on_train_end(self) -> None:
        """After the final checkpoint the teacher is no longer needed; validation gets its memory."""
        super().on_train_end()
        self.teacher = None

    def after_step(self) -> None:
        """The moving average follows the student, also on steps that the scaler skipped."""
        super().after_step()
        if self.teacher is not None:
            self.teacher.update(unwrap(self.network), self.teacher_momentum(self.global_step))

    # ---- its own score -----------------------------------------------------------------------------------------------
    def on_validation_epoch_start(self) -> None:
        """nnU-Net's."""
        super().on_validation_epoch_start()
        self._teacher_counts = None

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's; before it the same is asked of the teacher."""
        if self.teacher is not None:
            counts = self._counts_of_teacher(batch)
            self._teacher_counts = counts if self._teacher_counts is None else self._teacher_counts + counts
        return super().validation_step(batch)

    def _counts_of_teacher(self, batch: dict) -> npt.NDArray[Any]:
        """tp, fp and fn of each structure, (3, structures), by nnU-Net's own step with the teacher as its network."""
        teacher, target = self.teacher, batch["target"]
        assert teacher is not None
        network, loss = self.network, self.loss
        # nnU-Net writes into the target where the dataset has an ignore label
        copied = [t.clone() for t in target] if isinstance(target, list) else target.clone()
        self.network = lambda data: [teacher(data)] if self.enable_deep_supervision else teacher(data)  # type: ignore[assignment]
        self.loss = lambda output, _: top_resolution(output).new_zeros(())  # type: ignore[assignment]
        try:
            found = super().validation_step({**batch, "target": copied})
        finally:
            self.network, self.loss = network, loss
        return np.stack([found[name] for name in ("tp_hard", "fp_hard", "fn_hard")]).astype(float)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """nnU-Net's; then the teacher's pseudo Dice is logged, the mean over the structures that occur."""
        super().on_validation_epoch_end(val_outputs)
        parts = [counts for counts in self._gather(self._teacher_counts) if counts is not None]
        if not parts or self.epoch_log is None:
            return
        tp, fp, fn = np.sum(parts, 0)
        with np.errstate(invalid="ignore"):
            dice = 2 * tp / (2 * tp + fp + fn)
        if not np.isnan(dice).all():
            self.epoch_log.add({"teacher/pseudo_dice": float(np.nanmean(dice))}, self.current_epoch)

    # ---- checkpoint --------------------------------------------------------------------------------------------------
    def method_state(self) -> dict[str, Any]:
        """Adds the teacher. Its step is the trainer's global_step; T follows from the settings."""
        state = super().method_state()
        if self.teacher is not None:
            state[self.teacher_state] = {"teacher": self.teacher.state_dict(), "total_steps": self.total_steps}
        return state

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Takes the teacher from the checkpoint; without one (plain nnU-Net) it starts as a copy of the student."""
        super().load_method_state(states)
        if self.teacher is None:  # it was freed by on_train_end, and --val_best loads a checkpoint
            return
        state = states.get(self.teacher_state)
        if state is None:
            self.teacher.copy_from(unwrap(self.network))
            self.print_to_log_file("The checkpoint has no teacher; it starts as a copy of the network.")
        else:
            self.teacher.load_state_dict(state["teacher"])
            if state["total_steps"] != self.total_steps:
                self.print_to_log_file(
                    f"The training's length changes from {state['total_steps']} to {self.total_steps} steps; "
                    "ramp and momentum follow."
                )
        self._teacher_is_loaded = True
