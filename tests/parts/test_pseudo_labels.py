"""Schedules at hand-computed points, the entropy gate against a slow loop, and losses that stay finite."""

from __future__ import annotations

import math

import pytest
import torch

from nnunetv2_ext.parts.pseudo_labels import (
    Lesson,
    agreement,
    entropy,
    entropy_ceiling,
    foreground_agreement,
    kept_share,
    lesson_loss,
    teach,
    teacher_weight,
)
from nnunetv2_ext.parts.ramps import gaussian_ramp


@pytest.mark.parametrize(
    ("t", "r"),
    [(0.0, 0.006738), (0.1, 0.017422), (0.25, 0.060055), (0.5, 0.286505), (0.75, 0.731616), (1.0, 1.0)],
)
def test_schedules_at_computed_points(t, r):
    assert gaussian_ramp(t) == pytest.approx(r, abs=1e-6)
    assert teacher_weight(t, 0.1) == pytest.approx(0.1 * r, abs=1e-6)
    assert entropy_ceiling(t, 3) == pytest.approx((0.75 + 0.25 * r) * 1.098612, abs=1e-5)
    assert entropy_ceiling(t, 2) == pytest.approx((0.75 + 0.25 * r) * 0.693147, abs=1e-5)


def constant(logits: torch.Tensor):
    """A network that always says the same, and counts how often it is asked."""
    calls = []

    def predict(data: torch.Tensor) -> torch.Tensor:
        calls.append(data.clone())
        return logits

    return predict, calls


def test_the_gate_equals_a_slow_loop_and_never_keeps_padding():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, 4, 3, 2, generator=generator)
    inside = torch.rand(2, 4, 3, 2, generator=generator) > 0.3
    predict, calls = constant(logits)
    ceiling = 0.6
    lesson = teach(predict, torch.zeros(2, 1, 4, 3, 2), inside, ceiling)
    assert len(calls) == 1 and lesson.label.dtype == torch.uint8
    kept = 0
    for b, *voxel in torch.cartesian_prod(*(torch.arange(n) for n in inside.shape)).tolist():
        exps = [math.exp(float(logits[(b, c, *voxel)])) for c in range(3)]
        p = [e / sum(exps) for e in exps]
        H = -sum(x * math.log(x) for x in p)
        where = (b, *voxel)
        assert lesson.label[where] == p.index(max(p))
        assert bool(lesson.keep[where]) == (bool(inside[where]) and ceiling > H)
        kept += bool(lesson.keep[where])
    assert 0 < kept < inside.sum()


def test_entropy_of_a_certain_and_of_a_uniform_prediction():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).view(2, 2, 1, 1, 1)
    torch.testing.assert_close(entropy(p).flatten(), torch.tensor([0.0, math.log(2)]))


def test_noisy_passes_are_clipped_and_their_mean_softmax_is_taken():
    data = torch.zeros(1, 1, 8, 8, 8)
    calls = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return torch.cat((10 * x, -10 * x), 1)

    generator = torch.Generator().manual_seed(1)
    inside = torch.ones(1, 8, 8, 8, dtype=torch.bool)
    lesson = teach(predict, data, inside, 0.69, passes=4, noise_std=0.1, noise_clip=0.15, generator=generator)
    assert len(calls) == 5 and torch.equal(calls[0], data)  # the labels' pass is clean
    assert all(float(x.abs().max()) == pytest.approx(0.15) for x in calls[1:])
    mean = torch.stack([torch.cat((10 * x, -10 * x), 1).softmax(1) for x in calls[1:]]).mean(0)
    assert torch.equal(lesson.keep, -(mean * mean.log()).sum(1) < 0.69)
    assert 0 < lesson.keep.sum() < lesson.keep.numel()


def test_teachers_carry_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    lesson = teach(
        lambda x: weight * x.expand(-1, 2, -1, -1, -1),
        torch.randn(1, 1, 2, 2, 2),
        torch.ones(1, 2, 2, 2, dtype=torch.bool),
        1.0,
    )
    assert not lesson.label.requires_grad and not lesson.keep.requires_grad


def test_the_loss_is_the_mean_cross_entropy_over_kept_unannotated_voxels():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 4, 4, 4, generator=generator, requires_grad=True)
    label = torch.randint(0, 3, (2, 4, 4, 4), generator=generator).to(torch.uint8)
    keep, allowed = (torch.rand(2, 4, 4, 4, generator=generator) > 0.5 for _ in range(2))
    loss = lesson_loss(logits.log_softmax(1), Lesson(label, keep), allowed)
    terms = [
        -logits[(b, slice(None), *voxel)].log_softmax(0)[label[(b, *voxel)].long()]
        for b, *voxel in (keep & allowed).nonzero().tolist()
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    loss.backward()
    moved = logits.grad.abs().sum(1) > 0
    assert not moved[~(keep & allowed)].any() and moved[keep & allowed].all()


def test_if_everything_is_rejected_the_loss_is_zero_and_so_is_its_gradient():
    logits = torch.randn(1, 2, 2, 2, 2, requires_grad=True)
    nothing = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    lesson = Lesson(nothing.to(torch.uint8), nothing)
    loss = lesson_loss(logits.log_softmax(1), lesson, ~nothing)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_figures_of_agreement():
    allowed = torch.tensor([True, True, True, False])
    labels = ([0, 1, 1, 0], [0, 1, 2, 1], [0, 1, 1, 2])
    keeps = ([1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0])
    lessons = [Lesson(torch.tensor(label), torch.tensor(keep).bool()) for label, keep in zip(labels, keeps)]
    assert agreement(lessons, allowed) == pytest.approx(2 / 3)
    assert foreground_agreement(lessons, allowed) == pytest.approx(1 / 2)
    assert kept_share(lessons, allowed) == pytest.approx((3 + 1 + 0) / 9)
    assert math.isnan(agreement(lessons, allowed & ~allowed))
