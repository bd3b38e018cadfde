"""The teacher: an exponential moving average of the student."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class EMATeacher:
    """A frozen copy of the student that follows it as a moving average and predicts its soft targets.

    Not an `nn.Module`, so that assigning it to a trainer or network never registers its weights anywhere. It always
    runs in eval mode, without gradient, with fp32 weights (a half-precision average stalls: with 1 - m = 0.002 a weight
    of 1.0 pulled towards 1.1 never moves) and without deep supervision outputs. A module with a true attribute
    `shared_by_copies` (a store of data, not of weights) is the student's own in the teacher as well.

    Args:
        student: the unwrapped network: not the `DistributedDataParallel` or `torch.compile` wrapper around it.

    Attributes:
        module: the teacher network; `module.state_dict()` has the student's keys.

    Raises:
        ValueError: the student is wrapped.
    """

    def __init__(self, student: nn.Module) -> None:
        _refuse_wrapped(student)
        shared = _shared_modules(student)
        self.module: nn.Module = copy.deepcopy(student, {id(module): module for module in shared})
        self.module.float().eval().requires_grad_(False)
        decoder = getattr(self.module, "decoder", None)
        if decoder is not None and hasattr(decoder, "deep_supervision"):  # nnU-Net's set_deep_supervision_enabled
            decoder.deep_supervision = False
        self._parameters: list[torch.Tensor] = list(self.module.parameters())
        self._buffers = list(_own_buffers(self.module).values())
        self._student: nn.Module | None = None  # -> _bind

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Top-resolution logits `(B, C, *S)` of a clean batch `(B, C_in, *S)`.

        `no_grad`, not `inference_mode`: the result meets autograd in the loss, which refuses inference tensors.
        """
        output = self.module(x)
        # only a list is a list of resolutions; indexing a tensor would pick the first sample of the batch
        return output[0] if isinstance(output, (list, tuple)) else output

    @torch.no_grad()
    def update(self, student: nn.Module, m: float) -> None:
        """theta_teacher += (1 - m) (theta_student - theta_teacher) for all parameters; buffers are copied.

        Two calls for whole lists and no wait for the device. The tensors of both networks are listed and compared once
        per student object: after replacing parameters inside it, call `copy_from`, which lists them anew.

        Raises:
            ValueError: m outside 0..1, or another architecture than the teacher's.
        """
        if not 0.0 <= m <= 1.0:  # also refuses nan
            raise ValueError(f"the momentum m must lie between 0 and 1, not {m}")
        if student is not self._student:
            self._bind(student)
        source = self._student_parameters
        if not self._same_dtype:
            source = [s.to(t.dtype) for s, t in zip(source, self._parameters)]
        torch._foreach_lerp_(self._parameters, source, 1.0 - m)
        self._copy_buffers()

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Make the teacher equal to the student: parameters and buffers.

        Raises:
            ValueError: another architecture than the teacher's, or a wrapped student.
        """
        self._bind(student)
        torch._foreach_copy_(self._parameters, self._student_parameters)
        self._copy_buffers()

    def state_dict(self) -> dict[str, Any]:
        """The teacher network's state, with the student's keys; its tensors are the live ones, not copies."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            ValueError: the state belongs to another architecture.
        """
        try:
            self.module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the stored teacher does not fit this network ({reason}): continue with the plans and "
                "settings the checkpoint was trained with"
            ) from error

    def _copy_buffers(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._student_buffers)

    def _bind(self, student: nn.Module) -> None:
        _refuse_wrapped(student)
        _compare("parameter", dict(self.module.named_parameters()), dict(student.named_parameters()))
        _compare("buffer", _own_buffers(self.module), _own_buffers(student))
        self._student_parameters: list[torch.Tensor] = list(student.parameters())
        self._student_buffers = list(_own_buffers(student).values())
        self._same_dtype = all(s.dtype == t.dtype for s, t in zip(self._student_parameters, self._parameters))
        self._student = student


def _shared_modules(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if getattr(module, "shared_by_copies", False)]


def _own_buffers(network: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers by name, without those of shared modules, which may be large and of changing size."""
    shared = {id(buffer) for module in _shared_modules(network) for buffer in module.buffers()}
    return {name: buffer for name, buffer in network.named_buffers() if id(buffer) not in shared}


def _compare(what: str, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    teacher, student = ({name: tuple(t.shape) for name, t in some.items()} for some in (ours, theirs))
    # order counts as well: the update pairs the two lists by position
    if list(teacher.items()) == list(student.items()):
        return
    name = next((n for n in [*teacher, *student] if teacher.get(n) != student.get(n)), next(iter(teacher)))
    raise ValueError(
        f"teacher and student differ in {what} '{name}': teacher {teacher.get(name, 'has none')}, "
        f"student {student.get(name, 'has none')} ({len(teacher)} against {len(student)} in all): "
        "build the teacher from the network that is trained"
    )


def _refuse_wrapped(student: nn.Module) -> None:
    if hasattr(student, "_orig_mod") or isinstance(student, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"the teacher needs the unwrapped network, not {type(student).__name__}: "
            "give .module of a DistributedDataParallel and ._orig_mod of a compiled network"
        )
