"""The semantic head against slow loops, its gate, and what half precision does to it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nnunetv2_ext.rada.semantics.head import HEAD_SIZES, Adapter, SemanticHead, apply_heads

D = 6


def make(classes: int = 4, seed: int = 0, features: int = 8, bottleneck: int = 12) -> SemanticHead:
    torch.manual_seed(seed)
    return SemanticHead(classes, bottleneck, features, nn.Conv3d, D)


def inputs(classes: int = 4, B: int = 2, features: int = 8, bottleneck: int = 12) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(B, classes, 6, 5, 4, generator=g),
        torch.randn(B, features, 6, 5, 4, generator=g),
        torch.randn(B, bottleneck, 3, 2, 2, generator=g),
        F.normalize(torch.randn(classes, D, generator=g), dim=-1),
        F.normalize(torch.randn(B, classes, D, generator=g), dim=-1),
    )


def slow_semantics(head: SemanticHead, features, bottleneck, text, image) -> torch.Tensor:
    """Sample by sample, class by class, voxel by voxel."""

    def group_norm(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
        out = torch.empty_like(x)
        size = x.shape[0] // norm.num_groups
        for i in range(norm.num_groups):
            part = x[i * size : (i + 1) * size]
            out[i * size : (i + 1) * size] = (part - part.mean()) / (part.var(unbiased=False) + norm.eps).sqrt()
        return out * norm.weight[:, None] + norm.bias[:, None]

    def adapt(adapter: Adapter, v: torch.Tensor) -> torch.Tensor:
        return (adapter.up.weight @ (adapter.down.weight @ v).relu()).relu()

    B, C = len(features), len(text)
    result = torch.zeros(B, C, *features.shape[2:])
    for n in range(B):
        x = group_norm(features[n].flatten(1), head.reduction_norm).relu()
        reduced = head.reduction.weight.flatten(1) @ x + head.reduction.bias[:, None]
        g = group_norm(bottleneck[n].flatten(1), head.context_norm).relu().mean(1)
        g = head.context.weight @ g + head.context.bias
        for c in range(1, C):
            u, v = text[c] * D**0.5, image[n, c] * D**0.5  # entries of variance 1
            both = torch.cat((adapt(head.text_adapter, u), adapt(head.image_adapter, v)))
            z = (head.merge.weight @ both + head.merge.bias).relu()
            w = head.controller(torch.cat((g, z)))
            for v in range(reduced.shape[1]):
                h = reduced[:, v]
                if C == 2:
                    out = head.classifier.weight.flatten(1) @ (h + w) + head.classifier.bias
                    result[n].view(C, -1)[:, v] = out
                else:
                    w1, w2, w3 = w[:64].view(8, 8), w[72:136].view(8, 8), w[144:152]
                    h = (w1 @ h + w[64:72]).relu()
                    h = (w2 @ h + w[136:144]).relu()
                    result[n, c].view(-1)[v] = w3 @ h + w[152]
    return result


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_it_equals_a_slow_loop(classes: int) -> None:
    head, (logits, *rest) = make(classes), inputs(classes)
    nn.init.constant_(head.gate, 0.3)
    with torch.no_grad():
        expected = logits + 0.3 * slow_semantics(head, *rest)
        assert torch.allclose(head(logits, *rest), expected, atol=1e-5)


def test_a_generated_head_has_153_numbers() -> None:
    assert sum(HEAD_SIZES) == 153 and make(3).controller[-1].out_features == 153
    assert make(2).controller[-1].out_features == 8


def test_background_gets_nothing_with_several_classes() -> None:
    head, (logits, *rest) = make(4), inputs(4)
    nn.init.constant_(head.gate, 2.0)
    difference = head(logits, *rest) - logits
    assert (difference[:, 0] == 0).all() and all((difference[:, c] != 0).any() for c in (1, 2, 3))


def test_a_class_is_conditioned_by_its_own_vectors_only() -> None:
    head, (logits, features, bottleneck, text, image) = make(4), inputs(4)
    nn.init.constant_(head.gate, 1.0)
    before = head(logits, features, bottleneck, text, image)
    changed = torch.where(torch.arange(4)[:, None] == 2, -text, text)
    after = head(logits, features, bottleneck, changed, image)
    assert [torch.equal(before[:, c], after[:, c]) for c in range(4)] == [True, True, False, True]
    text_zero = text.clone()
    text_zero[0] = 99  # background's text is not used
    assert torch.equal(head(logits, features, bottleneck, text_zero, image), before)


@pytest.mark.parametrize("which", ["text", "image"])
def test_a_fresh_head_already_tells_similar_classes_apart(which: str) -> None:
    """CLIP's vectors of two organs have a cosine of 0.8 or so; the generated weights must not drown the difference."""
    torch.manual_seed(0)
    head, dimension = SemanticHead(4, 64, 8, nn.Conv3d, 512), 512
    common = torch.randn(1, dimension)
    similar = F.normalize(common + 0.5 * torch.randn(4, dimension), dim=-1)
    same = F.normalize(common, dim=-1).expand(4, -1)
    assert 0.7 < (similar[1] * similar[2]).sum() < 0.9
    text, image = (similar, same) if which == "text" else (same, similar)
    weights = head.controlled(torch.randn(1, 64, 4, 4, 4), text, image[None])[0]
    assert weights.std(0).pow(2).mean() > 0.1**2 * weights.pow(2).mean()


