"""The leak canary: masks that nothing but the own guide tells. A leaking network learns them, an honest one cannot.

Every step draws new cases of pure noise, with a quadrant as mask that the image says nothing about.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nnunetv2_ext.jras.network import Episode, reading

CASES, SIDE = 6, 16


def draw_cases(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 16, 16) and label maps (n, 16, 16)."""
    images = torch.randn(CASES, 1, 8, 8, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.zeros(CASES, SIDE, SIDE, dtype=torch.int64)
    for label, quadrant in zip(labels, torch.randint(0, 4, (CASES,), generator=generator).tolist()):
        label[8 * (quadrant // 2) : 8 * (quadrant // 2) + 8, 8 * (quadrant % 2) : 8 * (quadrant % 2) + 8] = 1
    return images, labels


def final_dice(make_network, leaks: bool) -> float:
    network = make_network(2, guides=0, moved=False, guides_with_gradient=2)
    network.decoder.deep_supervision = False
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    generator, scores = torch.Generator().manual_seed(0), []
    for number in range(140):
        images, labels = draw_cases(generator)
        masks = F.one_hot(labels, 3).movedim(-1, 1).float()
        # guides of a sample: two other cases, or one of them is the sample itself
        rows = torch.stack([torch.arange(CASES).roll(-1), torch.arange(CASES).roll(0 if leaks else -2)], 1)
        known = torch.ones(CASES, 2, 1, SIDE, SIDE, dtype=torch.bool)
        with reading(Episode(images[rows], masks[rows], known, torch.ones(CASES, dtype=torch.bool))):
            logits = network(images)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        found = logits.argmax(1) == 1
        if number >= 120:
            scores.append(float(2 * (found & (labels == 1)).sum() / (found.sum() + (labels == 1).sum())))
    return sum(scores) / len(scores)


def test_only_a_leaking_network_learns_what_only_the_own_guide_tells(make_network):
    honest, leaking = final_dice(make_network, leaks=False), final_dice(make_network, leaks=True)
    assert leaking > 0.85
    assert honest < 0.45  # a quadrant guessed: 0.25 at best, everything marked: 0.4
