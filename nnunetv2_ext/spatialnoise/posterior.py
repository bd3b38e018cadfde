"""The probability that a label is wrong, given a network's prediction (after Tadokoro et al., arXiv 2504.14795).

Each voxel has an error logit eta; r = sigmoid(eta) is the probability that its label is wrong before the prediction is
looked at. A Gaussian field is the prior of eta, with mean mu, standard deviation s and correlation
rho_a^distance along axis a (Kac-Murdock-Szego, AR-1). Its most probable value is taken; nothing is sampled.

Arrays may have any leading axes; the last ``len(rho)`` are spatial. All of it is float32 and without gradient.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Form = Literal["exact", "best", "paper"]
SMALLEST = 1e-6  # probabilities are clamped to SMALLEST..1 - SMALLEST
_NEWTON_STEPS = 12
_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # Adam's


def evidence(probabilities: Tensor, label: Tensor, form: Form = "exact") -> tuple[Tensor, Tensor]:
    """What the network says for the label, and for another one in its place.

    Args:
        probabilities: (B, C, *S) softmax, C at least 2.
        label: (B, 1, *S) observed classes in 0..C-1; put any class where the label is ignored.
        form: ``exact``: an error is spread evenly over the other classes. ``best``: it is the likeliest other class.
            ``paper``: the geometric mean of the others, as the paper writes it. Three classes and more defeat that: one
            unlikely class makes "wrong" dearer than "right".

    Returns:
        a = p(label) and b, (B, 1, *S) each.
    """
    p, label = probabilities.float(), label.long()
    a = p.gather(1, label).clamp(SMALLEST, 1 - SMALLEST)
    if form == "exact":
        return a, (1 - a) / (p.shape[1] - 1)
    if form == "best":
        return a, p.scatter(1, label, 0).amax(1, keepdim=True).clamp(SMALLEST, 1 - SMALLEST)
    others = p.clamp(SMALLEST, 1 - SMALLEST).log().scatter(1, label, 0).sum(1, keepdim=True)
    return a, (others / (p.shape[1] - 1)).exp()


def region_evidence(probabilities: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """As `evidence` for regions, each of which is a question of two answers: (B, R, *S) sigmoid and 0 or 1."""
    p = probabilities.float()
    a = torch.where(observed > 0, p, 1 - p).clamp(SMALLEST, 1 - SMALLEST)
    return a, 1 - a


def log_evidence(eta: Tensor, a: Tensor, b: Tensor, form: Form = "exact") -> Tensor:
    """f(eta) = log((1-r) a + r b), or of ``paper`` (1-r) log a + r log b."""
    r = eta.sigmoid()
    return (1 - r) * a.log() + r * b.log() if form == "paper" else (a + r * (b - a)).log()


def slope(eta: Tensor, a: Tensor, b: Tensor, form: Form = "exact") -> Tensor:
    """df/deta in closed form."""
    r = eta.sigmoid()
    return r * (1 - r) * ((b.log() - a.log()) if form == "paper" else (b - a) / (a + r * (b - a)))


def axis_correlations(rho: float, spacing: Sequence[float]) -> tuple[float, ...]:
    """rho_a = rho^(spacing_a / smallest spacing): `rho` is between neighbours along the finest axis."""
    return tuple(rho ** (float(mm) / min(map(float, spacing))) for mm in spacing)


def precision(x: Tensor, rho: Sequence[float], s: float) -> Tensor:
    """Sigma^-1 x without a matrix; the covariance is Sigma = s^2 kron_a R_a, R_a[i,j] = rho_a^|i-j|.

    Args:
        x: (..., *S).
        rho: per spatial axis, each in 0..1 without 1. An axis of one voxel is the identity.
        s: standard deviation of eta.
    """
    for axis, correlation in zip(range(x.ndim - len(rho), x.ndim), rho):
        n = x.shape[axis]
        if n == 1 or correlation == 0:
            continue
        # the inverse of R_a has three diagonals: 1 at both ends and 1 + rho^2 between them, beside it -rho
        y = (1 + correlation**2) * x
        for end in (0, n - 1):
            y.narrow(axis, end, 1).sub_(correlation**2 * x.narrow(axis, end, 1))
        y.narrow(axis, 1, n - 1).sub_(correlation * x.narrow(axis, 0, n - 1))
        y.narrow(axis, 0, n - 1).sub_(correlation * x.narrow(axis, 1, n - 1))
        x = y / (1 - correlation**2)
    return x / s**2


def log_determinant(shape: Sequence[int], rho: Sequence[float], s: float) -> float:
    """log |Sigma| of a field of this shape."""
    n = math.prod(shape)
    return 2 * n * math.log(s) + sum(n / m * (m - 1) * math.log1p(-(r**2)) for m, r in zip(shape, rho))


def objective(
    eta: Tensor, a: Tensor, b: Tensor, valid: Tensor, rho: Sequence[float], mu: float, s: float, form: Form = "exact"
) -> float:
    """J(eta) = -sum v f(eta) + (eta-mu)' Sigma^-1 (eta-mu) / 2, which `error_field` makes small; sums in float64."""
    fit = (valid * log_evidence(eta, a, b, form)).sum(dtype=torch.float64)
    prior = ((eta - mu) * precision(eta - mu, rho, s)).sum(dtype=torch.float64)
    return float(prior / 2 - fit)


