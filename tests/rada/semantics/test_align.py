"""The alignment loss against a slow loop, and what must not matter to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunetv2_ext.rada.annotation.planes import Planes
from nnunetv2_ext.rada.semantics.align import alignment_loss
from nnunetv2_ext.rada.views import view_map

FEATURES, D, SHAPE = 5, 7, (6, 7, 8)


def planes(B: int, indices: tuple[int, int, int] = (2, 3, 4)) -> torch.Tensor:
    """Bits of one plane per axis, bit 3 everywhere (inside the image)."""
    bits = torch.full((B, *SHAPE), 8, dtype=torch.int16)
    bits[:, indices[0]] |= 1
    bits[:, :, indices[1]] |= 2
    bits[..., indices[2]] |= 4
    return bits


def make(B: int = 2, C: int = 3, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    return {
        "features": torch.randn(B, FEATURES, *SHAPE, generator=g),
        "label": torch.randint(0, C + 1, (B, *SHAPE), generator=g).to(torch.int16),  # C: ignore
        "bits": planes(B),
        "view_axes": (0, 2),
        "vectors": torch.randn(B, 3, C, D, generator=g),
        "valid": torch.rand(B, 3, C, generator=g) < 0.8,
        "text": torch.randn(C, D, generator=g),
        "projection": nn.Linear(FEATURES, D),
        "tau": 0.3,
        "min_voxels": 4,
        "bank": torch.randn(3, C, D, generator=g),
    }


def slow_loss(
    features, label, bits, view_axes, vectors, valid, text, projection, tau, min_voxels, bank
) -> float | None:
    """In numpy, voxel by voxel."""
    W, b = projection.weight.detach().double().numpy(), projection.bias.detach().double().numpy()
    features, text = features.detach().double().numpy(), text.double().numpy()
    label, bits, valid = label.numpy(), bits.numpy(), valid.numpy()
    vectors, bank = vectors.double().numpy(), bank.double().numpy()
    C = len(text)

    def cosine(p: np.ndarray, q: np.ndarray) -> float:
        return float(p @ q / np.linalg.norm(p) / np.linalg.norm(q))

    terms = []
    for n in range(len(features)):
        for a in view_axes:
            for c in range(1, C):
                found = [
                    features[n][:, x, y, z]
                    for x, y, z in np.ndindex(*label.shape[1:])
                    if bits[n, x, y, z] & (1 << a) and label[n, x, y, z] == c
                ]
                if len(found) < min_voxels or not valid[n, a, c]:
                    continue
                q = W @ np.mean(found, 0) + b
                negatives = []
                for other in range(C):
                    if other == c:
                        continue
                    if valid[n, a, other]:
                        negatives.append(vectors[n, a, other])
                    elif bank[a, other].any():
                        negatives.append(bank[a, other])
                    if other > 0:
                        negatives.append(text[other])
                positive = math.exp(cosine(q, vectors[n, a, c]) / tau)
                rest = sum(math.exp(cosine(q, v) / tau) for v in negatives)
                terms.append(-math.log(positive / (positive + rest)) + 0.5 * (1 - cosine(q, text[c])))
    return float(np.mean(terms)) if terms else None


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    C=st.integers(2, 4),
    view_axes=st.sampled_from([(0, 1), (0, 2), (1, 2), (0, 1, 2), (1,)]),
    min_voxels=st.integers(1, 18),
    with_bank=st.booleans(),
)
def test_it_equals_a_slow_loop(seed, B, C, view_axes, min_voxels, with_bank) -> None:
    given_ = make(B, C, seed) | {"view_axes": view_axes, "min_voxels": min_voxels}
    if not with_bank:
        given_["bank"][:] = 0
    elif seed % 2:
        given_["bank"][:, C - 1] = 0  # a class without any plane
    got, expected = alignment_loss(**given_), slow_loss(**given_)
    assert (got is None) == (expected is None)
    if got is not None:
        assert got.dtype == torch.float32 and got.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_scribble_counts_on_every_axis_that_has_a_vector() -> None:
    given_ = make(B=1, C=2) | {"view_axes": (0, 2)}
    label = np.full(SHAPE, 2)
    label[1:3, 2, 3:5] = 1
    given_["label"] = torch.from_numpy(label)[None]
    given_["bits"] = torch.from_numpy(view_map(label, 2, Planes()))[None]

    def loss(axes: tuple[int, ...], with_vectors: tuple[int, ...], min_voxels: int = 4) -> float | None:
        valid = torch.zeros(1, 3, 2, dtype=torch.bool)
        valid[:, list(with_vectors)] = True
        found = alignment_loss(**given_ | {"view_axes": axes, "valid": valid, "min_voxels": min_voxels})
        return None if found is None else found.item()

    alone = loss((0,), (0, 2)), loss((2,), (0, 2))
    assert None not in alone and alone[0] != alone[1]
    assert loss((0, 2), (0, 2)) == pytest.approx(sum(alone) / 2)
    assert loss((0, 2), (0,)) == pytest.approx(alone[0])
    assert loss((0, 2), (1,)) is None and loss((0, 2), (0, 2), min_voxels=5) is None


def test_it_falls_as_q_approaches_its_vector() -> None:
    """One class, one plane; the projection is the identity, so q is the feature itself."""
    v, background = torch.zeros(D), torch.zeros(D)
    v[0], background[1] = 1, 1
    losses = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        q = share * v + (1 - share) * background
        losses.append(
            alignment_loss(
                q.view(1, D, 1, 1, 1).expand(1, D, *SHAPE),
                torch.ones(1, *SHAPE, dtype=torch.int16),
                planes(1),
                (0,),
                torch.stack((background, v)).expand(1, 3, 2, D),
                torch.ones(1, 3, 2, dtype=torch.bool),
                torch.stack((background, v)),
                nn.Identity(),
                0.07,
                32,
                torch.zeros(3, 2, D),
            ).item()
        )
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1] + 1
    # by hand: cos(q, v) = 1 and cos(q, background) = 0 at the end
    assert losses[-1] == pytest.approx(math.log(1 + math.exp(-1 / 0.07)), abs=1e-6)
    assert losses[0] == pytest.approx(math.log(1 + math.exp(1 / 0.07)) + 0.5, abs=1e-4)


def test_gradient_descent_on_the_features_lowers_it() -> None:
    given_ = make()
    features = given_.pop("features").requires_grad_()
    first = alignment_loss(features, **given_)
    first.backward()
    assert alignment_loss(features.detach() - 5 * features.grad, **given_) < first


def test_planes_outside_the_view_and_unannotated_voxels_do_not_matter() -> None:
    given_ = make()
    features = given_.pop("features").requires_grad_()
    alignment_loss(features, **given_).backward()
    used = (features.grad != 0).any(1)
    in_view = (given_["bits"] & 0b101).bool()
    foreground = (given_["label"] > 0) & (given_["label"] < 3)
    assert used.any() and not (used & ~(in_view & foreground)).any()
    # vectors of the other axis are not even read
    given_["vectors"][:, 1] = float("nan")
    assert torch.isfinite(alignment_loss(features, **given_))


def test_a_rotation_by_90_degrees_does_not_matter() -> None:
    """Membership rides in the bits, so planes may lie anywhere in the patch."""
    given_ = make()
    rotated = dict(given_)
    rotated["features"] = given_["features"].rot90(1, (2, 4))
    rotated["label"] = given_["label"].rot90(1, (1, 3))
    rotated["bits"] = given_["bits"].rot90(1, (1, 3))
    assert torch.allclose(alignment_loss(**rotated), alignment_loss(**given_), atol=1e-6)


def test_no_term_is_none() -> None:
    given_ = make()
    assert alignment_loss(**given_ | {"min_voxels": 10_000}) is None
    assert alignment_loss(**given_ | {"valid": torch.zeros(2, 3, 3, dtype=torch.bool)}) is None
    assert alignment_loss(**given_ | {"bits": torch.full_like(given_["bits"], 8)}) is None
    assert alignment_loss(**given_ | {"label": torch.full_like(given_["label"], 3)}) is None  # all ignored
    assert alignment_loss(**given_ | {"label": torch.full_like(given_["label"], -1)}) is None


def test_one_class_without_background_vector_or_bank_is_finite() -> None:
    given_ = make(C=2) | {"bank": torch.zeros(3, 2, D)}
    given_["label"][:] = 1
    given_["valid"][:] = torch.tensor([False, True])
    assert torch.isfinite(alignment_loss(**given_))


def test_what_is_not_valid_is_never_used() -> None:
    given_ = make()
    before = alignment_loss(**given_)
    given_["vectors"][~given_["valid"]] = float("nan")
    assert torch.equal(alignment_loss(**given_), before)


def test_gradients_reach_features_and_projection_and_are_finite() -> None:
    given_ = make() | {"bank": torch.zeros(3, 3, D)}
    given_["features"].requires_grad_()
    given_["valid"][0, 0, 0] = False
    alignment_loss(**given_).backward()
    gradients = [given_["features"].grad, given_["projection"].weight.grad, given_["projection"].bias.grad]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


def test_full_precision_under_autocast() -> None:
    given_ = make()
    expected = alignment_loss(**given_)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alignment_loss(**given_), expected)


def test_learned_tokens_are_aligned_and_learn(make_rada_net) -> None:
    net = make_rada_net(semantics="learned")
    features = torch.randn(2, 4, *SHAPE)
    label = torch.randint(0, 4, (2, *SHAPE))
    loss = net.alignment_loss(0, features, label, planes(2), min_voxels=3)
    member, tokens = net.member(0), net.member(0).unit_tokens().detach()
    expected = slow_loss(
        features,
        label,
        planes(2),
        (0, 1),
        tokens.expand(2, 3, -1, -1),
        torch.ones(2, 3, 3, dtype=torch.bool),
        tokens,
        member.projection,
        0.07,
        3,
        tokens.expand(3, -1, -1),
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert member.tokens.grad.abs().sum() > 0 and net.member(1).tokens.grad is None


def test_clip_uses_the_networks_view_and_bank(make_rada_net) -> None:
    net = make_rada_net()
    given_ = make() | {"vectors": torch.randn(2, 3, 3, 16), "features": torch.randn(2, 4, *SHAPE)}
    for k, axes in enumerate([(0, 1), (0, 2), (1, 2)]):
        got = net.alignment_loss(
            k, given_["features"], given_["label"], given_["bits"], (given_["vectors"], given_["valid"]), 0.3, 4
        )
        expected = slow_loss(
            **given_
            | {
                "view_axes": axes,
                "text": net.bank.text,
                "bank": net.bank.image,
                "projection": net.member(k).projection,
            }
        )
        assert got.item() == pytest.approx(expected, rel=1e-4)
