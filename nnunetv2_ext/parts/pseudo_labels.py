"""Cross pseudo supervision: each network teaches the others where it is sure (after SGTC, arXiv 2412.15526)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_ext.parts.ramps import gaussian_ramp

_NO_LABEL = -100  # nll_loss's ignore_index; the data's own ignore label may be a class elsewhere


def teacher_weight(t: float, lambda_max: float) -> float:
    """lambda(t), the weight of each teacher's loss, t the finished share of the training."""
    return lambda_max * gaussian_ramp(t)


def entropy_ceiling(t: float, num_classes: int) -> float:
    """theta(t) in nats: (0.75 + 0.25 r(t)) ln ``num_classes``, r the ramp."""
    return (0.75 + 0.25 * gaussian_ramp(t)) * math.log(num_classes)


@dataclass(frozen=True)
class Lesson:
    """What one network tells the others about a batch.

    Attributes:
        label: (n, X, Y, Z) uint8 (int16 for more than 256 classes), its most likely class.
        keep: (n, X, Y, Z) bool, where its entropy is below the ceiling, inside the image.
    """

    label: Tensor
    keep: Tensor


@torch.no_grad()
def teach(
    predict: Callable[[Tensor], Tensor],
    data: Tensor,
    inside: Tensor,
    ceiling: float,
    *,
    passes: int = 0,
    noise_std: float = 0.1,
    noise_clip: float = 0.2,
    generator: torch.Generator | None = None,
) -> Lesson:
    """Hard labels from one clean pass, and where to trust them. No gradient reaches the teacher.

    The entropy is that of the softmax of the clean pass, or of the mean softmax over ``passes`` noisy ones.

    Args:
        predict: data -> logits (n, C, X, Y, Z).
        data: (n, channels, X, Y, Z), z-scored.
        inside: (n, X, Y, Z) bool, False for padding.
        ceiling: nats; voxels of a lower entropy are kept.
        passes: noisy passes; 0 uses the clean one.
        noise_std: of the Gaussian noise, in units of the data.
        noise_clip: its largest absolute value.
        generator: for the noise, on the device of the data.
    """
    logits = predict(data)
    total = torch.zeros_like(logits, dtype=torch.float32)
    for _ in range(passes):
        noise = torch.randn(data.shape, device=data.device, dtype=data.dtype, generator=generator)
        total += predict(data + (noise * noise_std).clamp_(-noise_clip, noise_clip)).float().softmax(1)
    return lesson_of(logits, inside, ceiling, total / passes if passes else None)


@torch.no_grad()
def lesson_of(logits: Tensor, inside: Tensor, ceiling: float, probabilities: Tensor | None = None) -> Lesson:
    """Hard labels of ``logits`` and where to trust them; arguments as of `teach`.

    Args:
        logits: (n, C, X, Y, Z).
        inside: (n, X, Y, Z) bool.
        ceiling: nats.
        probabilities: (n, C, X, Y, Z) float32 whose entropy counts; None: the softmax of the logits.
    """
    # torch's argmax takes ten times as long on a CPU
    label = logits.max(1).indices.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)
    counts = logits.float().softmax(1) if probabilities is None else probabilities
    return Lesson(label, (entropy(counts) < ceiling) & inside)


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p ln p over the classes, in nats: (n, C, ...) float32 -> (n, ...); 0 ln 0 is 0."""
    return torch.special.entr(probabilities).sum(1)


def lesson_loss(log_probabilities: Tensor, lesson: Lesson, allowed: Tensor) -> Tensor:
    """Mean cross-entropy against a teacher's labels over the voxels it keeps; exactly 0 if there are none.

    Args:
        log_probabilities: (n, C, X, Y, Z) float32, the student's.
        lesson: the teacher's.
        allowed: (n, X, Y, Z) bool, the voxels nobody annotated.
    """
    use = lesson.keep & allowed
    target = torch.where(use, lesson.label.long(), _NO_LABEL)
    # a sum over no voxels is 0 with a gradient of 0; nll_loss's own mean would be NaN
    return F.nll_loss(log_probabilities, target, ignore_index=_NO_LABEL, reduction="sum") / use.sum().clamp_min(1)


def kept_share(lessons: Sequence[Lesson], allowed: Tensor) -> Tensor:
    """Mean over the teachers of the share of the ``allowed`` voxels they keep, 0-dim; NaN without any such voxel."""
    kept = torch.stack([(lesson.keep & allowed).sum() for lesson in lessons]).float().mean()
    return kept / allowed.sum()


def agreement(lessons: Sequence[Lesson], allowed: Tensor) -> Tensor:
    """Share of the ``allowed`` voxels to which all networks give one class, 0-dim; NaN without any such voxel."""
    same = allowed.clone()
    for lesson in lessons[1:]:
        same &= lesson.label == lessons[0].label
    return same.sum() / allowed.sum()


def foreground_agreement(lessons: Sequence[Lesson], allowed: Tensor) -> Tensor:
    """As ``agreement``, among the voxels to which any network gives a foreground class.

    Background is easy to agree on and fills most of a patch.
    """
    any_foreground = torch.stack([lesson.label > 0 for lesson in lessons]).any(0)
    return agreement(lessons, allowed & any_foreground)
