"""Reading, prototypes and the loss of the transported mask, against slow loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nnunetv2_ext.jras.read import (
    FLOOR,
    GuideFeatures,
    Reader,
    class_sums,
    mass_recall,
    prototype_similarity,
    transported_loss,
)

B, K, D, V, M = 2, 3, 6, 5, 3
SIZE = (4, 3)


@pytest.fixture
def reader():
    torch.manual_seed(0)
    made = Reader(7, D, V, 2)
    made.log_scale.data.fill_(0.7)
    return made


def guides_of(reader, known=None, number=K, seed=1):
    """`(B, number)` guides, their features, masks `(B * number, M, 8, 6)` and where they are known."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B * number, 7, *SIZE, generator=generator)
    fine = [torch.randn(B * number, c, *s, generator=generator) for c, s in ((4, (8, 6)), (7, SIZE))]
    labels = torch.randint(0, M, (B * number, 8, 6), generator=generator)
    known = torch.ones(B * number, 1, 8, 6, dtype=torch.bool) if known is None else known
    masks = F.one_hot(labels, M).movedim(-1, 1).float() * known
    return reader.guide_features(features, fine, masks, known).unflatten(B), features, fine, masks


def queries(reader):
    keys = reader.keys(torch.randn(B, 7, *SIZE, generator=torch.Generator().manual_seed(2)))
    return keys, reader.query_vectors(keys)


def test_the_read_is_attention_over_all_cells_with_the_score_as_bias(reader):
    guides, features, _, masks = guides_of(reader)
    keys, vectors = queries(reader)
    found = reader(keys, vectors, guides)
    temperature, scale = 10.0, math.exp(0.7)
    cells = F.avg_pool2d(masks, 2)
    for b in range(B):
        for x in range(keys.shape[1]):
            weights, values = [], []
            for k in range(K):
                row = b * K + k
                score = scale * float(vectors[b] @ guides.vectors[b, k])
                for y in range(SIZE[0] * SIZE[1]):
                    i, j = divmod(y, SIZE[1])
                    cell = features[row, :, i, j]
                    key = F.normalize(reader.key.weight[:, :, 0, 0] @ cell, dim=0)
                    weights.append(math.exp(temperature * float(keys[b, x] @ key) + score))
                    values.append(torch.cat((cells[row, :, i, j], reader.value.weight[:, :, 0, 0] @ cell)))
            expected = sum(w * v for w, v in zip(weights, values)) / sum(weights)
            assert torch.allclose(found[b, x], expected, atol=1e-4)
    assert torch.allclose(found[..., :M].sum(2), torch.ones(B, keys.shape[1]), atol=1e-5)


def test_masses_are_the_sums_of_the_weights(reader):
    guides, *_ = guides_of(reader)
    keys, vectors = queries(reader)
    masses = reader.masses(keys, vectors, guides)
    # one value that marks a guide reads its mass
    for k in range(K):
        marked = guides._replace(values=torch.zeros_like(guides.values).index_fill(1, torch.tensor([k]), 1.0))
        assert torch.allclose(reader(keys, vectors, marked)[..., 0].mean(1), masses[:, k], atol=1e-5)
    without = reader.masses(keys, vectors, guides, False)
    assert not torch.allclose(without, masses, atol=1e-3) and torch.allclose(without.sum(1), torch.ones(B))


def test_order_and_a_second_copy_of_all_guides_change_nothing(reader):
    guides, *_ = guides_of(reader)
    keys, vectors = queries(reader)
    straight = reader(keys, vectors, guides)
    features = torch.randn(B, 4, 8, 6)
    similar = prototype_similarity(features, guides.sums[0], guides.counts[0])

    def every(change):
        parts = [change(part) for part in guides[:4]]
        return GuideFeatures(*parts, *(tuple(change(p) for p in level) for level in guides[4:]))

    for change in (lambda t: t[:, [2, 0, 1]], lambda t: torch.cat((t, t), 1)):
        other = every(change)
        assert torch.allclose(reader(keys, vectors, other), straight, atol=1e-5)
        assert torch.allclose(prototype_similarity(features, other.sums[0], other.counts[0]), similar, atol=1e-5)


