"""A look at one sample: what student and teacher see, and how strongly each term pulls.

Everything runs on one sample, in eval mode and on the uncompiled student, so it costs a fraction of a step per epoch and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.medcontext.consistency import ramp

if TYPE_CHECKING:
    from nnunetv2_ext.medcontext.training import MedContextTraining


@dataclass
class Diagnosis:
    """One sample (B = 1) seen by student and teacher; logits ``(1, heads, *S)``, all detached.

    Attributes:
        batch: the sample; its data ``(1, C, *S)``.
        mask: bool ``(1, 1, *S)``, True = hidden.
        clean, masked, teacher: logits of the student on x, on m(x), and of the teacher on x (the student's own without a teacher).
        gradient_ratio: |d(beta ramp L_cons)| / |d(a L_masked)| over the student's parameters; NaN without a teacher.
    """

    batch: Batch
    mask: Tensor
    clean: Tensor
    masked: Tensor
    teacher: Tensor
    gradient_ratio: float


def diagnose(trainer: MedContextTraining, batch: Batch) -> Diagnosis:
    """Look at the sample of ``batch`` with the most foreground; the mask comes from a generator of its own, seeded by the step."""
    target = batch.top_target
    foreground = ((target > 0) & (target != (trainer.label_manager.ignore_label or -1))).flatten(1).sum(1)
    sample = batch.select([int(foreground.argmax())])
    student = unwrap(trainer.network)
    was_training = student.training
    student.eval()
    generator = trainer.generator
    trainer.generator = torch.Generator(trainer.device).manual_seed(trainer.global_step)
    try:
        with torch.enable_grad():
            return _diagnose(trainer, student, sample)
    finally:
        trainer.generator = generator
        student.train(was_training)


def _diagnose(trainer: MedContextTraining, student: torch.nn.Module, sample: Batch) -> Diagnosis:
    s = trainer.medcontext
    mask = trainer.draw_mask(sample.data.shape)
    on_gpu = trainer.device.type == "cuda"
    with torch.autocast(trainer.device.type, enabled=on_gpu):
        with torch.no_grad():
            clean = _top(trainer.forward(sample, student))
            teacher = clean if trainer.teacher is None else _top(trainer.forward(sample, trainer.teacher))
        output = trainer.forward(sample.with_data(trainer.hide(sample.data, mask)), student)
        masked = _top(output)
        ratio = float("nan")
        if trainer.teacher is not None and s.supervised_weight > 0:
            weight = s.beta * ramp(max(0, trainer.global_step - 1), trainer.total_steps, s.ramp_fraction)
            consistency = weight * trainer.consistency(teacher, masked, sample)
            supervised = s.supervised_weight * trainer.loss(output, sample.target)
            parameters = [p for p in student.parameters() if p.requires_grad]
            ratio = _gradient_norm(consistency, parameters, trainer) / max(
                _gradient_norm(supervised, parameters, trainer), 1e-12
            )
    return Diagnosis(sample, mask, clean.detach().float(), masked.detach().float(), teacher.detach().float(), ratio)


def _gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter], trainer: MedContextTraining) -> float:
    # scaled as in training: small gradients would vanish in half precision. torch.autograd.grad leaves .grad and DDP's hooks alone
    scale = 1.0 if trainer.grad_scaler is None else float(trainer.grad_scaler.get_scale())
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) / scale if norms else 0.0


def _top(output: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, (list, tuple)) else output
