"""Consistency between teacher and student predictions of the same patch, in the output segmentation space.

The teacher saw the whole patch, the student a masked one. Targets are constants: no gradient reaches the teacher.
All four kinds share one autograd function with a closed-form gradient. Plain autograd would keep two or three fp32
tensors of the size of the logits alive until the backward pass: 1.76 GB each for 105 classes, B=2, 128^3.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Consistency = Literal["prob_mse", "kl", "relative_logits", "logits_over_norm"]

# Elements of one work piece: 64 MiB per fp32 temporary, large enough to keep a GPU busy.
_PIECE_ELEMENTS = 2**24
# Smallest accepted (squared) norm of teacher logits: all-zero targets then give a finite loss.
_TINY = 1e-6


def consistency_loss(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    valid: torch.Tensor | None,
    kind: Consistency = "prob_mse",
    regions: bool = False,
) -> torch.Tensor:
    """How far the student's prediction is from the teacher's, averaged over the valid voxels.

    With p the softmax of the logits (sigmoid for regions), t teacher, s student, v the valid mask, x voxels:

    - `prob_mse`: sum_bx v sum_c (p_t - p_s)^2 / max(1, sum_bx v); range 0..2, or 0..C for regions. Mean Teacher's form.
    - `kl`: the same average of sum_c p_t (log p_t - log p_s); for regions the two-state divergence of each, summed.
    - `relative_logits`: mean over samples of sum_x v |z_t - z_s|^2 / max(sum_x v |z_t|^2, 1e-6); samples without a
      valid voxel are left out.
    - `logits_over_norm`: mean of (z_t - z_s)^2 over valid voxels and channels, divided by the L2 norm of all valid
      teacher logits. It is what the released MedContext code computes, shrinks with the number of voxels, and is kept
      for ablation only (https://github.com/hananshafi/MedContext).

    The first three depend neither on the number of voxels nor of samples. Arithmetic is fp32 (fp64 for fp64 logits)
    with autocast off; the tensor kept for the backward pass has the student logits' dtype.

    Args:
        teacher_logits: `(B, C, *S)`, any float dtype; treated as a constant.
        student_logits: `(B, C, *S)`.
        valid: bool or 0/1 `(B, 1, *S)`, True where the term counts; None for everywhere.
        kind: see above.
        regions: the heads are overlapping regions (sigmoid), not classes.

    Returns:
        0-dim tensor, differentiable once with respect to the student logits; 0 if no voxel is valid.

    Raises:
        ValueError: unknown kind, or shapes that do not fit.
    """
    if kind not in get_args(Consistency):
        raise ValueError(f"unknown consistency {kind!r}: choose one of {', '.join(get_args(Consistency))}")
    if teacher_logits.shape != student_logits.shape or student_logits.ndim < 3:
        raise ValueError(
            f"teacher logits {tuple(teacher_logits.shape)} and student logits {tuple(student_logits.shape)} "
            "must have the same shape (B, C, *S)"
        )
    if valid is not None:
        given, shape = tuple(valid.shape), tuple(student_logits.shape)
        if given != (shape[0], 1, *shape[2:]):
            raise ValueError(f"valid mask {given} does not fit logits {shape}: expected (B, 1, *S)")
        valid = valid.bool()
    with _no_autocast(student_logits.device.type):
        loss: torch.Tensor = _ClosedForm.apply(student_logits, teacher_logits.detach(), valid, kind, regions)
    return loss


def valid_mask(target_top: torch.Tensor, ignore_label: int | None, has_regions: bool) -> torch.Tensor | None:
    """Voxels that carry an annotation, from the top-resolution target.

    Args:
        target_top: `(B, 1, *S)` labels, or with regions `(B, R + 1, *S)` bool or 0/1, whose last channel is nnU-Net's
            ignore map. With deep supervision: the first entry of the list.
        ignore_label: the dataset's ignore label, None if it has none.
        has_regions: the dataset is trained with regions.

    Returns:
        bool `(B, 1, *S)`, True = annotated; None if the dataset has no ignore label (every voxel counts).
    """
    if ignore_label is None:
        return None
    return target_top[:, -1:] == 0 if has_regions else target_top[:, :1] != ignore_label


@torch.no_grad()
def disagreement(teacher_logits: torch.Tensor, student_logits: torch.Tensor, regions: bool = False) -> torch.Tensor:
    """Share of voxels that teacher and student label differently, 0..1, as a 0-dim fp32 tensor on their device.

    Classes: the most probable class differs. Regions: any region is on one side of 0.5 for one and not for the other.
    Logits are `(B, C, *S)`.

    Raises:
        ValueError: shapes that differ.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"shapes differ: teacher {tuple(teacher_logits.shape)}, student {tuple(student_logits.shape)}")
    if regions:
        return ((teacher_logits > 0) != (student_logits > 0)).any(dim=1).float().mean()
    # on a CPU max takes a tenth of argmax's time
    return (teacher_logits.max(1).indices != student_logits.max(1).indices).float().mean()


