"""Masks: how many blocks, where, and what happens to the voxels under them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.parts.masking import apply_mask, block_mask, cell_counts, default_block, resolve_block

# plan name: patch, per-stage strides, then the hand-computed block, number of cells and hidden cells at ratio 0.4
PLANS = {
    "isotropic 6 stages": ((128,) * 3, [[1] * 3] + [[2] * 3] * 5, (32, 32, 32), 64, 26),
    "isotropic 5 stages": ((96,) * 3, [[1] * 3] + [[2] * 3] * 4, (16, 16, 16), 216, 86),
    "anisotropic": ((20, 256, 224), [[1] * 3] + [[1, 2, 2]] * 3 + [[2] * 3] * 2, (4, 32, 32), 280, 112),
    "hippocampus": ((40, 56, 40), [[1] * 3] + [[2] * 3] * 3, (8, 8, 8), 175, 70),
    "2d 8 stages": ((512, 512), [[1] * 2] + [[2] * 2] * 7, (128, 128), 16, 6),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cells_of(mask: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """Slow reference: read every cell of one sample's mask `S` voxel block by voxel block; a mixed block fails."""
    shape = mask.shape
    values = []
    for index in torch.cartesian_prod(*[torch.arange(0, s, b) for s, b in zip(shape, block)]).tolist():
        cell = mask[tuple(slice(i, i + b) for i, b in zip(index, block))]
        assert cell.all() or not cell.any(), f"block at {index} is partly hidden"
        values.append(bool(cell.all()))
    return torch.tensor(values)


@pytest.mark.parametrize("name", PLANS)
def test_derived_blocks_and_hidden_cells_equal_the_table(name):
    patch, strides, block, cells, hidden = PLANS[name]
    assert default_block(patch, strides) == block
    assert resolve_block(None, patch, strides) == block
    assert cell_counts(patch, block, 0.4) == (cells, hidden)
    mask = block_mask(1, patch, block, 0.4, generator())
    assert cells_of(mask[0, 0], block).sum().item() == hidden
    assert mask.sum().item() == hidden * math.prod(block)  # all these blocks divide their patches


def test_strides_may_be_one_number_per_stage():
    assert (
        default_block((64, 64, 64), [1, 2, 2]) == default_block((64, 64, 64), [[1] * 3, [2] * 3, [2] * 3]) == (4,) * 3
    )


@given(
    patch=st.lists(st.integers(1, 200), min_size=2, max_size=3),
    stages=st.integers(1, 9),
    data=st.data(),
)
def test_derived_blocks_are_never_zero_nor_above_a_quarter(patch, stages, data):
    strides = [[data.draw(st.sampled_from([1, 2])) for _ in patch] for _ in range(stages)]
    for axis, (edge, size) in enumerate(zip(default_block(patch, strides), patch)):
        assert edge >= 1
        assert edge == 1 if size < 4 else 4 * edge <= size
        assert edge <= math.prod(s[axis] for s in strides)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    data=st.data(),
    percent=st.integers(0, 100),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_exactly_the_rounded_share_of_whole_blocks_is_hidden(shape, data, percent, batch, seed):
    block = tuple(data.draw(st.integers(1, 6)) for _ in shape)
    mask = block_mask(batch, shape, block, percent / 100, generator(seed))
    assert mask.shape == (batch, 1, *shape) and mask.dtype == torch.bool
    for sample in mask[:, 0]:
        cells = cells_of(sample, block)
        wanted = Fraction(percent, 100) * len(cells)
        hidden = int(cells.sum())
        assert abs(hidden - wanted) <= Fraction(1, 2)
        assert (len(cells), hidden) == cell_counts(shape, block, percent / 100)


def test_blocks_that_do_not_divide_the_patch_are_cropped_at_the_far_border():
    mask = block_mask(1, (5, 7), (2, 3), 1.0, generator())
    assert mask.shape == (1, 1, 5, 7) and mask.all()
    assert cell_counts((5, 7), (2, 3), 0.5) == (9, 4)  # ceil(5/2) * ceil(7/3) = 9; 4.5 rounds half to even
    assert cells_of(block_mask(1, (5, 7), (2, 3), 0.5, generator())[0, 0], (2, 3)).sum() == 4


