"""Fusion: the weights w are exactly the attention a guide gets, and what has no weight leaves no trace."""

from __future__ import annotations

import pytest
import torch

from nnunetv2_ext.jras.fusion import AttentionFusion, concat_guides, safe_log


@pytest.fixture
def parts():
    """Fusion and its inputs: B 2, K 3, tokens 4 x 4."""
    torch.manual_seed(0)
    fusion = AttentionFusion(12, 8, 6, 10, dim=2)
    f, h = torch.randn(2, 12, 3, 5), torch.randn(2, 8, 6, 10)
    u, v = torch.randn(2, 3, 6, 8, 8), torch.randn(2, 3, 10, 4, 4)
    weights = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.1, 0.1, 0.7, 0.1]])
    return fusion, f, h, u, v, weights


def test_without_a_query_the_attention_on_a_guides_tokens_is_its_weight(parts):
    fusion, f, _, _, v, weights = parts
    torch.nn.init.zeros_(fusion.query.weight)
    attention = fusion.attention(f, fusion.tokens(v), weights)
    mass = torch.cat((attention[..., :-1].unflatten(-1, (3, 16)).sum(-1), attention[..., -1:]), -1)
    assert torch.allclose(mass, weights[:, None, None].expand_as(mass), atol=1e-6)


def test_all_weight_on_the_null_guide_changes_nothing_bit_for_bit(parts):
    fusion, f, h, u, v, _ = parts
    deep, skip = fusion(f, h, u, v, torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2))
    assert torch.equal(deep, f) and torch.equal(skip, h)


def test_weights_move_both_features(parts):
    fusion, f, h, u, v, weights = parts
    deep, skip = fusion(f, h, u, v, weights)
    assert (deep - f).abs().max() > 1e-3 and (skip - h).abs().max() > 1e-3


def test_the_order_of_guides_does_not_matter(parts):
    fusion, f, h, u, v, weights = parts
    order = torch.tensor([2, 0, 1])
    one = fusion(f, h, u, v, weights)
    other = fusion(f, h, u[:, order], v[:, order], torch.cat((weights[:, order], weights[:, 3:]), 1))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, other))


def test_a_guide_of_weight_zero_adds_nothing(parts):
    fusion, f, h, u, v, weights = parts
    more = torch.cat((weights[:, :3], torch.zeros(2, 1), weights[:, 3:]), 1)
    one = fusion(f, h, u, v, weights)
    other = fusion(f, h, torch.cat((u, 50 * u[:, :1]), 1), torch.cat((v, 50 * v[:, :1]), 1), more)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, other))


def test_gradients_stay_finite_where_weights_are_zero(parts):
    fusion, f, h, u, v, weights = parts
    weights.requires_grad_(True)
    sum(x.square().sum() for x in fusion(f, h, u, v, weights)).backward()
    assert torch.isfinite(weights.grad).all() and weights.grad.abs().sum() > 0


def test_gates_of_zero_give_the_weights_no_gradient(parts):
    # why they start at 0.1
    fusion, f, h, u, v, weights = parts
    assert float(fusion.deep_gate.detach()) == pytest.approx(0.1)
    torch.nn.init.zeros_(fusion.deep_gate)
    torch.nn.init.zeros_(fusion.skip_gate)
    weights.requires_grad_(True)
    sum(x.square().sum() for x in fusion(f, h, u, v, weights)).backward()
    assert weights.grad.abs().max() == 0


def test_the_log_of_zero_passes_no_gradient():
    w = torch.tensor([0.0, 0.25], requires_grad=True)
    logarithm = safe_log(w)
    logarithm[1].backward()
    assert logarithm[0].item() == -torch.inf and logarithm[1].item() == pytest.approx(-1.3862944)
    assert w.grad.tolist() == [0.0, 4.0]


def test_concat_averages_images_and_one_hot_masks_by_weight():
    x = torch.zeros(1, 1, 4, 4)
    images = torch.stack([torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 6.0)], 1)
    masks = torch.zeros(1, 2, 3, 2, 2)
    masks[0, 0, 0], masks[0, 1, 2] = 1, 1  # classes 0 and 2: their mean must not look like class 1
    y = concat_guides(x, images, masks, torch.tensor([[0.5, 0.25, 0.25]]))
    assert y.shape == (1, 5, 4, 4)
    assert torch.allclose(y[0, :, 0, 0], torch.tensor([0.0, 2.5, 0.5, 0.0, 0.25]))


def test_concat_without_weight_is_zeros():
    x = torch.randn(2, 1, 4, 4)
    images, masks = torch.randn(2, 2, 1, 2, 2), torch.ones(2, 2, 3, 2, 2)
    null = torch.tensor([[0.0, 0.0, 1.0]] * 2)
    assert torch.equal(concat_guides(x, images, masks, null), torch.cat((x, torch.zeros(2, 4, 4, 4)), 1))
