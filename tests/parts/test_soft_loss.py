"""Soft targets: nnU-Net's own loss on one-hot ones, a slow reference for pooling and masks, DDP's ranks."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss import dice as nnunet_dice
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_ext.parts.soft_loss import soft_loss

IGNORE = 3


def nnunet_loss(regions: bool, batch_dice: bool, ignore: bool, ddp: bool = False) -> nn.Module:
    """As nnUNetTrainer._build_loss."""
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": regions, "ddp": ddp}
    if regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    label = IGNORE if ignore else None
    return DC_and_CE_loss(dice, {}, ignore_label=label, dice_class=MemoryEfficientSoftDiceLoss)


def wrapped(loss: nn.Module) -> DeepSupervisionWrapper:
    """Three resolutions, the lowest with weight 0."""
    return DeepSupervisionWrapper(loss, [2 / 3, 1 / 3, 0.0])


def blocks(size: tuple[int, ...], block: int, channels: int, high: int, seed: int) -> Tensor:
    """Random integers below `high`, constant in blocks of that edge."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(high, (2, channels, *(n // block for n in size)), generator=generator)
    for axis in range(2, small.ndim):
        small = small.repeat_interleave(block, axis)
    return small


def outputs_of(size: tuple[int, ...], channels: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [[n // f for n in size] for f in (1, 2, 4)]
    return [torch.randn(2, channels, *s, generator=generator, requires_grad=True) for s in shapes]


def lower(target: Tensor, size: tuple[int, ...]) -> list[Tensor]:
    """nnU-Net's targets, which are nearest voxels; `target` is constant in blocks of two."""
    slices = [tuple(slice(None, None, f) for _ in size) for f in (1, 2, 4)]
    return [target[(..., *s)] for s in slices]


@pytest.mark.parametrize("size", [(8, 12), (4, 8, 12)])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_one_hot_targets_give_nnunets_loss_and_gradient(size, batch_dice, ignore, regions):
    theirs, ours = outputs_of(size, 3), outputs_of(size, 3)
    loss = wrapped(nnunet_loss(regions, batch_dice, ignore))
    masked = blocks(size, 2, 1, 4, seed=5) == 0 if ignore else torch.zeros(2, 1, *size, dtype=torch.bool)
    if regions:
        hard = blocks(size, 2, 3, 2, seed=3)
        one_hot, labels = hard.float(), torch.cat((hard, masked), 1).float() if ignore else hard.float()
    else:
        hard = blocks(size, 2, 1, 3, seed=3)
        one_hot, labels = F.one_hot(hard[:, 0], 3).movedim(-1, 1).float(), torch.where(masked, IGNORE, hard)
    expected = loss(theirs, lower(labels, size))
    found = soft_loss(ours, one_hot, ~masked if ignore else None, loss)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    expected.backward(), found.backward()
    for their, our in zip(theirs[:2], ours[:2]):
        torch.testing.assert_close(our.grad, their.grad, atol=1e-6, rtol=0)
    assert ours[2].grad is None  # the lowest resolution has weight 0


def test_without_deep_supervision_one_tensor_counts_fully():
    logits, hard = outputs_of((8, 8), 3)[0], blocks((8, 8), 1, 1, 3, seed=2)
    one_hot = F.one_hot(hard[:, 0], 3).movedim(-1, 1)
    plain = nnunet_loss(False, True, False)
    expected = plain(logits, hard).item()
    assert soft_loss(logits, one_hot, None, plain).item() == pytest.approx(expected, abs=1e-6)
    assert soft_loss(logits, one_hot, None, wrapped(plain)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_a_slow_reference_for_soft_targets_pooled_under_a_mask(regions):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 4, 4, generator=generator)
    target = target if regions else target / target.sum(1, keepdim=True)
    mask = torch.rand(2, 1, 4, 4, generator=generator) > 0.5
    mask[0, 0, :2, :2] = False  # a whole block of the lower resolution
    logits = [torch.randn(2, 3, n, n, generator=generator) for n in (4, 2)]
    total = 0.0
    for level, (size, weight) in enumerate(((4, 0.75), (2, 0.25))):
        p = logits[level].sigmoid() if regions else logits[level].softmax(1)
        ce, weights, inter, sums = 0.0, 0.0, torch.zeros(3), torch.zeros(3)
        for b in range(2):
            for x in range(size):
                for y in range(size):
                    f = 4 // size
                    voxels = [(i, j) for i in range(x * f, x * f + f) for j in range(y * f, y * f + f)]
                    valid = [v for v in voxels if mask[(b, 0, *v)]]
                    if not valid:
                        continue
                    q = torch.stack([target[b, :, i, j] for i, j in valid]).mean(0)
                    m, here = len(valid) / len(voxels), p[b, :, x, y]
                    log = q * here.log() + ((1 - q) * (1 - here).log() if regions else 0)
                    # nnU-Net's mask for regions (ignore label) sums over the regions
                    ce, weights = ce - m * log.sum().item(), weights + m
                    inter, sums = inter + m * here * q, sums + m * (here + q)
        dice = (2 * inter + 1e-5) / (sums + 1e-5)
        total += weight * (ce / weights - (dice if regions else dice[1:]).mean().item())
    loss = DeepSupervisionWrapper(nnunet_loss(regions, True, ignore=True), [0.75, 0.25])
    assert soft_loss(logits, target, mask, loss).item() == pytest.approx(total, abs=1e-5)


def test_where_the_mask_is_zero_nothing_counts_not_even_nan():
    loss = wrapped(nnunet_loss(False, True, ignore=True))
    logits, hard = outputs_of((8, 8), 3), blocks((8, 8), 1, 1, 3, seed=2)
    target = F.one_hot(hard[:, 0], 3).movedim(-1, 1).float()
    mask = torch.ones(2, 1, 8, 8)
    mask[0] = 0
    spoilt = torch.where(mask > 0, target, torch.nan)
    value = soft_loss(logits, spoilt, mask, loss)
    assert value.item() == pytest.approx(soft_loss([x[1:] for x in logits], target[1:], None, loss).item(), abs=1e-6)
    value.backward()
    assert all(x.grad[0].abs().sum() == 0 and x.grad[1].abs().sum() > 0 for x in logits[:2])


def test_a_patch_without_any_valid_voxel_is_finite_and_teaches_nothing():
    loss, logits = wrapped(nnunet_loss(False, True, ignore=True)), outputs_of((8, 8), 3)
    value = soft_loss(logits, torch.full((2, 3, 8, 8), torch.nan), torch.zeros(2, 1, 8, 8), loss)
    value.backward()
    assert value.item() == pytest.approx(-1)  # Dice 1, as nnU-Net's for a patch that is ignored
    assert all((x.grad == 0).all() for x in logits[:2])


def test_wrong_shapes_and_a_foreign_loss_are_refused():
    logits, target = outputs_of((8, 8), 3), torch.rand(2, 3, 8, 8)
    loss = wrapped(nnunet_loss(False, True, False))
    with pytest.raises(ValueError, match="not MSELoss"):
        soft_loss(logits, target, None, nn.MSELoss())
    with pytest.raises(ValueError, match="does not fit logits"):
        soft_loss(logits, torch.rand(2, 2, 8, 8), None, loss)
    with pytest.raises(ValueError, match="does not fit logits"):
        soft_loss([logits[0], torch.rand(2, 3, 3, 4), logits[2]], target, None, loss)
    with pytest.raises(ValueError, match="the mask has shape"):
        soft_loss(logits, target, torch.ones(2, 8, 8), loss)
    with pytest.raises(ValueError, match="weighs 3 resolutions"):
        soft_loss(logits[:2], target, None, loss)


def test_ranks_share_one_dice_even_if_one_has_nothing_to_learn_from(monkeypatch):
    logits, target = outputs_of((8, 8), 3)[0], torch.rand(2, 3, 8, 8)
    mask = torch.ones(2, 1, 8, 8)
    mask[1] = 0  # of rank 1: if it skipped its Dice there, rank 0 would wait for ever
    halves = (slice(0, 1), slice(1, 2))
    loss = nnunet_loss(False, True, True, ddp=True)
    sent: list[list[Tensor]] = []

    def record(x: Tensor) -> Tensor:
        sent[-1].append(x)
        return x[None]

    monkeypatch.setattr(nnunet_dice.AllGatherGrad, "apply", record)
    for half in halves:
        sent.append([])
        soft_loss(logits[half], target[half], mask[half], loss)
    assert [len(tensors) for tensors in sent] == [3, 3]
    gathered = iter([torch.stack(pair) for pair in zip(*sent)] * 2)
    monkeypatch.setattr(nnunet_dice.AllGatherGrad, "apply", lambda x: next(gathered))
    first, second = (soft_loss(logits[half], target[half], mask[half], loss).item() for half in halves)
    alone = nnunet_loss(False, True, True)
    assert first == pytest.approx(soft_loss(logits, target, mask, alone).item(), abs=1e-6)  # has all valid voxels
    # no cross-entropy of its own, and the Dice of both
    assert second == pytest.approx(alone.dc(logits, target, loss_mask=mask).item(), abs=1e-6)
