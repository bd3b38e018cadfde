"""A look at one sample: what student and teacher see, and how strongly each term pulls.

Everything runs on one sample, in eval mode and on the uncompiled student, so it costs a fraction of a step per epoch and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.labelmaps import logits_to_labels, target_to_labels
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.medcontext.consistency import disagreement, ramp

if TYPE_CHECKING:
    from nnunetv2_ext.medcontext.training import MedContextTraining


@dataclass
class Diagnosis:
    """One sample seen by student and teacher; label maps ``S`` on the CPU, numbered as in core/labelmaps.py.

    Attributes:
        case: its case id.
        image: first channel, ``S``.
        hidden: bool ``S``.
        target, clean, masked, teacher: the truth, the student on x and on m(x), the teacher on x (the student's own without one).
        disagreement: share of voxels that the teacher on x and the student on m(x) label differently.
        gradient_ratio: |d(beta ramp L_cons)| / |d(a L_masked)| over the student's parameters; NaN without a teacher.
    """

    case: str
    image: np.ndarray
    hidden: np.ndarray
    target: np.ndarray
    clean: np.ndarray
    masked: np.ndarray
    teacher: np.ndarray
    disagreement: float
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
    labels = trainer.label_manager
    return Diagnosis(
        case=sample.keys[0],
        image=sample.data[0, 0].float().cpu().numpy(),
        hidden=mask[0, 0].cpu().numpy(),
        target=target_to_labels(sample.top_target[0], labels),
        clean=logits_to_labels(clean[0], labels),
        masked=logits_to_labels(masked[0].detach(), labels),
        teacher=logits_to_labels(teacher[0], labels),
        disagreement=float(disagreement(teacher, masked, labels.has_regions)),
        gradient_ratio=ratio,
    )


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
