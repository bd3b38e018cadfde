"""Targets: what a network may see, and pooling against a slow loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.rada.targets import (
    pooled_targets,
    propagated_loss,
    propagated_target,
    spread_axes,
    supervised,
    supervised_target,
    unannotated,
)

IGNORE = 3


def slow_pool(label: torch.Tensor, factor: tuple[int, ...]) -> torch.Tensor:
    B, _, *shape = label.shape
    out = torch.full((B, 1, *(n // f for n, f in zip(shape, factor))), IGNORE, dtype=label.dtype)
    for b in range(B):
        for cell in itertools.product(*(range(n) for n in out.shape[2:])):
            block = label[(b, 0, *(slice(i * f, (i + 1) * f) for i, f in zip(cell, factor)))].flatten().tolist()
            votes = [value for value in block if value != IGNORE]
            if votes:  # max keeps the first of equals
                out[(b, 0, *cell)] = max(sorted(set(votes)), key=votes.count)
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_pooling_equals_a_slow_loop_with_anisotropic_blocks(seed, share):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (2, 1, 4, 8, 4), generator=generator).to(torch.int16)
    label[torch.rand(label.shape, generator=generator) >= share] = IGNORE
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 1]]
    pooled = pooled_targets(label, strides, 3, IGNORE)
    for target, factor in zip(pooled, [(1, 1, 1), (1, 2, 2), (2, 4, 2)], strict=True):
        assert target.dtype == label.dtype and torch.equal(target, slow_pool(label, factor))


def test_ties_go_to_the_smaller_label_and_empty_blocks_stay_ignored():
    label = torch.full((1, 1, 2, 2, 4), IGNORE, dtype=torch.int16)
    label[0, 0, 0, :, 0] = torch.tensor([2, 1])
    assert pooled_targets(label, [[2, 2, 2]], 3, IGNORE)[0].flatten().tolist() == [1, IGNORE]


def test_a_single_plane_survives_at_every_level():
    label = torch.full((1, 1, 16, 16, 16), IGNORE, dtype=torch.int16)
    label[:, :, 7] = 1
    for target in pooled_targets(label, [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]], 2, IGNORE):
        annotated = (target != IGNORE).sum(2)
        assert (annotated == 1).all() and (target.amin() == 1)


def test_a_patch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match=r"\(6, 8, 8\).*cannot be divided"):
        pooled_targets(torch.zeros(1, 1, 6, 8, 8), [[1, 1, 1], [2, 2, 2], [2, 2, 2]], 2, IGNORE)


def test_supervision_needs_a_label_and_a_bit_of_the_view():
    #        annotated on axis 0, on axis 1 and 2, without a bit, bit without label, padding, scribble
    label = torch.tensor([1, 2, 1, IGNORE, 0, 2])
    bits = torch.tensor([9, 14, 8, 9, 0, 15])
    target = torch.stack((label, bits))[None, :, :, None, None].to(torch.int16)
    for mask, expected in {
        0b001: [1, IGNORE, IGNORE, IGNORE, IGNORE, 2],
        0b110: [IGNORE, 2, IGNORE, IGNORE, IGNORE, 2],
        0b111: [1, 2, IGNORE, IGNORE, IGNORE, 2],
        0b1111: [1, 2, IGNORE, IGNORE, IGNORE, 2],  # bit 3 says inside, it never supervises
    }.items():
        assert supervised_target(target, mask, IGNORE).flatten().tolist() == expected
    assert unannotated(target, IGNORE).flatten().tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("mask", "plane_axes", "expected"),
    [
        (0b011, (0, 1, 2), (2,)),
        (0b101, (0, 1, 2), (1,)),
        (0b110, (0, 1, 2), (0,)),
        (0b001, (0, 2), (2,)),  # two axes: network 2 holds one, network 1 both
        (0b101, (0, 2), (0, 2)),
        (0b111, (1,), (1,)),
        (0b111, (), ()),
    ],
)
def test_a_network_takes_what_was_spread_from_the_axes_it_does_not_hold(mask, plane_axes, expected):
    assert spread_axes(mask, plane_axes) == expected


def test_the_nearest_plane_wins_and_annotation_and_padding_have_none():
    #          nearer on axis 1, only axis 0, none, annotated in view, padding, annotated out of view, label lost
    label = [IGNORE, IGNORE, IGNORE, 2, 0, 1, IGNORE]
    bits = [8, 8, 8, 8 | 4, 0, 8 | 1, 8]
    spread = [[1, 2, IGNORE, 2, 0, 1, IGNORE], [2, IGNORE, IGNORE, 2, 0, 1, IGNORE], [0] * 7]
    far = [[3, 4, 255, 0, 0, 0, 2], [2, 255, 255, 0, 0, 0, 255], [1] * 7]
    target = torch.tensor([label, bits, *spread, *far])[None, :, :, None, None].to(torch.int16)
    found, distance = propagated_target(target, 0b100, (0, 1), IGNORE, 255)
    assert found.flatten().tolist() == [2, 2, IGNORE, IGNORE, IGNORE, 1, IGNORE]
    assert distance.flatten().tolist() == [2, 4, 255, 255, 255, 0, 255]


def test_the_loss_of_spread_labels_is_weighted_and_divided_by_their_number():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 2, 2, 2, generator=generator)
    label = torch.tensor([0, 1, 2, IGNORE, IGNORE, IGNORE, IGNORE, 1]).view(1, 2, 2, 2)
    weight = torch.tensor([1, 0.5, 0.25, 0, 9, 0, 0, 0.0]).view(1, 2, 2, 2)
    terms = [-logits.log_softmax(1)[(0, c, *i)] for c, i in zip((0, 1, 2), ((0, 0, 0), (0, 0, 1), (0, 1, 0)))]
    expected = (terms[0] + 0.5 * terms[1] + 0.25 * terms[2]) / 4
    torch.testing.assert_close(propagated_loss(logits, label, weight, IGNORE), expected)
    assert propagated_loss(logits, torch.full_like(label, IGNORE), weight, IGNORE) == 0


def test_strides_and_weights_are_nnunets(make_trainer, sparse_tiny):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = sparse_tiny.plans()
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["strides"] = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 1]]
    kwargs |= {"n_stages": 4, "features_per_stage": [4] * 4, "kernel_sizes": [[3, 3, 3]] * 4}
    kwargs |= {"n_conv_per_stage": [1] * 4, "n_conv_per_stage_decoder": [1] * 3}
    trainer = make_trainer(nnUNetTrainer, plans=plans, dataset=sparse_tiny)
    strides, ours = supervised(trainer.configuration_manager.pool_op_kernel_sizes)
    factors = torch.tensor(strides).cumprod(0)
    scales = torch.tensor(trainer._get_deep_supervision_scales())
    torch.testing.assert_close(1 / factors, scales[:-1].float())
    weights = trainer._build_loss().weight_factors
    assert weights[-1] == 0 and ours == pytest.approx(weights[:-1])
