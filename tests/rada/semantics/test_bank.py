"""Means of class vectors, a sample's own ones, and the buffers that carry them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.rada.semantics.bank import (
    SemanticBank,
    draw_own,
    mean_in_view,
    mean_vectors,
    own_or_bank,
    vectors_of,
)

C, D = 3, 4


def unit(v: torch.Tensor) -> torch.Tensor:
    return v / v.norm() if v.norm() > 0 else v


@settings(max_examples=30, deadline=None)
@given(N=st.integers(1, 5), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_means_equal_a_slow_loop(N: int, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    vectors, valid = torch.randn(N, 3, C, D, generator=g), torch.rand(N, 3, C, generator=g) < share
    got = mean_vectors(vectors, valid)
    for a in range(3):
        for c in range(C):
            found = [vectors[n, a, c] for n in range(N) if valid[n, a, c]]
            found = found or [vectors[n, b, c] for n in range(N) for b in range(3) if valid[n, b, c]]
            expected = unit(torch.stack(found).mean(0)) if found else torch.zeros(D)
            assert torch.allclose(got[a, c], expected, atol=1e-5)


def test_an_axis_without_planes_gets_the_mean_of_all_axes() -> None:
    vectors, valid = torch.zeros(2, 3, 1, 2), torch.tensor([[[True], [False], [False]], [[False], [True], [False]]])
    vectors[0, 0, 0] = torch.tensor([1.0, 0.0])
    vectors[1, 1, 0] = torch.tensor([0.0, 1.0])
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]])
    assert torch.allclose(mean_vectors(vectors, valid)[:, 0], expected)


def test_what_is_not_valid_is_never_read() -> None:
    vectors, valid = torch.randn(2, 3, C, D), torch.rand(2, 3, C) < 0.5
    poisoned = torch.where(valid[..., None], vectors, torch.nan)
    assert torch.equal(mean_vectors(poisoned, valid), mean_vectors(vectors, valid))
    bank, use = torch.randn(3, C, D), torch.ones(2, dtype=torch.bool)
    assert torch.equal(own_or_bank(poisoned, valid, bank, (0, 2), use), own_or_bank(vectors, valid, bank, (0, 2), use))


def test_own_vectors_first_then_the_banks() -> None:
    vectors, bank = torch.randn(3, 3, C, D), torch.randn(3, C, D)
    valid = torch.rand(3, 3, C) < 0.5
    use = torch.tensor([True, True, False])
    for axes in ((0, 1), (1, 2), (0, 1, 2), (2,)):
        got = own_or_bank(vectors, valid, bank, axes, use)
        for n in range(3):
            for c in range(C):
                parts = [vectors[n, a, c] if valid[n, a, c] and use[n] else bank[a, c] for a in axes]
                assert torch.allclose(got[n, c], unit(torch.stack(parts).mean(0)), atol=1e-6)


def test_draw_own_keeps_its_rate_and_draws_only_those_that_have_some() -> None:
    generator = torch.Generator().manual_seed(0)
    has = torch.arange(4000) % 2 == 0
    drawn = draw_own(has, 0.5, generator)
    assert not drawn[~has].any() and 0.45 < drawn[has].float().mean() < 0.55
    assert not draw_own(has, 0.0, generator).any() and torch.equal(draw_own(has, 1.0, generator), has)
    assert torch.equal(
        draw_own(has, 0.5, torch.Generator().manual_seed(3)), draw_own(has, 0.5, torch.Generator().manual_seed(3))
    )


def test_a_batchs_vectors_are_looked_up_by_case() -> None:
    first, second = torch.randn(3, C, D), torch.randn(3, C, D)
    valid = torch.rand(3, C) < 0.5
    vectors, found = vectors_of({"a": (first, valid), "b": (second, ~valid)}, ["b", "unlabelled", "a"])
    assert torch.equal(vectors[0], second) and torch.equal(vectors[2], first)
    assert torch.equal(found[0], ~valid) and torch.equal(found[2], valid) and not found[1].any()


def test_the_buffer_takes_vectors_of_any_dimension() -> None:
    bank = SemanticBank(C, D, [(0, 1), (0, 2), (1, 2)])
    assert not bank.is_filled and bank.text.shape[1] == D
    image, text = torch.randn(3, C, 9), torch.randn(C, 9)
    bank.set(image, text)
    assert bank.is_filled and torch.equal(bank.image, image) and torch.equal(bank.text, text)
    assert torch.equal(bank.in_view(2), mean_in_view(image, (1, 2)))
    other = SemanticBank(C, D, [(0,), (1,), (2,)])
    other.load_state_dict(bank.state_dict())
    assert other.is_filled and other.view_axes == ((0, 1), (0, 2), (1, 2)) and torch.equal(other.text, text)
    image += 1
    assert not torch.equal(bank.image, image)


def test_vectors_that_are_not_finite_are_refused() -> None:
    bank = SemanticBank(C, D, [(0, 1, 2)])
    image = mean_vectors(torch.full((1, 3, C, D), torch.nan), torch.ones(1, 3, C, dtype=torch.bool))
    with pytest.raises(ValueError, match="not finite"):
        bank.set(image, torch.zeros(C, D))
    assert not bank.is_filled and bank.text.shape[1] == D
