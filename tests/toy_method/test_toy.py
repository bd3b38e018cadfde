"""The toy's mathematics, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .loss import NEVER_SEEN, IntensityHead, foreground_probability, intensity_loss, running_mean


def test_foreground_probability_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # two voxels, three classes
    logits = p.log().T[None]  # (1, 3, 2)
    assert foreground_probability(logits, regions=False).tolist() == pytest.approx([(0.3 + 0.9) / 2])
    assert foreground_probability(torch.logit(p).T[None], regions=True).tolist() == pytest.approx([(0.7 + 0.6) / 2])


@pytest.mark.parametrize("space", [(5, 4), (3, 4, 2)])
def test_head_is_a_weighted_sum_of_logits(space):
    head = IntensityHead(3)
    head.bias.data.fill_(0.5)
    logits, image = torch.randn(2, 3, *space), torch.randn(2, 2, *space)
    loss = 0.0
    weight = head.weight.tolist()
    for b in range(2):
        for place in np.ndindex(*space):
            predicted = 0.5 + sum(weight[c] * float(logits[b, c][place]) for c in range(3))
            loss += (predicted - float(image[b, 0][place])) ** 2
    assert intensity_loss(head(logits), image).item() == pytest.approx(loss / (2 * np.prod(space)), rel=1e-5)


def test_running_mean_starts_with_the_first_value():
    old = np.array([NEVER_SEEN, 0.0, 0.5, 1.0])
    assert running_mean(old, 0.25, 0.5).tolist() == [0.25, 0.125, 0.375, 0.625]
