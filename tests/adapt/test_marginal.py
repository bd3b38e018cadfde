"""The marginal loss against loops over voxels."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from nnunetv2_ext.adapt.marginal import merged_logits, merged_target, without_regions


def test_the_background_gets_the_probability_of_what_is_hidden() -> None:
    logits = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    p, q = logits.softmax(1), merged_logits(logits, [1, 3]).softmax(1)
    assert q.shape == (2, 3, 3, 4)
    assert torch.allclose(q[:, 0], p[:, 0] + p[:, 1] + p[:, 3])
    assert torch.allclose(q[:, 1:], p[:, [2, 4]])


def test_labels_are_renumbered_as_the_heads_and_the_ignore_label_stays() -> None:
    target = torch.tensor([0, 1, 2, 3, 4, 5], dtype=torch.int16).view(1, 1, 6)
    merged = merged_target(target, [1, 3], number=5)
    assert merged.flatten().tolist() == [0, 0, 1, 0, 2, 5] and merged.dtype == torch.int16


def test_the_loss_is_that_of_the_formula_written_out() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 4, 6, generator=generator)
    target = torch.tensor([[[0, 2, 3, 0, 2, 0]]])
    slow = 0.0
    for voxel in range(6):
        p = logits[0, :, voxel].softmax(0)
        label = int(target[0, 0, voxel])
        slow -= math.log(float(p[0] + p[1]) if label == 0 else float(p[label])) / 6
    fast = cross_entropy(merged_logits(logits, [1]), merged_target(target, [1], 4)[:, 0])
    assert float(fast) == pytest.approx(slow, rel=1e-5)


def test_where_the_hidden_class_wins_over_the_background_nothing_is_punished() -> None:
    logits = torch.tensor([0.0, 12.0, -5.0]).view(1, 3, 1).requires_grad_()
    target = torch.zeros(1, 1, 1)
    cross_entropy(merged_logits(logits, [1]), merged_target(target, [1], 3)[:, 0].long()).backward()
    plain = torch.tensor([0.0, 12.0, -5.0]).view(1, 3, 1).requires_grad_()
    cross_entropy(plain, target[:, 0].long()).backward()
    assert float(logits.grad[0, 1].abs()) < 1e-6 < 0.9 < float(plain.grad[0, 1].abs())


def test_a_hidden_region_leaves_the_target_and_the_ignore_mask_stays() -> None:
    target = torch.arange(4).view(1, 4, 1)  # three regions and the mask
    assert without_regions(target, [1], 3).flatten().tolist() == [0, 2, 3]