def test_rounding_down_is_the_released_codes_int():
    assert cell_counts((128,) * 3, (32,) * 3, 0.4, rounding="nearest") == (64, 26)  # 25.6
    assert cell_counts((128,) * 3, (32,) * 3, 0.4, rounding="floor") == (64, 25)
    mask = block_mask(2, (8, 8), (1, 1), 0.4, generator(), rounding="floor")
    assert mask.flatten(1).sum(1).tolist() == [25, 25]


@pytest.mark.parametrize("shape", [(8, 8), (4, 8, 8)])
def test_ratio_zero_hides_nothing_and_one_everything(shape):
    assert not block_mask(2, shape, (2,) * len(shape), 0.0, generator()).any()
    assert block_mask(2, shape, (2,) * len(shape), 1.0, generator()).all()


def test_samples_differ_unless_one_pattern_is_asked_for():
    mask = block_mask(4, (16, 16, 16), (2, 2, 2), 0.4, generator())
    assert all(not torch.equal(mask[i], mask[j]) for i in range(4) for j in range(i))
    shared = block_mask(4, (16, 16, 16), (2, 2, 2), 0.4, generator(), per_sample=False)
    assert all(torch.equal(shared[0], sample) for sample in shared[1:])
    shared[0].zero_()
    assert shared[1].any(), "samples of a shared pattern must not share memory"


def test_tube_repeats_one_plane_along_axis_0_only_in_3d():
    strides = [[1, 1, 1]]
    tube = block_mask(2, (6, 12, 12), resolve_block([2, 4, 4], (6, 12, 12), strides, tube=True), 0.4, generator())
    assert (tube == tube[:, :, :1]).all()
    assert cells_of(tube[0, 0, 0], (4, 4)).sum() == 4  # round(0.4 * 9)
    blocks = block_mask(2, (6, 12, 12), (2, 4, 4), 0.4, generator())
    assert (blocks != blocks[:, :, :1]).any()
    assert resolve_block([4, 4], (12, 12), [[1, 1]], tube=True) == (4, 4)


def test_same_generator_state_gives_the_same_mask_and_advances():
    draw = generator(3)
    state = draw.get_state()
    first, second = (block_mask(2, (16, 16), (2, 2), 0.5, draw) for _ in range(2))
    assert not torch.equal(first, second)
    draw.set_state(state)
    assert torch.equal(first, block_mask(2, (16, 16), (2, 2), 0.5, draw))


def test_drawing_with_a_generator_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    mask = block_mask(2, (8, 8), (2, 2), 0.5, generator())
    apply_mask(torch.zeros(2, 1, 8, 8), mask, "noise", 1, generator())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("shape", "block"), [((10, 14, 9), (4, 4, 4)), ((33, 20), (8, 8))])
def test_mean_share_of_voxels_over_500_draws_is_that_of_the_cells(shape, block):
    cells, hidden = cell_counts(shape, block, 0.4)
    mask = block_mask(500, shape, block, 0.4, generator(1))
    assert mask.float().mean().item() == pytest.approx(hidden / cells, abs=0.01)
    assert mask.float().mean(0).sub(hidden / cells).abs().max() < 0.1  # and no place is preferred (4.5 sigma)


def test_resolve_block_reads_every_form_of_the_setting():
    patch, strides = (20, 256, 224), [[1] * 3] + [[1, 2, 2]] * 3 + [[2] * 3] * 2
    assert resolve_block(8, patch, strides) == (8, 8, 8)
    assert resolve_block(32, patch, strides) == (20, 32, 32)  # never longer than the patch
    assert resolve_block([2, 16, 8], patch, strides) == (2, 16, 8)
    assert resolve_block([4, 4], patch, strides, tube=True) == (20, 4, 4)
    assert resolve_block(None, patch, strides, tube=True) == (20, 32, 32)
    assert resolve_block([2, 16, 8], patch, strides, tube=True) == (20, 16, 8)
    assert resolve_block([4, 4], (512, 512), [[1, 1], [2, 2]], tube=True) == (4, 4)


@pytest.mark.parametrize(
    ("block", "patch", "tube", "message"),
    [
        ([4, 4], (8, 8, 8), False, "tube=True"),
        ([4, 4, 4], (8, 8), False, "one edge per axis"),
        ([4], (8, 8), False, "one edge per axis"),
    ],
)
def test_blocks_that_cannot_be_meant_are_refused(block, patch, tube, message):
    with pytest.raises(ValueError, match=message):
        resolve_block(block, patch, [[1] * len(patch)], tube)


