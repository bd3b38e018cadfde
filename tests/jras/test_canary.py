"""The leak canary: masks that nothing but the own guide tells. A leaking network learns them, an honest one cannot.

Every step draws new cases of pure noise, with a quadrant as mask that the image says nothing about, and puts them
into the bank.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from nnunetv2_ext.jras.network import Exclusion, excluding

CASES, SIDE, LOW = 8, 16, 8


def draw_cases(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, 16, 16) and label maps (n, 8, 8)."""
    images = torch.randn(CASES, 1, LOW, LOW, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    labels = torch.zeros(CASES, LOW, LOW, dtype=torch.uint8)
    for label, quadrant in zip(labels, torch.randint(0, 4, (CASES,), generator=generator).tolist()):
        label[4 * (quadrant // 2) : 4 * (quadrant // 2) + 4, 4 * (quadrant % 2) : 4 * (quadrant % 2) + 4] = 1
    return images, labels


def final_dice(make_network, leaks: bool) -> float:
    network = make_network(2, fusion="concat", num_guides=1, guide_dropout=0.0, tau=0.05)
    network.decoder.deep_supervision = False
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    generator, scores = torch.Generator().manual_seed(0), []
    for number in range(160):
        images, labels = draw_cases(generator)
        network.bank.fill(F.adaptive_avg_pool2d(images, LOW), labels, torch.arange(CASES), network.bank.lut)
        network.bank.set_keys(network.embed_bank())
        with nullcontext() if leaks else excluding(Exclusion(torch.arange(CASES))):
            logits = network(images)
        own = network.last.ids[:, 0] == torch.arange(CASES)
        assert own.all() if leaks else not own.any()
        target = labels.long().repeat_interleave(2, 1).repeat_interleave(2, 2)
        optimizer.zero_grad()
        F.cross_entropy(logits, target).backward()
        optimizer.step()
        found = logits.argmax(1) == 1
        if number >= 140:
            scores.append(float(2 * (found & (target == 1)).sum() / (found.sum() + (target == 1).sum())))
    return sum(scores) / len(scores)


def test_only_a_leaking_network_learns_what_only_the_own_guide_tells(make_network):
    honest, leaking = final_dice(make_network, leaks=False), final_dice(make_network, leaks=True)
    assert leaking > 0.9
    assert honest < 0.45  # a quadrant guessed: 0.25 at best, everything marked: 0.4
