"""The contrastive loss: the overlap S against a slow reference, and a retriever that learns shapes from it alone."""

from __future__ import annotations

import math

import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.jras.contrastive import (
    Masks,
    flip,
    mask_overlap,
    masks_of_target,
    nt_xent,
    overlap_loss,
    perturb,
    pool_masks,
)
from nnunetv2_ext.jras.encoder import Retriever
from nnunetv2_ext.jras.labels import low_res_labels


def masks_of(labels: torch.Tensor, classes: int = 2) -> Masks:
    """Classes 1.. of integer labels (n, *L), 255 = not annotated."""
    one_hot = torch.stack([labels == value for value in range(1, classes + 1)], 1)
    return pool_masks(one_hot, labels != 255)


def slow_overlap(a: torch.Tensor, b: torch.Tensor, classes: int = 2) -> float:
    """S of two label maps without pooling, voxel by voxel."""
    scores = []
    for value in range(1, classes + 1):
        common = total = 0
        for x, y in zip(a.flatten().tolist(), b.flatten().tolist()):
            if 255 not in (x, y):
                common += min(x == value, y == value)
                total += (x == value) + (y == value)
        if total:
            scores.append(2 * common / total)
    return sum(scores) / len(scores) if scores else 1.0


@pytest.fixture
def labels() -> torch.Tensor:
    """Five maps of 6 x 6 with two classes; the last two are empty, the third has a part that is not annotated."""
    maps = torch.randint(0, 3, (5, 6, 6), generator=torch.Generator().manual_seed(0))
    maps[2, :3] = 255
    maps[3:] = 0
    return maps


def test_overlap_equals_the_slow_reference(labels):
    found = mask_overlap(masks_of(labels), masks_of(labels))
    expected = [[slow_overlap(a, b) for b in labels] for a in labels]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


def test_overlap_of_equal_disjoint_and_empty_masks(labels):
    disjoint = torch.where(labels[:1] == 1, 2, torch.where(labels[:1] == 2, 1, 0))
    empty = torch.zeros_like(labels[:1])
    all_of_them = masks_of(torch.cat((labels[:1], disjoint, empty, empty)))
    assert mask_overlap(all_of_them, all_of_them).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_overlap_is_symmetric(labels):
    found = mask_overlap(masks_of(labels), masks_of(labels))
    assert torch.allclose(found, found.T, atol=1e-6)


def test_what_is_not_annotated_has_no_influence(labels):
    other = labels.clone()
    other[0, :3] = 255
    hidden = torch.where(other == 255, torch.randint(0, 3, other.shape), other)
    annotated = other != 255
    one_hot = torch.stack([hidden == 1, hidden == 2], 1)
    known, unknown = masks_of(other), pool_masks(one_hot & annotated[:, None], annotated)
    assert torch.equal(mask_overlap(known, known), mask_overlap(unknown, unknown))


def test_regions_may_share_cells():
    whole, core = torch.zeros(1, 6, 6), torch.zeros(1, 6, 6)
    whole[0, :4], core[0, :2] = 1, 1
    tumour = pool_masks(torch.stack((whole, core), 1), torch.ones(1, 6, 6, dtype=torch.bool))
    without_core = pool_masks(torch.stack((whole, torch.zeros_like(core)), 1), torch.ones(1, 6, 6, dtype=torch.bool))
    assert mask_overlap(tumour, without_core).item() == 0.5


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_a_batchs_masks_follow_the_rule_of_the_banks_labels(ignore_label):
    target = torch.randint(
        0, 3 if ignore_label is None else 4, (3, 1, 16, 16), generator=torch.Generator().manual_seed(1)
    )
    target[0, 0, :8] = 0  # organs of a few voxels
    target[0, 0, 2, 2:4] = 1
    classes = {"background": 0, "a": 1, "b": 2} | ({} if ignore_label is None else {"ignore": ignore_label})
    found = masks_of_target(target.to(torch.int16), (8, 8), LabelManager(classes, None))
    stored = torch.stack(
        [low_res_labels(t[0], (8, 8), t[0] == (-1 if ignore_label is None else ignore_label)) for t in target]
    )
    expected = masks_of(stored)
    assert torch.equal(found.annotated, expected.annotated) and torch.allclose(found.share, expected.share)


def test_a_batchs_regions_come_channel_by_channel():
    target = torch.zeros(1, 3, 16, 16, dtype=torch.bool)
    target[0, 0, :8], target[0, 1, :4], target[0, 2, :, 8:] = True, True, True  # whole, core, ignored
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    found = masks_of_target(target, (8, 8), LabelManager(labels, [1, 2]))
    assert found.share[0, 0, :, :4].tolist() == [[1] * 4] * 4 + [[0] * 4] * 4
    assert found.share[0, 1, :, :4].sum() == 8
    assert found.annotated[0].tolist() == [[1] * 4 + [0] * 4] * 8


