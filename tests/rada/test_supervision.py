"""Must: what is ignored never influences a supervised loss or gradient, and what is outside the image never either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnunetv2_ext.rada.annotation.planes import Planes
from nnunetv2_ext.rada.network import MemberOutput
from nnunetv2_ext.rada.views import AXES, INSIDE, LazyTarget
from tests.rada.trainers import IGNORE

CLASSES = 3  # background and two organs; IGNORE comes after them
SHAPE = (8, 8, 4)
STRIDES = ((1, 1, 1), (2, 2, 1), (2, 2, 2))  # of the resolutions with a loss


@pytest.fixture(params=["pool", "off"])
def supervised(make_rada, sparse_tiny, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """``supervised(target, mask, logits)``: the trainer's supervised loss, and the gradients of the logits."""
    plans = sparse_tiny.plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {
        "strides": [*map(list, STRIDES), [2, 2, 2], [1, 1, 1]],
        "n_stages": 5,
        "features_per_stage": [4] * 5,
        "kernel_sizes": [[3, 3, 3]] * 5,
        "n_conv_per_stage": [1] * 5,
        "n_conv_per_stage_decoder": [1] * 4,
    }
    trainer = make_rada(f"rada.deep_supervision={request.param} rada.num_networks=1 rada.lambda_max=0", plans=plans)
    trainer.initialize()
    assert [tuple(stride) for stride in trainer.strides] == list(STRIDES)

    def loss_and_gradients(target: Tensor, mask: int, logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        trainer.masks = (mask,)
        leaves = [level.clone().requires_grad_() for level in logits]
        output = MemberOutput(leaves[0] if request.param == "off" else leaves, leaves[0])
        loss = trainer._supervised_loss(0, output, target)
        loss.backward()
        return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    loss_and_gradients.levels = 1 if request.param == "off" else len(STRIDES)
    return loss_and_gradients


def random_logits(seed: int) -> list[Tensor]:
    generator, shape, levels = torch.Generator().manual_seed(seed), np.array(SHAPE), []
    for stride in STRIDES:
        shape = shape // np.array(stride)
        levels.append(3 * torch.randn(2, CLASSES, *shape, generator=generator))
    return levels


def supervised_voxels(target: Tensor, mask: int) -> np.ndarray:
    """S_k, (B, X, Y, Z), voxel by voxel: labelled, and on a plane the network holds."""
    label, bits = target[:, 0].numpy(), target[:, 1].numpy()
    found = np.zeros(label.shape, bool)
    for voxel in np.ndindex(*label.shape):
        held = [axis for axis in range(3) if mask >> axis & 1 and bits[voxel] >> axis & 1]
        found[voxel] = bool(held) and label[voxel] != IGNORE
    return found


def blocks_with(found: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The blocks of a lower resolution, (B, *shape), in which any voxel is."""
    factors = [n // m for n, m in zip(found.shape[1:], shape, strict=True)]
    blocks = np.zeros((len(found), *shape), bool)
    for sample, *block in np.ndindex(*blocks.shape):
        inside = tuple(slice(i * f, (i + 1) * f) for i, f in zip(block, factors, strict=True))
        blocks[(sample, *block)] = found[(sample, *inside)].any()
    return blocks


def require_only(found: np.ndarray, supervised: Any, target: Tensor, mask: int, seed: int) -> None:
    """No gradient outside ``found``, some inside; another label there changes nothing, inside it does."""
    logits, outside = random_logits(seed), ~torch.from_numpy(found)
    loss, gradients = supervised(target, mask, logits)
    assert torch.isfinite(loss) and len(gradients) == supervised.levels
    for gradient in gradients:
        blocks = torch.from_numpy(blocks_with(found, gradient.shape[2:]))
        size = gradient.abs().sum(1)
        assert bool((size[~blocks] == 0).all()) and bool((size[blocks] > 0).all())
    random = torch.Generator().manual_seed(seed + 1)
    noise = torch.randint(0, CLASSES, outside.shape, generator=random).to(target.dtype)
    # a hidden truth has no bit of the network's; a voxel with the bit and the ignore label keeps that
    hidden = outside & ((target[:, 1] & mask & AXES) == 0)
    other = target.clone()
    other[:, 0] = torch.where(hidden, noise, target[:, 0])
    again, again_gradients = supervised(other, mask, logits)
    assert torch.equal(again, loss) and all(map(torch.equal, again_gradients, gradients))
    if found.any():
        other[:, 0] = torch.where(outside, target[:, 0], (target[:, 0] + 1) % CLASSES)
        assert not torch.equal(supervised(other, mask, logits)[0], loss)


_masks = st.sampled_from([0b001, 0b011, 0b101, 0b110, 0b111])
_seeds = st.integers(0, 10_000)


def test_ignored_voxels_and_planes_of_others_have_no_influence(supervised):
    @settings(max_examples=25, deadline=None)
    @given(mask=_masks, seed=_seeds, annotated=st.sampled_from([0.0, 0.02, 0.2, 1.0]), bit=st.sampled_from([0.1, 0.5]))
    def check(mask: int, seed: int, annotated: float, bit: float) -> None:
        random = np.random.default_rng(seed)
        label = random.integers(0, CLASSES, (2, *SHAPE))
        label[random.random(label.shape) >= annotated] = IGNORE
        bits = sum((random.random(label.shape) < bit) << axis for axis in range(3)) | INSIDE
        bits[random.random(label.shape) < 0.2] = 0  # padding, with whatever label
        target = torch.from_numpy(np.stack([label, bits], 1).astype(np.int16))
        require_only(supervised_voxels(target, mask), supervised, target, mask, seed)

    check()


def test_padding_of_nnunets_own_crop_is_never_supervised(supervised):
    """Patches that reach over the image's border, as the loader cuts them, and voxels outside the body (-1)."""

    @settings(max_examples=25, deadline=None)
    @given(mask=_masks, seed=_seeds, corners=st.tuples(*[st.tuples(*[st.integers(-3, 3)] * 3)] * 2))
    def check(mask: int, seed: int, corners: tuple[tuple[int, ...], ...]) -> None:
        shape, random = (6, 7, 5), np.random.default_rng(seed)
        planes = Planes(tuple((int(random.integers(n)),) if random.random() < 0.7 else () for n in shape))
        dense = random.integers(0, CLASSES, shape)
        label = np.full(shape, IGNORE)
        for axis, indices in enumerate(planes.indices):
            where = (slice(None),) * axis + (list(indices),)
            label[where] = dense[where]
        label[0, 0] = -1
        sparse = LazyTarget(label[None].astype(np.int8), IGNORE, planes)
        boxes = [[[c, c + s] for c, s in zip(corner, SHAPE, strict=True)] for corner in corners]
        target = np.stack([crop_and_pad_nd(sparse, box, -1, cast_cropped_to=np.int16) for box in boxes])
        target[target == -1] = 0  # nnU-Net's RemoveLabelTansform(-1, 0), for both channels
        found = np.zeros((2, *SHAPE), bool)
        for sample, *voxel in np.ndindex(*found.shape):
            at = tuple(v + c for v, c in zip(voxel, corners[sample], strict=True))
            if all(0 <= a < n for a, n in zip(at, shape, strict=True)):
                held = any(mask >> axis & 1 and at[axis] in planes.indices[axis] for axis in range(3))
                found[(sample, *voxel)] = held and label[at] != IGNORE
        require_only(found, supervised, torch.from_numpy(target), mask, seed)

    check()
