"""A look at one sample: what student and teacher see, and how strongly each term pulls.

Everything runs on one sample, in eval mode and on the uncompiled networks. A look costs a fraction of a step per epoch
and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.labelmaps import logits_to_labels, target_to_labels
from nnunetv2_ext.core.step import Batch, top_resolution
from nnunetv2_ext.parts.consistency import disagreement
from nnunetv2_ext.parts.ramps import ramp

if TYPE_CHECKING:
    from nnunetv2_ext.medcontext.training import MedContextTraining


@dataclass(frozen=True)
class Diagnosis:
    """One sample seen by student and teacher, on the CPU: logits kept until the next epoch would cost GPU memory.

    Attributes:
        case: its case id.
        image: first channel, ``(*S)``.
        hidden: bool ``(*S)``, the mask m.
        target, clean, masked, teacher: label maps ``(*S)`` of the target (None of an unlabelled patch), of the student
            on x and on m(x), and of the teacher on x (None without a teacher). Numbered as in core/labelmaps.py.
        gradient_ratio: |d(beta ramp L_cons)| / |d(a L_clean)| over the student's parameters; NaN without a teacher,
            if a is 0, of an unlabelled patch, and under DDP.
        disagreement: share of voxels, 0..1, that the teacher on x and the student on m(x) label differently; NaN
            without a teacher.
    """

    case: str
    image: npt.NDArray[Any]
    hidden: npt.NDArray[np.bool_]
    target: npt.NDArray[Any] | None
    clean: npt.NDArray[Any]
    masked: npt.NDArray[Any]
    teacher: npt.NDArray[Any] | None
    gradient_ratio: float
    disagreement: float


def diagnose(trainer: MedContextTraining, batch: Batch) -> Diagnosis:
    """Look at the sample of ``batch`` with the most foreground; the mask's generator is its own, seeded by the step."""
    sample = batch.select([int(_foreground(trainer, batch.top_target).argmax())])
    with _looking(trainer) as student, torch.enable_grad():
        return _diagnose(trainer, student, sample)


@torch.no_grad()
def diagnose_unlabelled(trainer: MedContextTraining, batch: Batch) -> Diagnosis:
    """The same of the unlabelled patch in which the teacher finds most; without gradients.

    Args:
        trainer: it has a teacher.
        batch: ``batch.stream()`` of a training batch.
    """
    assert trainer.teacher is not None
    labels = trainer.label_manager
    with _looking(trainer) as student, _autocast(trainer):
        seen = top_resolution(trainer.forward(batch, trainer.teacher.module.forward))
        found = np.stack([logits_to_labels(logits, labels) for logits in seen])
        row = int((found > 0).reshape(len(found), -1).sum(1).argmax())
        patch = Batch(batch.data[[row]], [], (batch.keys[row],), owner=batch.owner)
        mask = trainer.draw_mask(patch.data.shape)
        clean = top_resolution(trainer.forward(patch, student))
        masked = top_resolution(trainer.forward(patch.with_data(trainer.hide(patch.data, mask)), student))
    return Diagnosis(
        case=patch.keys[0],
        image=patch.data[0, 0].float().cpu().numpy(),
        hidden=mask[0, 0].cpu().numpy(),
        target=None,
        clean=logits_to_labels(clean[0], labels),
        masked=logits_to_labels(masked[0], labels),
        teacher=found[row],
        gradient_ratio=float("nan"),
        disagreement=float(disagreement(seen[[row]], masked, labels.has_regions)),
    )


@contextmanager
def _looking(trainer: MedContextTraining) -> Iterator[torch.nn.Module]:
    """The uncompiled student in eval mode; the trainer's generator is one of the step's own."""
    student = unwrap(trainer.network)
    was_training, generator = student.training, trainer.generator
    student.eval()
    trainer.generator = torch.Generator(trainer.device).manual_seed(trainer.global_step)
    try:
        yield student
    finally:
        trainer.generator = generator
        student.train(was_training)


def _foreground(trainer: MedContextTraining, target: Tensor) -> Tensor:
    """Annotated foreground voxels per sample, (B,), of a target (B, 1 or regions, *S)."""
    labels = trainer.label_manager
    foreground = target > 0
    if labels.ignore_label is not None:
        # with regions the last channel is the ignore map
        foreground = foreground[:, :-1] if labels.has_regions else foreground & (target != labels.ignore_label)
    return foreground.flatten(1).sum(1)


def _diagnose(trainer: MedContextTraining, student: torch.nn.Module, sample: Batch) -> Diagnosis:
    s, labels = trainer.medcontext, trainer.label_manager
    mask = trainer.draw_mask(sample.data.shape)
    parameters = [p for p in student.parameters() if p.requires_grad]
    with _autocast(trainer):
        output = trainer.forward(sample, student)
        clean = top_resolution(output).detach()
        # not under DDP: nnU-Net's batch Dice talks to the other ranks, who may not be here
        compare = trainer.teacher is not None and s.supervised_weight > 0 and not trainer.is_ddp
        supervised = 0.0
        if compare:
            supervised = _gradient_norm(s.supervised_weight * trainer.loss(output, sample.target), parameters, trainer)
        del output
    teacher = None
    if trainer.teacher is not None:
        with torch.no_grad(), _autocast(trainer):
            # .forward: the compiled call would build another graph for a batch of one
            teacher = top_resolution(trainer.forward(sample, trainer.teacher.module.forward))
    # a block of its own: after a no_grad forward of the same network in the same autocast block, older torch finds its
    # weights cast without gradient (pytorch/pytorch#112583)
    with _autocast(trainer):
        output = trainer.forward(sample.with_data(trainer.hide(sample.data, mask)), student)
        masked = top_resolution(output)
        ratio = share = float("nan")
        if teacher is not None:
            share = float(disagreement(teacher, masked.detach(), labels.has_regions))
        if teacher is not None and compare:
            weight = s.beta * ramp(max(0, trainer.global_step - 1), trainer.total_steps, s.ramp_fraction)
            consistency = weight * trainer.consistency(teacher, masked, trainer.valid_voxels(sample))
            ratio = _gradient_norm(consistency, parameters, trainer) / max(supervised, 1e-12)
    return Diagnosis(
        case=sample.keys[0],
        image=sample.data[0, 0].float().cpu().numpy(),
        hidden=mask[0, 0].cpu().numpy(),
        target=target_to_labels(sample.top_target[0], labels),
        clean=logits_to_labels(clean[0], labels),
        masked=logits_to_labels(masked[0].detach(), labels),
        teacher=None if teacher is None else logits_to_labels(teacher[0], labels),
        gradient_ratio=ratio,
        disagreement=share,
    )


def _autocast(trainer: MedContextTraining) -> AbstractContextManager[Any]:
    """As in training: CUDA only."""
    return torch.autocast("cuda") if trainer.device.type == "cuda" else nullcontext()


def _gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter], trainer: MedContextTraining) -> float:
    # scaled as in training: small gradients would vanish in half precision. torch.autograd.grad leaves .grad and DDP's
    # hooks alone
    scale = 1.0 if trainer.grad_scaler is None else float(trainer.grad_scaler.get_scale())
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) / scale if norms else 0.0