class _ClosedForm(torch.autograd.Function):
    """The losses above, saving `unit` (B, C, *S) and `scale` (B,) with gradient = unit * scale.

    The division by the number of voxels stays in `scale`: 1/N is about 1e-7 for a batch of 128^3 patches and would
    vanish in a half-precision `unit`, before the gradient scaler's factor arrives with the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        valid: torch.Tensor | None,
        kind: str,
        regions: bool,
    ) -> torch.Tensor:
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        wants_grad = ctx.needs_input_grad[0]
        unit = torch.empty_like(student) if wants_grad else None
        value = torch.zeros(len(student), dtype=dtype, device=student.device)
        norm = torch.zeros_like(value)
        for piece in _pieces(student.shape):
            hidden = None if valid is None else ~valid[piece]
            part = _Piece(teacher[piece].to(dtype), student[piece].to(dtype), hidden)
            gradient = part.compute(kind, regions, wants_grad)
            value[piece[0]] += part.value
            norm[piece[0]] += part.norm
            if unit is not None and gradient is not None:
                unit[piece] = gradient

        if valid is None:
            count = torch.full_like(value, math.prod(student.shape[2:]))
        else:
            count = valid.flatten(1).sum(1).to(dtype)
        scale = _scales(kind, count, norm, student.shape[1])
        if unit is not None:
            ctx.save_for_backward(unit, scale)
        return (value * scale).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        unit, scale = ctx.saved_tensors
        factor = (scale * grad_outputs[0]).view(-1, *[1] * (unit.ndim - 1))
        if unit.dtype == factor.dtype:
            return unit * factor, None, None, None, None
        gradient = torch.empty_like(unit)
        for piece in _pieces(unit.shape):  # the product is fp32, a piece at a time
            gradient[piece] = unit[piece] * factor[piece[0]]
        return gradient, None, None, None, None


class _Piece:
    """One work piece: its sums per sample, and its part of the gradient before scaling."""

    def __init__(self, teacher: torch.Tensor, student: torch.Tensor, hidden: torch.Tensor | None) -> None:
        self.teacher, self.student, self.hidden = teacher, student, hidden
        self.value = self.norm = torch.zeros(len(student), dtype=student.dtype, device=student.device)

    def compute(self, kind: str, regions: bool, wants_grad: bool) -> torch.Tensor | None:
        """Set `value` (and `norm` where the kind needs it) per sample; return the unscaled gradient `(b, C, *s)`."""
        if kind == "prob_mse":
            return self._prob_mse(regions, wants_grad)
        if kind == "kl":
            return self._kl(regions, wants_grad)
        difference = self._drop(self.student - self.teacher)
        self.value = difference.square().flatten(1).sum(1)
        self.norm = self._drop(self.teacher.square()).flatten(1).sum(1)
        return difference.mul_(2) if wants_grad else None

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        # filling instead of multiplying: 0 * inf from a voxel that does not count would be nan
        return x if self.hidden is None else x.masked_fill_(self.hidden, 0)

    def _prob_mse(self, regions: bool, wants_grad: bool) -> torch.Tensor | None:
        p_s, p_t = (z.sigmoid() if regions else z.softmax(1) for z in (self.student, self.teacher))
        d = self._drop(p_s - p_t)
        del p_t
        self.value = d.square().flatten(1).sum(1)
        if not wants_grad:
            return None
        p_s = self._drop(p_s)
        if regions:  # d/dz (p_s - p_t)^2 = 2 d p_s (1 - p_s)
            return d.mul_(p_s).mul_(1 - p_s).mul_(2)
        # 2 p_k (d_k - sum_j p_j d_j), from dp_j/dz_k = p_j (1[j = k] - p_k)
        return d.sub_((p_s * d).sum(1, keepdim=True)).mul_(p_s).mul_(2)

    def _kl(self, regions: bool, wants_grad: bool) -> torch.Tensor | None:
        t, s = self.teacher, self.student
        if regions:
            p_t = t.sigmoid()
            terms = p_t * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p_t) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        else:
            log_t, log_s = t.log_softmax(1), s.log_softmax(1)
            p_t = log_t.exp()
            terms = p_t * (log_t - log_s)
        self.value = self._drop(terms).flatten(1).sum(1)
        if not wants_grad:
            return None
        return self._drop((s.sigmoid() if regions else log_s.exp_()).sub_(p_t))


def _scales(kind: str, count: torch.Tensor, norm: torch.Tensor, channels: int) -> torch.Tensor:
    """Factor `(B,)` of each sample's sum, from its valid voxels and its squared teacher norm."""
    if kind == "relative_logits":
        counts = count > 0
        return counts / (norm.clamp(min=_TINY) * counts.sum().clamp(min=1))
    per_voxel = 1 / count.sum().clamp(min=1)
    if kind == "logits_over_norm":
        per_voxel = per_voxel / (channels * norm.sum().sqrt().clamp(min=_TINY))
    return per_voxel.expand(len(count))


def _pieces(shape: torch.Size) -> Iterator[tuple[slice, slice, slice]]:
    """Cut `(B, C, X, ...)` into index triples of at most `_PIECE_ELEMENTS` elements, whole samples where they fit."""
    batch, length = shape[0], shape[2]
    sample = max(1, math.prod(shape[1:]))
    samples = max(1, _PIECE_ELEMENTS // sample)
    slabs = length if sample <= _PIECE_ELEMENTS else max(1, _PIECE_ELEMENTS * length // sample)
    for b in range(0, batch, samples):
        for x in range(0, length, slabs):
            yield slice(b, b + samples), slice(None), slice(x, x + slabs)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off where the device has it; older torch refuses even enabled=False for devices without (mps)."""
    available = getattr(torch.amp, "is_autocast_available", None)
    known = available(device_type) if available is not None else device_type in ("cpu", "cuda")
    return torch.autocast(device_type, enabled=False) if known else nullcontext()