@torch.no_grad()
def error_field(
    a: Tensor,
    b: Tensor,
    valid: Tensor,
    rho: Sequence[float],
    mu: float = -2.0,
    s: float = 1.313,
    form: Form = "exact",
    steps: int = 30,
    rate: float = 0.5,
) -> Tensor:
    """The most probable error logits eta.

    Without correlation each voxel is its own problem, convex for s < 2, and Newton's steps solve it. Otherwise `steps`
    of Adam of that rate start at mu.

    Args:
        a, b: (..., *S), of `evidence`.
        valid: (..., *S), 0 where a voxel says nothing (ignored, padding): its eta follows from its neighbours alone.
        rho: per spatial axis (`axis_correlations`).
        mu, s: mean and standard deviation of the prior, logits.
        form: that of `evidence`.
        steps, rate: of Adam.
    """
    valid = valid.to(a.dtype).expand_as(a)
    eta = torch.full_like(a, mu)
    if not any(rho) and form != "paper":
        for _ in range(_NEWTON_STEPS):
            first = slope(eta, a, b)
            second = first * (1 - 2 * eta.sigmoid()) - first**2
            eta -= ((eta - mu) / s**2 - valid * first) / (1 / s**2 - valid * second)
        return eta
    mean, square = torch.zeros_like(a), torch.zeros_like(a)
    for step in range(1, steps + 1):
        gradient = precision(eta - mu, rho, s) - valid * slope(eta, a, b, form)
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.lerp_(gradient**2, 1 - _BETAS[1])
        corrected = (square / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPSILON)
        eta -= rate / (1 - _BETAS[0] ** step) * mean / corrected
    return eta


def trust(eta: Tensor, a: Tensor, b: Tensor, form: Form = "exact") -> Tensor:
    """w, the probability that the label is right once the prediction was seen, of the shape of a."""
    r = eta.sigmoid()
    return 1 - r if form == "paper" else (1 - r) * a / (a + r * (b - a))


def clean_distribution(probabilities: Tensor, label: Tensor, w: Tensor, form: Form = "exact") -> Tensor:
    """q(clean = k): w for the label; the others share 1 - w by the network's probabilities (of ``paper`` evenly).

    Shapes: probabilities (B, C, *S); label and w (B, 1, *S). Returns (B, C, *S), which sums to 1.
    """
    label = label.long()
    others = torch.ones_like(probabilities) if form == "paper" else probabilities.float()
    others = others.scatter(1, label, 0)
    q = (1 - w) * others / others.sum(1, keepdim=True).clamp_min(SMALLEST)
    return q.scatter(1, label, 1 - q.sum(1, keepdim=True))


def clean_regions(observed: Tensor, w: Tensor) -> Tensor:
    """q(region) of (B, R, *S): w where the voxel was labelled as of the region, else 1 - w."""
    return torch.where(observed > 0, w, 1 - w)