@pytest.mark.parametrize("classes", [2, 4])
def test_one_image_vector_for_all_samples_is_the_same_as_one_each(classes: int) -> None:
    head, (logits, features, bottleneck, text, image) = make(classes), inputs(classes)
    nn.init.constant_(head.gate, 1.0)
    one = head(logits, features, bottleneck, text, image[:1])
    each = head(logits, features, bottleneck, text, image[:1].expand(2, -1, -1))
    assert torch.allclose(one, each, atol=1e-4)


# ---- the gate ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_closed_gate_changes_no_bit_and_no_type(classes: int, dtype: torch.dtype) -> None:
    head, (logits, *rest) = make(classes), inputs(classes)
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        out = head(logits, *rest)
    assert out.dtype == dtype and torch.equal(out, logits)


@pytest.mark.parametrize("classes", [2, 4])
def test_a_closed_gate_changes_no_bit_where_the_head_overflows(classes: int) -> None:
    head, (logits, *rest) = make(classes), inputs(classes)
    last = head.classifier if classes == 2 else head.controller[-1]
    nn.init.constant_(last.weight, 1e38)
    assert not torch.isfinite(slow_semantics(head, *rest)).all()  # else this test shows nothing
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(head(logits, *rest), logits)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gate_gets_a_gradient_at_step_0(classes: int) -> None:
    head, (logits, *rest) = make(classes), inputs(classes)
    target = torch.randint(0, classes, (2, 6, 5, 4))
    F.cross_entropy(head(logits, *rest), target).backward()
    assert head.gate.item() == 0 and head.gate.grad.abs() > 1e-6
    # every other weight gets its turn once the gate has moved; none is missing, which DDP would wait for
    assert all(p.grad is not None for p in head.parameters())
    nn.init.constant_(head.gate, 0.1)
    head.zero_grad()
    F.cross_entropy(head(logits, *rest), target).backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_the_gates_gradient_is_the_semantic_maps_share() -> None:
    head, (logits, *rest) = make(3), inputs(3)
    weights = torch.randn_like(logits)
    (head(logits, *rest) * weights).sum().backward()
    expected = (slow_semantics(head, *rest) * weights).sum()
    assert torch.allclose(head.gate.grad, expected, rtol=1e-4)


def test_gradients_are_those_without_recomputation() -> None:
    head, (logits, features, bottleneck, text, image) = make(3), inputs(3)
    nn.init.constant_(head.gate, 0.5)
    features.requires_grad_()
    head(logits, features, bottleneck, text, image).square().sum().backward()
    got = [p.grad.clone() for p in head.parameters()] + [features.grad.clone()]
    head.zero_grad()
    features.grad = None
    kept = head.semantic_map(features, head.controlled(bottleneck, text, image))
    (logits + head.gate * kept).square().sum().backward()
    wanted = [p.grad for p in head.parameters()] + [features.grad]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, wanted))


# ---- any size ----------------------------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(
    classes=st.integers(2, 6),
    features=st.integers(1, 33),
    bottleneck=st.integers(1, 40),
    B=st.integers(1, 3),
)
def test_any_number_of_classes_and_channels(classes: int, features: int, bottleneck: int, B: int) -> None:
    head = make(classes, features=features, bottleneck=bottleneck)
    nn.init.constant_(head.gate, 1.0)
    logits, *rest = inputs(classes, B, features, bottleneck)
    out = head(logits, *rest)
    assert out.shape == logits.shape and torch.isfinite(out).all()
    assert head.reduction_norm.num_groups == math.gcd(16, features)


def test_a_bottleneck_of_one_voxel_is_finite() -> None:
    head, (logits, features, bottleneck, text, image) = make(3), inputs(3)
    nn.init.constant_(head.gate, 1.0)
    assert torch.isfinite(head(logits, features, bottleneck[..., :1, :1, :1], text, image)).all()


def test_heads_of_two_samples_do_not_mix() -> None:
    torch.manual_seed(0)
    reduced, weights = torch.randn(2, 8, 7), torch.randn(2, 3, 153)
    both = apply_heads(reduced, weights)
    for n in range(2):
        assert torch.allclose(both[n], apply_heads(reduced[n : n + 1], weights[n : n + 1])[0], atol=1e-5)
