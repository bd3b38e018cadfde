"""The error field against dense algebra, differences and a search; and why the paper's form is not the default."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_ext.parts.soft_loss import soft_loss
from nnunetv2_ext.spatialnoise.posterior import (
    Form,
    axis_correlations,
    clean_distribution,
    clean_regions,
    error_field,
    evidence,
    log_determinant,
    log_evidence,
    objective,
    precision,
    region_evidence,
    slope,
    trust,
)

MU, S = -2.0, 1.313
FORMS: tuple[Form, ...] = ("exact", "best", "paper")


def dense_covariance(shape: tuple[int, ...], rho: tuple[float, ...], s: float) -> np.ndarray:
    total = np.ones((1, 1))
    for n, r in zip(shape, rho):
        index = np.arange(n)
        total = np.kron(total, np.power(float(r), np.abs(index[:, None] - index[None])))
    return s**2 * total


@pytest.mark.parametrize(
    ("shape", "rho"),
    [((4, 5), (0.5, 0.7)), ((3, 4, 5), (0.5, 0.25, 0.8)), ((1, 6, 2), (0.9, 0.5, 0.3)), ((2, 3), (0.0, 0.6))],
)
def test_precision_and_determinant_are_those_of_the_dense_matrix(shape, rho):
    x = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = dense_covariance(shape, rho, S)
    expected = np.linalg.solve(covariance, x.reshape(6, -1).numpy().T).T.reshape(x.shape)
    np.testing.assert_allclose(precision(x, rho, S).numpy(), expected, atol=1e-12)
    assert log_determinant(shape, rho, S) == pytest.approx(np.linalg.slogdet(covariance)[1], abs=1e-9)


def test_the_correlation_falls_with_the_distance_in_millimetres():
    assert axis_correlations(0.5, (3.0, 1.0, 1.5)) == pytest.approx((0.125, 0.5, 0.5**1.5))
    assert axis_correlations(0.0, (3.0, 1.0)) == (0.0, 0.0)


def some_evidence(form: Form, classes: int = 3, shape: tuple[int, ...] = (4, 3, 5)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    p = (2 * torch.randn(2, classes, *shape, generator=generator)).softmax(1)
    label = torch.randint(0, classes, (2, 1, *shape), generator=generator)
    a, b = evidence(p, label, form)
    return a.double(), b.double()


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_finite_differences(form):
    a, b = some_evidence(form)
    eta = torch.randn(a.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    h = 1e-5
    numeric = (log_evidence(eta + h, a, b, form) - log_evidence(eta - h, a, b, form)) / (2 * h)
    torch.testing.assert_close(slope(eta, a, b, form), numeric, atol=1e-9, rtol=0)
    rho, valid = (0.5, 0.3, 0.6), torch.ones_like(a)
    valid[0, 0, 1] = 0
    place = (1, 0, 2, 1, 3)
    gradient = (precision(eta - MU, rho, S) - valid * slope(eta, a, b, form))[place]
    more, less = eta.clone(), eta.clone()
    more[place] += h
    less[place] -= h
    rise = objective(more, a, b, valid, rho, MU, S, form) - objective(less, a, b, valid, rho, MU, S, form)
    assert gradient.item() == pytest.approx(rise / (2 * h), abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_objective_falls_and_further_steps_gain_little(form):
    a, b = some_evidence(form, shape=(6, 6, 6))
    rho, valid = (0.5, 0.5, 0.5), torch.ones_like(a)
    steps = (0, 5, 30, 300)
    values = [
        objective(error_field(a, b, valid, rho, form=form, steps=n), a, b, valid, rho, MU, S, form) for n in steps
    ]
    assert values[0] > values[1] > values[2]
    assert values[2] - values[3] < 0.05 * (values[0] - values[3])


@pytest.mark.parametrize("form", ["exact", "best"])
def test_without_correlation_each_voxel_gets_its_own_optimum(form):
    a, b = some_evidence(form)
    a[0, 0, 0, 0, :3] = torch.tensor([1e-6, 1 - 1e-6, 0.02], dtype=torch.float64)
    b[0, 0, 0, 0, :3] = 1 - a[0, 0, 0, 0, :3]
    found = error_field(a, b, torch.ones_like(a), (0.0, 0.0, 0.0), MU, S, form)
    grid = torch.linspace(-12, 12, 4801, dtype=torch.float64)[:, None]
    j = (grid - MU) ** 2 / (2 * S**2) - log_evidence(grid, a.flatten()[None], b.flatten()[None], form)
    torch.testing.assert_close(found.flatten(), grid[j.argmin(0), 0], atol=0.003, rtol=0)


def test_the_iteration_for_a_field_agrees_with_newton_where_neighbours_do_not_matter():
    a, b = some_evidence("exact")
    valid = torch.ones_like(a)
    alone = error_field(a, b, valid, (0.0,) * 3)
    torch.testing.assert_close(error_field(a, b, valid, (1e-9,) * 3, steps=300), alone, atol=1e-3, rtol=0)


def test_an_invalid_voxel_says_nothing_itself():
    a, b = some_evidence("exact")
    valid = torch.ones_like(a)
    valid[:, :, 2] = 0
    eta = error_field(a, b, valid, (0.0,) * 3)
    assert torch.equal(eta[:, :, 2], torch.full_like(eta[:, :, 2], MU))
    spoilt = torch.where(valid > 0, a, 1e-6)
    with_field = [error_field(x, b, valid, (0.5,) * 3) for x in (a, spoilt)]
    assert torch.equal(*with_field) and not torch.equal(with_field[0][:, :, 2], eta[:, :, 2])


# ---- the clean label's distribution --------------------------------------------------------------------------------
def some_case(classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    p = (2 * torch.randn(2, classes, 4, 4, generator=generator)).softmax(1)
    return p, torch.randint(0, classes, (2, 1, 4, 4), generator=generator)


def posterior(p: Tensor, label: Tensor, form: Form = "exact", rho: float = 0.0) -> Tensor:
    a, b = evidence(p, label, form)
    eta = error_field(a, b, torch.ones_like(a), (rho, rho), form=form)
    return clean_distribution(p, label, trust(eta, a, b, form), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_the_distribution_sums_to_one_and_permutes_with_the_classes(form, rho):
    p, label = some_case()
    q = posterior(p, label, form, rho)
    torch.testing.assert_close(q.sum(1), torch.ones(2, 4, 4))
    assert (q >= 0).all()
    order = torch.tensor([2, 0, 1])
    permuted = posterior(p[:, order], torch.argsort(order)[label], form, rho)
    torch.testing.assert_close(permuted, q[:, order], atol=1e-5, rtol=0)


def test_by_hand_the_trust_of_one_voxel():
    p, label = torch.tensor([0.1, 0.6, 0.3]).view(1, 3, 1, 1), torch.zeros(1, 1, 1, 1, dtype=torch.long)
    a, b = evidence(p, label)
    assert (a.item(), b.item()) == pytest.approx((0.1, 0.45))
    r = 1 / (1 + math.exp(1.0))  # of eta = -1
    w = trust(torch.full_like(a, -1.0), a, b)
    assert w.item() == pytest.approx((1 - r) * 0.1 / ((1 - r) * 0.1 + r * 0.45), abs=1e-6)
    q = clean_distribution(p, label, w).flatten()
    assert q.tolist() == pytest.approx([w.item(), (1 - w.item()) * 2 / 3, (1 - w.item()) / 3], abs=1e-6)
    assert evidence(p, label, "best")[1].item() == pytest.approx(0.6)
    assert evidence(p, label, "paper")[1].item() == pytest.approx(math.sqrt(0.6 * 0.3))


def test_without_errors_the_target_is_the_label_and_the_loss_is_nnunets():
    p, label = some_case()
    a, b = evidence(p, label)
    q = clean_distribution(p, label, trust(torch.full_like(a, -40.0), a, b))
    torch.testing.assert_close(q, F.one_hot(label[:, 0], 3).movedim(-1, 1).float())
    options = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    logits, plain = torch.randn(2, 3, 4, 4), DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    assert soft_loss(logits, q, None, plain).item() == pytest.approx(plain(logits, label).item(), abs=1e-6)


def test_with_two_classes_exact_and_best_are_the_same_and_so_is_a_region():
    p, label = some_case(2)
    torch.testing.assert_close(posterior(p, label, "exact"), posterior(p, label, "best"))
    a, b = region_evidence(p[:, 1:], label)
    eta = error_field(a, b, torch.ones_like(a), (0.0, 0.0))
    torch.testing.assert_close(clean_regions(label, trust(eta, a, b)), posterior(p, label)[:, 1:])


# ---- defect 1 of the paper's form --------------------------------------------------------------------------------
def toy(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities of a network that knows the truth, a label that lacks half a square and has a blob, and where."""
    truth = torch.zeros(1, 1, 24, 24, dtype=torch.long)
    truth[..., 6:18, 4:16] = 1
    label = truth.clone()
    label[..., 6:18, 10:16] = 0
    label[..., 2:5, 18:22] = 1
    p = torch.full((1, classes, 24, 24), 1e-4)  # a third class is almost impossible
    p = p.scatter(1, 1 - truth, 0.06)
    return p.scatter(1, truth, 1 - p.sum(1, keepdim=True) + p.gather(1, truth)), label, label != truth


def flagged(form: Form, classes: int) -> tuple[float, float]:
    """Share of the wrong and of the right voxels whose r is above one half."""
    p, label, wrong = toy(classes)
    a, b = evidence(p, label, form)
    r = error_field(a, b, torch.ones_like(a), (0.5, 0.5), form=form).sigmoid()
    return (r > 0.5)[wrong].float().mean().item(), (r > 0.5)[~wrong].float().mean().item()


@pytest.mark.parametrize("form", FORMS)
def test_two_classes_are_found_by_every_form(form):
    found, false = flagged(form, 2)
    assert found > 0.7 and false < 0.02


def test_three_classes_defeat_the_papers_form_and_not_ours():
    assert flagged("paper", 3)[0] < 0.05
    assert flagged("exact", 3)[0] >= 0.7 and flagged("best", 3)[0] >= 0.7
    assert max(flagged("exact", 3)[1], flagged("best", 3)[1]) < 0.02
