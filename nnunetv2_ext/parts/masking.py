"""Block masks that hide parts of an input patch, and their application.

MedContext hides blocks of the input tensor itself, so that no skip connection can show the network what is hidden.
Drawing (`block_mask`) and applying (`apply_mask`) are separate, so a mask can be replayed or shown in a
picture. Everything stays on the batch's device and nothing waits for it.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

Rounding = Literal["nearest", "floor"]
Fill = Literal["zero", "noise", "minimum"]


def default_block(patch_shape: Sequence[int], strides: Sequence[int | Sequence[int]]) -> tuple[int, ...]:
    """Block edges in voxels that cover one bottleneck cell, but never more than a quarter of the patch.

    A block as large as the network's total stride cannot be filled in from one shallow layer. `strides` are the plan's,
    one entry per stage: an int, or one int per axis.
    """
    stages = [(stage,) * len(patch_shape) if isinstance(stage, int) else stage for stage in strides]
    return tuple(max(1, min(math.prod(s), n // 4)) for *s, n in zip(*stages, patch_shape, strict=True))


def resolve_block(
    settings_block: int | Sequence[int] | None,
    patch_shape: Sequence[int],
    strides: Sequence[int | Sequence[int]],
    tube: bool = False,
) -> tuple[int, ...]:
    """Block size in voxels per axis, never longer than the patch, from the user's `mask_block` setting.

    Args:
        settings_block: None for `default_block`, one edge for all axes, or one edge per axis. For a 3-D patch with
            `tube` also the two in-plane edges (axes 1 and 2).
        patch_shape, strides: in voxels; the plan's (see `default_block`).
        tube: one in-plane pattern for all slices: a 3-D block then reaches through axis 0, whatever was given for it.

    Raises:
        ValueError: the number of edges does not fit the patch.
    """
    if settings_block is None:
        block = default_block(patch_shape, strides)
    elif isinstance(settings_block, int):
        block = (settings_block,) * len(patch_shape)
    else:
        block = tuple(settings_block)
    through = tube and len(patch_shape) == 3
    if through:
        block = (patch_shape[0], *(block if len(block) == 2 else block[1:]))
    if len(block) != len(patch_shape):
        hint = ", or set tube=True to mean in-plane blocks through all slices" if len(block) == 2 else ""
        raise ValueError(
            f"mask_block {list(block)} has {len(block)} edges but the patch {list(patch_shape)} has "
            f"{len(patch_shape)} axes: give one edge per axis, a single number, or None{hint}"
        )
    return tuple(map(min, block, patch_shape))


def cell_counts(
    shape: Sequence[int], block: Sequence[int], ratio: float, rounding: Rounding = "nearest"
) -> tuple[int, int]:
    """Number of cells in the mask's grid and how many of them are hidden in each sample; arguments as in `block_mask`.

    A patch with few cells may hide none, or all, at a ratio strictly between 0 and 1.

    Raises:
        ValueError: a ratio outside 0..1, an edge below 1, or an unknown rounding.
    """
    if not 0.0 <= ratio <= 1.0:  # also refuses nan
        raise ValueError(f"the mask ratio must lie between 0 and 1, not {ratio}")
    if rounding not in get_args(Rounding):
        raise ValueError(f"unknown rounding {rounding!r}: choose {' or '.join(get_args(Rounding))}")
    cells = math.prod(_grid(shape, block))
    return cells, round(ratio * cells) if rounding == "nearest" else int(ratio * cells)


def _grid(shape: Sequence[int], block: Sequence[int]) -> list[int]:
    if len(shape) != len(block) or min(*shape, *block) < 1:
        raise ValueError(f"block {list(block)} must have one edge of at least 1 per axis of the patch {list(shape)}")
    return [-(-n // edge) for n, edge in zip(shape, block)]


def block_mask(
    batch: int,
    shape: Sequence[int],
    block: Sequence[int],
    ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    per_sample: bool = True,
    rounding: Rounding = "nearest",
) -> torch.Tensor:
    """Draw which blocks of each patch are hidden.

    The patch is covered by a grid of ceil(shape / block) cells, of which exactly round(ratio * cells) are drawn without
    replacement; cells at the far border may be cropped, so the expected share of voxels is still that of the cells.

    Args:
        batch, shape: samples B, and the spatial patch size S in voxels, 2 or 3 axes.
        block: block edge in voxels per axis (see `resolve_block`).
        ratio: share of cells to hide, 0..1.
        generator, device: of the random numbers and the mask; None: the device's default, the generator's, else CPU.
        per_sample: one draw per sample; False for one pattern shared by the batch.
        rounding: "nearest" (halves to even) or "floor", applied to ratio * cells.

    Returns:
        bool tensor `(B, 1, *S)`, True = hidden.

    Raises:
        ValueError: as of `cell_counts`.
    """
    grid = _grid(shape, block)
    cells, hidden = cell_counts(shape, block, ratio, rounding)
    target = device or (generator.device if generator is not None else torch.device("cpu"))

    draws = batch if per_sample else 1
    scores = torch.rand(draws, cells, device=target, generator=generator)
    flat = torch.zeros(draws, cells, dtype=torch.bool, device=target)
    # topk returns distinct positions even if two scores tie, so the count is exact
    flat.scatter_(1, scores.topk(hidden, dim=1).indices, True)

    # nearest up-sampling as expand + reshape: repeat_interleave may wait for the device to learn its output size
    interleaved = [n for g in grid for n in (g, 1)]
    repeated = [n for pair in zip(grid, block) for n in pair]
    full = flat.view(draws, *interleaved).expand(draws, *repeated)
    full = full.reshape(draws, 1, *(g * e for g, e in zip(grid, block)))
    crop = (slice(None), slice(None), *map(slice, shape))
    return full[crop].expand(batch, 1, *shape).contiguous()


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
        ValueError: the mask's shape or type, or the number of image channels does not fit; or an unknown fill.
    """
    if tuple(mask.shape) != (x.shape[0], 1, *x.shape[2:]):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit the batch {tuple(x.shape)}: expected (B, 1, *S)")
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool (True = hidden), not {mask.dtype}")
    if fill not in get_args(Fill):
        raise ValueError(f"unknown fill {fill!r}: choose {', '.join(get_args(Fill))}")
    images = x.shape[1] if num_image_channels is None else num_image_channels
    if not 1 <= images <= x.shape[1]:
        raise ValueError(f"num_image_channels must lie in 1..{x.shape[1]} (channels of the batch), not {images}")
    if fill == "zero":
        return x.masked_fill(mask, 0)
    image = x[:, :images]
    if fill == "noise":
        value = torch.randn(image.shape, dtype=x.dtype, device=x.device, generator=generator)
    else:
        value = image.amin(dim=tuple(range(2, x.ndim)), keepdim=True)
    return torch.cat((torch.where(mask, value, image), x[:, images:].masked_fill(mask, 0)), dim=1)