@pytest.mark.parametrize(
    ("block", "ratio", "rounding", "message"),
    [
        ((4, 4), -0.1, "nearest", "between 0 and 1"),
        ((4, 4), 1.1, "nearest", "between 0 and 1"),
        ((4, 4), math.nan, "nearest", "between 0 and 1"),
        ((4, 4), 0.4, "ceil", "unknown rounding"),
        ((0, 4), 0.4, "nearest", "at least 1"),
        ((-4, -4), 0.4, "nearest", "at least 1"),
        ((4,), 0.4, "nearest", "per axis"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(block, ratio, rounding, message):
    with pytest.raises(ValueError, match=message):
        block_mask(2, (8, 8), block, ratio, rounding=rounding)


def batch_and_mask(shape=(6, 8, 8), channels=4):
    x = torch.randn(2, channels, *shape, generator=generator(5))
    return x, block_mask(2, shape, (2,) * len(shape), 0.4, generator(6))


@pytest.mark.parametrize("fill", ["zero", "noise", "minimum"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 8, 8)])
def test_visible_voxels_are_bit_identical_and_the_batch_is_untouched(fill, shape):
    x, mask = batch_and_mask(shape)
    x[0, 0, 0, 0] = -0.0
    before = x.clone()
    masked = apply_mask(x, mask, fill, 2, generator(7))
    assert masked.dtype == x.dtype and masked.shape == x.shape
    visible = ~mask.expand_as(x)
    assert torch.equal(masked[visible].view(torch.int32), before[visible].view(torch.int32))
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))
    assert masked.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("fill", ["zero", "noise", "minimum"])
def test_cascade_channels_are_zero_under_every_fill_and_all_channels_share_the_mask(fill):
    x, mask = batch_and_mask()
    x = x.abs() + 1
    masked = apply_mask(x, mask, fill, 2, generator(7))
    hidden = mask.expand_as(x)
    assert (masked[:, 2:][hidden[:, 2:]] == 0).all()
    changed = masked != x  # no voxel of x equals a fill value except the minimum itself
    if fill == "minimum":
        changed |= hidden & (x == x.amin((2, 3, 4), keepdim=True))
    assert torch.equal(changed, hidden)


def test_fill_values():
    x, mask = batch_and_mask()
    assert (apply_mask(x, mask, "zero", 4)[mask.expand_as(x)] == 0).all()
    lowest = apply_mask(x, mask, "minimum", 4)
    for b in range(2):
        for c in range(4):
            assert set(lowest[b, c][mask[b, 0]].tolist()) == {min(x[b, c].flatten().tolist())}
    big = torch.full((2, 3, 32, 32, 32), 7.0)
    noise = apply_mask(big, torch.ones(2, 1, 32, 32, 32, dtype=torch.bool), "noise", 3, generator(8))
    assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
    assert not torch.equal(noise[0, 0], noise[0, 1]) and not torch.equal(noise[0], noise[1])


def test_noise_repeats_with_the_generators_state():
    x, mask = batch_and_mask()
    first, again = (apply_mask(x, mask, "noise", 4, generator(9)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, apply_mask(x, mask, "noise", 4, generator(10)))


@pytest.mark.parametrize(
    ("x", "mask", "fill", "images", "message"),
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool), "zero", 1, "does not fit"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4, dtype=torch.bool), "zero", 1, "does not fit"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), "zero", 1, "bool"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool), "mean", 1, "unknown fill 'mean'"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool), "minimum", 3, r"1\.\.2"),
        (torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool), "minimum", -1, r"1\.\.2"),
    ],
)
def test_bad_arguments_of_applying_are_refused(x, mask, fill, images, message):
    with pytest.raises(ValueError, match=message):
        apply_mask(x, mask, fill, images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masking_never_waits_for_the_gpu():
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 3, 40, 56, 40, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for fill in ("zero", "noise", "minimum"):
            mask = block_mask(2, (40, 56, 40), (8, 8, 8), 0.4, draw)
            apply_mask(x, mask, fill, 2, draw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mask.device.type == "cuda" and mask.flatten(1).sum(1).tolist() == [70 * 512] * 2