def test_the_overlap_loss_by_hand():
    similarities, overlap = torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 0.9]])
    target = torch.tensor([math.e / (math.e + 1), 1 / (math.e + 1)])  # (1.0 - 0.9) / 0.1 = 1
    logarithm = torch.log_softmax(torch.tensor([1.8, 0.2]), 0)
    allowed = torch.ones(1, 2, dtype=torch.bool)
    loss = overlap_loss(similarities, overlap, allowed, tau=0.5)
    assert loss.item() == pytest.approx(-(target * logarithm).sum().item(), rel=1e-5)


def test_candidates_of_the_own_subject_do_not_count():
    similarities = torch.tensor([[0.9, 0.1, 0.5]], requires_grad=True)
    allowed = torch.tensor([[True, True, False]])
    loss = overlap_loss(similarities, torch.tensor([[1.0, 0.5, 0.8]]), allowed, 0.1)
    loss.backward()
    assert similarities.grad[0, 2] == 0 and similarities.grad[0, 0] != 0
    without = overlap_loss(similarities[:, :2], torch.tensor([[1.0, 0.5]]), allowed[:, :2], 0.1)
    assert loss.item() == pytest.approx(without.item())


def test_nt_xent_equals_the_slow_reference():
    torch.manual_seed(0)
    first, second = (torch.nn.functional.normalize(torch.randn(3, 5), dim=1) for _ in range(2))
    views, total = [*first, *second], 0.0
    for i, view in enumerate(views):
        others = {j: math.exp(float(view @ other) / 0.2) for j, other in enumerate(views) if j != i}
        total -= math.log(others[(i + 3) % 6] / sum(others.values()))
    assert nt_xent(first, second, 0.2).item() == pytest.approx(total / 6, rel=1e-5)


def test_flips_mirror_sample_by_sample_and_masks_alike():
    x = torch.arange(24.0).reshape(2, 1, 3, 4)
    flips = torch.tensor([[True, False], [False, True]])
    turned = flip(x, flips)
    assert torch.equal(turned[0], x[0].flip(1)) and torch.equal(turned[1], x[1].flip(2))
    assert torch.equal(flip(turned, flips), x)


def test_views_differ_and_stay_near_the_patch():
    x = torch.randn(4, 2, 8, 8, 8) * 100 + 7
    generator = torch.Generator().manual_seed(0)
    one, other = perturb(x, generator), perturb(x, generator)
    assert (one - other).abs().mean() > 1
    both = torch.stack((x.flatten(), one.flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_contrastive_training_alone_learns_to_find_the_same_shape():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    side, n = 8, 48
    shapes = torch.zeros(4, side, side, dtype=torch.bool)
    shapes[0, 1:7, 3:5], shapes[1, 3:5, 1:7], shapes[2, 2:6, 2:6] = True, True, True
    shapes[3] = torch.eye(side, dtype=torch.bool) | torch.eye(side, dtype=torch.bool).roll(1, 1)

    def draw(number: int) -> tuple[torch.Tensor, torch.Tensor, Masks]:
        kind = torch.randint(0, 4, (number,), generator=generator)
        mask = shapes[kind]
        image = mask[:, None].float() + 0.5 * torch.randn(number, 1, side, side, generator=generator)
        return (
            image * (0.5 + torch.rand(number, 1, 1, 1, generator=generator)),
            kind,
            pool_masks(mask[:, None], mask | ~mask),
        )

    images, kinds, masks = draw(n)
    tests, test_kinds, _ = draw(40)

    def top1(retriever: Retriever) -> float:
        with torch.no_grad():
            nearest = (retriever(tests) @ retriever(images).T).argmax(1)
        return float((kinds[nearest] == test_kinds).float().mean())

    retriever = Retriever(1, (side, side), [8, 16, 16], key_dim=16)
    optimizer = torch.optim.SGD(retriever.parameters(), 0.03, momentum=0.9)
    for _ in range(120):
        rows = torch.randperm(n, generator=generator)[:16]
        first, second = (retriever(perturb(images[rows], generator)) for _ in range(2))
        overlap = mask_overlap(*[Masks(masks.share[rows], masks.annotated[rows])] * 2)
        loss = overlap_loss(first @ second.T, overlap, torch.ones_like(overlap, dtype=torch.bool), 0.1)
        optimizer.zero_grad()
        (loss + nt_xent(first, second, 0.1)).backward()
        optimizer.step()
    assert top1(retriever) > 0.9