def test_cells_without_annotation_are_not_read(reader):
    known = torch.ones(B * K, 1, 8, 6, dtype=torch.bool)
    known[:, :, :, :4] = False  # the first two of three columns of cells
    guides, *_ = guides_of(reader, known)
    keys, vectors = queries(reader)
    found = reader(keys, vectors, guides)
    shown = guides._replace(values=torch.where(guides.bias[..., None] < 0, 1e6, guides.values))
    assert torch.equal(reader(keys, vectors, shown), found)
    nothing, *_ = guides_of(reader, torch.zeros_like(known))
    blind = reader(keys, vectors, nothing)
    assert torch.isfinite(blind).all() and blind[..., :M].abs().max() == 0


def test_the_loss_teaches_both_vectors_of_the_retriever(reader):
    guides, *_ = guides_of(reader)
    keys, vectors = queries(reader)
    reader(keys, vectors, guides)[..., 0].square().sum().backward()
    for part in (reader.query_vector, reader.guide_vector):
        assert part.weight.grad.abs().max() > 1e-6
    assert reader.log_scale.grad.abs() > 0


def test_prototypes_are_cosines_to_the_classes_around_their_mean():
    generator = torch.Generator().manual_seed(0)
    features, of_guides = (torch.randn(n, 5, 4, 4, generator=generator) for n in (1, 2))
    labels = torch.randint(0, 3, (2, 4, 4), generator=generator)
    masks = F.one_hot(labels, 3).movedim(-1, 1).float()
    sums, counts = (part[None] for part in class_sums(of_guides, masks))
    found = prototype_similarity(features, sums, counts)[0]
    cells = of_guides.movedim(1, -1)
    prototypes = [cells[labels == m].mean(0) for m in range(3)]
    centre = torch.stack(prototypes).mean(0)
    for m in range(3):
        for i in range(4):
            for j in range(4):
                expected = F.cosine_similarity(features[0, :, i, j] - centre, prototypes[m] - centre, dim=0)
                assert found[m, i, j] == pytest.approx(float(expected), abs=1e-4)


def test_a_class_that_no_guide_shows_has_the_floor_and_all_is_finite():
    features = torch.randn(1, 5, 4, 4, requires_grad=True)
    masks = torch.zeros(2, 3, 4, 4)
    masks[:, 0] = 1
    sums, counts = (part[None] for part in class_sums(torch.randn(2, 5, 4, 4), masks))
    found = prototype_similarity(features, sums, counts)
    assert (found[:, 1:] == FLOOR).all() and torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("regions", [False, True])
def test_the_transported_loss_is_the_cross_entropy_over_known_cells(regions):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1, 2, 2, 2, generator=generator)
    p = p if regions else p / p.sum(1, keepdim=True)
    masks = torch.randint(0, 2, (1, 2, 4, 4), generator=generator).float()
    known = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    known[..., :2, :2] = False  # a whole cell
    known[..., 0, 2] = False  # a quarter of one
    masks = masks * known
    total = 0.0
    for i, j in ((0, 1), (1, 0), (1, 1)):
        window = (slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
        number = known[0, 0][window].sum()
        for m in range(2):
            q, share = 0.98 * float(p[0, m, i, j]) + 0.01, float(masks[0, m][window].sum() / number)
            total -= share * math.log(q) + ((1 - share) * math.log(1 - q) if regions else 0)
    assert float(transported_loss(p, masks, known, regions)) == pytest.approx(total / 3, rel=1e-4)
    assert float(transported_loss(p, masks, torch.zeros_like(known), regions)) == 0


def test_recall_is_one_for_the_guides_with_the_most_mass_and_less_for_others(reader):
    guides, *_ = guides_of(reader, number=8)
    bank = GuideFeatures(*(part[0] for part in guides[:4]), (), ())
    keys, vectors = (part[:1] for part in queries(reader))
    own = torch.zeros(1, 8, dtype=torch.bool)
    order = reader.masses(keys, vectors, GuideFeatures(*(part[:1] for part in guides[:4]), (), ()), False)[0].argsort(
        descending=True
    )
    valid = torch.ones(1, 3, dtype=torch.bool)

    def recall(ids: torch.Tensor) -> float:
        return mass_recall(reader, bank, own, keys, vectors, ids[None], valid)

    assert recall(order[:3]) == pytest.approx(1, abs=1e-5)
    assert recall(order[-3:]) < recall(order[1:4]) < 1
    own[0, order[0]] = True  # a guide that the query must not get is no miss
    assert recall(order[1:4]) == pytest.approx(1, abs=1e-4)
