"""Block masks that hide parts of an input patch, and their application.

MedContext hides blocks of the input tensor itself, so that no skip connection can show the network what is hidden.
Drawing (`block_mask`) and applying (`apply_mask`) are separate, so a mask can be replayed or shown in a
picture. Everything stays on the batch's device and nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

Rounding = Literal["nearest", "floor"]
Fill = Literal["zero", "noise", "minimum"]


def default_block(patch_shape: Sequence[int], strides: Sequence[int | Sequence[int]]) -> tuple[int, ...]:
    """Block size that covers one bottleneck cell, but never more than a quarter of the patch.

    A block as large as the network's total stride cannot be filled in from one shallow layer.

    Args:
        patch_shape: patch size in voxels, 2 or 3 axes.
        strides: the plan's strides, one entry per stage: an int, or one int per axis.

    Returns:
        Block edge in voxels per axis: max(1, min(total stride, patch // 4)).

    Raises:
        ValueError: the patch is not 2-D or 3-D, or a stride does not fit it.
    """
    shape = _patch("patch_shape", patch_shape)
    total = [1] * len(shape)
    for stage in strides:
        per_axis = _positive_ints("strides", (stage,) * len(shape) if isinstance(stage, int) else stage)
        if len(per_axis) != len(shape):
            raise ValueError(f"stride {per_axis} has {len(per_axis)} axes but the patch {shape} has {len(shape)}")
        total = [t * s for t, s in zip(total, per_axis)]
    return tuple(max(1, min(t, s // 4)) for t, s in zip(total, shape))


def resolve_block(
    settings_block: int | Sequence[int] | None,
    patch_shape: Sequence[int],
    strides: Sequence[int | Sequence[int]],
    tube: bool = False,
) -> tuple[int, ...]:
    """Block size in voxels per axis, from the user's `mask_block` setting.

    Args:
        settings_block: None for `default_block`, one edge for all axes, one edge per axis, or, for a 3-D patch with
            `tube`, the two in-plane edges (axes 1 and 2).
        patch_shape: patch size in voxels.
        strides: the plan's strides (see `default_block`).
        tube: one in-plane pattern for all slices: a 3-D block then reaches through axis 0, whatever was given for it.

    Returns:
        One edge per axis; an edge longer than the patch is shortened to it.

    Raises:
        ValueError: the number of edges does not fit the patch, or an edge is below 1.
    """
    shape = _patch("patch_shape", patch_shape)
    if settings_block is None:
        block = default_block(shape, strides)
    elif isinstance(settings_block, int):
        block = _positive_ints("mask_block", (settings_block,)) * len(shape)
    else:
        block = _positive_ints("mask_block", settings_block)
        if len(block) == 2 and len(shape) == 3:
            if not tube:
                raise ValueError(
                    f"mask_block {list(block)} has 2 edges but the patch {list(shape)} has 3 axes: "
                    "give 3 edges, or set tube=True to mean in-plane blocks through all slices"
                )
            block = (shape[0], *block)
        if len(block) != len(shape):
            raise ValueError(
                f"mask_block {list(block)} has {len(block)} edges but the patch {list(shape)} has {len(shape)} axes: "
                "give one edge per axis, a single number, or None"
            )
    if tube and len(shape) == 3:
        block = (shape[0], *block[1:])
    return tuple(min(b, s) for b, s in zip(block, shape))


def cell_counts(
    shape: Sequence[int],
    block: Sequence[int],
    ratio: float,
    tube: bool = False,
    rounding: Rounding = "nearest",
) -> tuple[int, int]:
    """Number of cells in the mask's grid and how many of them are hidden in each sample.

    Arguments as in `block_mask`. A patch with few cells may hide none, or all, at a ratio strictly between 0 and 1.

    Returns:
        (cells, hidden).
    """
    cells = math.prod(_geometry(shape, block, tube)[-1])
    return cells, _hidden(cells, ratio, rounding)


def block_mask(
    batch: int,
    shape: Sequence[int],
    block: Sequence[int],
    ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    tube: bool = False,
    per_sample: bool = True,
    rounding: Rounding = "nearest",
) -> torch.Tensor:
    """Draw which blocks of each patch are hidden.

    The patch is covered by a grid of ceil(shape / block) cells, of which exactly round(ratio * cells) are drawn without
    replacement; cells at the far border may be cropped, so the expected share of voxels is still that of the cells.

    Args:
        batch: number of samples B.
        shape: spatial patch size S in voxels, 2 or 3 axes.
        block: block edge in voxels per axis.
        ratio: share of cells to hide, 0..1.
        generator: source of random numbers, on `device`; None for the device's default generator.
        device: where the mask lives; None for the generator's device, else the CPU.
        tube: 3-D only: one in-plane pattern for all slices along axis 0. No effect in 2-D.
        per_sample: one draw per sample; False for one pattern shared by the batch.
        rounding: "nearest" (halves to even) or "floor", applied to ratio * cells.

    Returns:
        bool tensor `(B, 1, *S)`, True = hidden.

    Raises:
        ValueError: an argument is out of range.
    """
    size, edges, grid = _geometry(shape, block, tube)
    cells = math.prod(grid)
    hidden = _hidden(cells, ratio, rounding)
    target = device or (generator.device if generator is not None else torch.device("cpu"))

    draws = batch if per_sample else 1
    scores = torch.rand(draws, cells, device=target, generator=generator)
    flat = torch.zeros(draws, cells, dtype=torch.bool, device=target)
    # topk returns distinct positions even if two scores tie, so the count is exact
    flat.scatter_(1, scores.topk(hidden, dim=1).indices, True)

    # nearest up-sampling as expand + reshape: repeat_interleave may wait for the device to learn its output size
    interleaved = [n for g in grid for n in (g, 1)]
    repeated = [n for pair in zip(grid, edges) for n in pair]
    full = flat.view(draws, *interleaved).expand(draws, *repeated)
    full = full.reshape(draws, 1, *(g * e for g, e in zip(grid, edges)))
    crop = (slice(None), slice(None), *map(slice, size))
    return full[crop].expand(batch, 1, *size).contiguous()


def apply_mask(
    x: torch.Tensor,
    mask: torch.Tensor,
    fill: Fill = "zero",
    num_image_channels: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Replace the hidden voxels of a batch; the batch itself is left alone.

    All channels share the mask. Channels from `num_image_channels` on (the one-hot previous stage of a cascade) become
    0 under it whatever the fill, otherwise the answer could be read there.

    Args:
        x: network input `(B, C, *S)`.
        mask: bool `(B, 1, *S)`, True = hidden, on the same device.
        fill: "zero" (the mean after z-scoring; with mask-based or no normalisation 0 means something else), "noise"
            (N(0, 1)), or "minimum" (of each sample and channel over the whole patch).
        num_image_channels: how many leading channels are images; None for all.
        generator: random numbers for "noise", on the device of `x`.

    Returns:
        A new tensor like `x`; voxels that are not hidden are bit-identical.

    Raises:
        ValueError: shapes, dtype or names do not fit.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool (True = hidden), not {mask.dtype}")
    if x.ndim < 3 or tuple(mask.shape) != (x.shape[0], 1, *x.shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit the batch {tuple(x.shape)}: expected (B, 1, *S)")
    images = x.shape[1] if num_image_channels is None else num_image_channels
    if not 1 <= images <= x.shape[1]:
        raise ValueError(f"num_image_channels must lie in 1..{x.shape[1]} (channels of the batch), not {images}")

    if fill == "zero":
        return x.masked_fill(mask, 0)
    image = x[:, :images]
    if fill == "noise":
        value = torch.randn(image.shape, dtype=x.dtype, device=x.device, generator=generator)
    elif fill == "minimum":
        value = image.amin(dim=tuple(range(2, x.ndim)), keepdim=True)
    else:
        raise ValueError(f"unknown fill {fill!r}: choose zero, noise or minimum")
    return torch.cat((torch.where(mask, value, image), x[:, images:].masked_fill(mask, 0)), dim=1)


def _positive_ints(name: str, values: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(int(v) for v in values)
    if any(n != v or n < 1 for n, v in zip(numbers, values)):
        raise ValueError(f"{name} must hold whole numbers of at least 1, not {list(values)}")
    return numbers


def _patch(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    size = _positive_ints(name, shape)
    if len(size) not in (2, 3):
        raise ValueError(f"the patch must have 2 or 3 axes, not {len(size)}: {list(size)}")
    return size


def _geometry(shape: Sequence[int], block: Sequence[int], tube: bool) -> tuple[tuple[int, ...], ...]:
    """Patch and edges of a block in voxels, and cells of the grid, per axis."""
    size, edges = _patch("shape", shape), _positive_ints("block", block)
    if len(edges) != len(size):
        raise ValueError(f"block {list(edges)} must have one edge per axis of the patch {list(size)}")
    if tube and len(size) == 3:
        edges = (size[0], *edges[1:])
    return size, edges, tuple(-(-s // e) for s, e in zip(size, edges))


def _hidden(cells: int, ratio: float, rounding: Rounding) -> int:
    if not 0.0 <= ratio <= 1.0:  # also refuses nan
        raise ValueError(f"the mask ratio must lie between 0 and 1, not {ratio}")
    if rounding not in ("nearest", "floor"):
        raise ValueError(f"unknown rounding {rounding!r}: choose nearest or floor")
    return round(ratio * cells) if rounding == "nearest" else int(ratio * cells)
