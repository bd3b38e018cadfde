"""Schedules over the steps of a training: the ramp of a term's weight and the momentum of a moving average."""

import math


def gaussian_ramp(share: float) -> float:
    """exp(-5 (1 - t)^2) of the share t of a ramp that is behind: 0.007 at 0, 0.29 at 1/2, 1 at 1.

    Raises:
        ValueError: t outside 0..1, where the curve would fall again.
    """
    if not 0.0 <= share <= 1.0:  # also refuses nan
        raise ValueError(f"the share of a ramp must lie between 0 and 1, not {share}")
    return math.exp(-5.0 * (1.0 - share) ** 2)


def ramp(step: int, total_steps: int, ramp_fraction: float) -> float:
    """Weight of the consistency at global step t: `gaussian_ramp` of t / T_r, T_r = ramp_fraction * total_steps.

    The first targets come from an untrained teacher, so the term starts at exp(-5) = 0.0067 and reaches 1 at T_r.
    A `ramp_fraction` of 0 switches the ramp off (always 1).

    Raises:
        ValueError: a negative step, no steps at all, or a fraction outside 0..1.
    """
    _require_steps(step, total_steps)
    if not 0.0 <= ramp_fraction <= 1.0:
        raise ValueError(f"ramp_fraction must lie between 0 and 1, not {ramp_fraction}")
    length = ramp_fraction * total_steps
    return gaussian_ramp(min(1.0, step / length)) if length else 1.0


def momentum(step: int, total_steps: int, base: float = 0.996, final: float = 1.0) -> float:
    """Momentum m(t) of the update at global step t (0-based): min(m_cos(t), 1 - 1/(t + 1)).

    m_cos rises on a half cosine from `base` to `final` over `total_steps` and stays there. Until the window of
    1/(1 - base) steps is full, the second term makes the teacher the plain average of all students seen so far. That is
    Mean-Teacher practice. m(0) = 0 copies the student.

    The defaults are the released code's arguments; base 0.996 is a window of 250 steps = one nnU-Net epoch. The step
    counts on over epochs and resumes, up to num_epochs * num_iterations_per_epoch.

    Raises:
        ValueError: a negative step, no steps at all, or a momentum outside 0..1.
    """
    _require_steps(step, total_steps)
    if not (0.0 <= base <= 1.0 and 0.0 <= final <= 1.0):
        raise ValueError(f"a momentum must lie between 0 and 1, not base {base} and final {final}")
    cosine = math.cos(math.pi * min(1.0, step / total_steps))
    return min(final - (final - base) * (1.0 + cosine) / 2.0, 1.0 - 1.0 / (step + 1))


def released_momentum(step_in_epoch: int, base: float = 0.996) -> float:
    """Momentum of the released nnFormer code (preset `paper_code`): base * i / 4999, i restarting with every epoch.

    At 250 steps an epoch it never exceeds 0.0496, so that teacher is almost the student. Ablation only.
    """
    return base * min(1.0, step_in_epoch / 4999)


def _require_steps(step: int, total_steps: int) -> None:
    if step < 0 or total_steps < 1:
        raise ValueError(f"a schedule needs step >= 0 and total_steps >= 1, not {step} and {total_steps}")
