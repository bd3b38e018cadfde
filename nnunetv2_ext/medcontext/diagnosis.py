"""A look at one sample: what student and teacher see, how strongly each term pulls, and the picture of it.

Everything runs on one sample, in eval mode and on the uncompiled student, so it costs a fraction of a step per epoch and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.overlay import draw_slice, fullest_slice, label_colours, take_slice
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.medcontext.consistency import ramp

if TYPE_CHECKING:
    from nnunetv2_ext.medcontext.training import MedContextTraining

HIDDEN_COLOUR = (0.55, 0.0, 0.75)


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
            ratio = _gradient_norm(consistency, parameters, trainer) / max(_gradient_norm(supervised, parameters, trainer), 1e-12)
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


def draw_diagnosis(result: Diagnosis, path: Path, title: str, dataset_json: dict, labels: LabelManager) -> None:
    """Write the picture: columns image, mask, target, student on x, student on m(x), teacher on x; a row per axis (3-D) or one (2-D)."""
    image = result.batch.data[0, 0].float().cpu().numpy()
    hidden = result.mask[0, 0].cpu().numpy()
    target = _target_map(result.batch.top_target[0], labels)
    maps = {
        "target": target,
        "student, whole patch": _label_map(result.clean[0], labels),
        "student, masked patch": _label_map(result.masked[0], labels),
        "teacher, whole patch": _label_map(result.teacher[0], labels),
    }
    classes = _class_names(dataset_json, labels)
    axes_to_cut = range(3) if image.ndim == 3 else [None]
    rows = len(axes_to_cut)
    figure = Figure(figsize=(2.35 * 6, 2.5 * rows + 1.0), layout="constrained")
    figure.suptitle(f"{title}: {result.batch.keys[0]}, patch {' x '.join(map(str, image.shape))}, {hidden.mean():.0%} hidden")
    grid = figure.subplots(rows, 6, squeeze=False)
    window = tuple(np.percentile(image, (1, 99.5)))
    for row, axis in zip(grid, axes_to_cut, strict=True):
        index = None if axis is None else fullest_slice(target, axis)

        def cut(volume: np.ndarray, axis: int | None = axis, index: int | None = index) -> np.ndarray:
            return volume.T if axis is None or index is None else take_slice(volume, axis, index)

        position = "2-D patch" if axis is None else f"axis {axis}, slice {index}"
        draw_slice(row[0], cut(image), window=window, title=f"image ({position})")
        draw_slice(row[1], cut(image), window=window, title="what the student sees")
        overlay = np.zeros((*cut(hidden).shape, 4))
        overlay[cut(hidden)] = (*HIDDEN_COLOUR, 1.0)
        row[1].imshow(overlay, origin="lower", interpolation="nearest")
        for cell, (name, label) in zip(row[2:], maps.items(), strict=True):
            draw_slice(cell, cut(image), cut(label), classes, window=window, title=name)
    handles = [Patch(color=colour, label=classes[value]) for value, colour in label_colours(classes).items()]
    handles.append(Patch(color=HIDDEN_COLOUR, label="hidden from the student"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False)
    figure.savefig(path, dpi=110)


def _class_names(dataset_json: dict, labels: LabelManager) -> dict[int, str]:
    names = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    if labels.has_regions:  # drawn in head order, later regions over earlier ones
        classes = dict(enumerate(names, 1))
    else:
        classes = {int(value): name for name, value in dataset_json["labels"].items() if name in names}
    if labels.ignore_label is not None:
        classes[int(labels.ignore_label) if not labels.has_regions else len(names) + 1] = "ignore"
    return classes


def _label_map(logits: Tensor, labels: LabelManager) -> np.ndarray:
    """(heads, *S) to one value per voxel: the class, or 1 + index of the last region that contains the voxel."""
    if not labels.has_regions:
        return logits.argmax(0).cpu().numpy()
    return _last_region((logits > 0).cpu().numpy())


def _target_map(target: Tensor, labels: LabelManager) -> np.ndarray:
    if not labels.has_regions:
        return target[0].cpu().numpy()
    return _last_region((target > 0).cpu().numpy())


def _last_region(regions: np.ndarray) -> np.ndarray:
    result = np.zeros(regions.shape[1:], dtype=np.int64)
    for number, region in enumerate(regions, 1):
        result[region] = number
    return result
