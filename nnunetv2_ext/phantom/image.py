"""One phantom scan: organs of smooth random shape, imaged with the usual imperfections of MR.

The anatomy is a function of continuous coordinates, so the same seed sampled on another grid is the same patient.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.phantom.anatomy import BODY, MAX_ORGANS, NUM_TISSUES_WITHOUT_LABEL, Anatomy, SmoothField

Array = npt.NDArray[Any]

MIN_VOXELS = 12  # below this the smallest organ can fall between the voxels

# Signal of (air, fat, body, organ 1, organ 2, ...) in arbitrary units. The order of brightness differs between the
# contrasts, and neighbours on the scale are closer than the default bias field is wide: intensity alone decides little.
_SIGNAL = {
    "T1": np.array([0.0, 1.0, 0.45, 0.70, 0.22, 0.85, 0.60, 0.14, 0.78, 0.33, 0.54], dtype=np.float32),
    "T2": np.array([0.0, 0.8, 0.25, 0.48, 1.00, 0.14, 0.66, 0.88, 0.36, 0.57, 0.77], dtype=np.float32),
}
_SIGNAL_SPREAD = 0.04  # relative, from case to case
_SLAB_POINTS = 1_000_000  # sample points held in memory at once


def make_phantom(
    seed: int,
    shape: Sequence[int] = (48, 64, 56),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    num_organs: int = 3,
    contrast: str = "T1",
    bias_field: float = 0.3,
    noise: float = 0.03,
    partial_volume: bool = True,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Draw one case; the same arguments always give the same arrays.

    Each organ has its place, size and brightness in the body, the same in all cases; a seed adds a pose, a smooth
    deformation and an irregular outline. The body fills the field of view whatever its size. The anatomy depends on
    `seed` alone, so two calls that differ in `contrast` give two registered channels of one patient.

    Args:
        seed: The patient, >= 0.
        shape: Voxels along X, Y, Z, at least `MIN_VOXELS` each.
        spacing: Voxel size in mm along X, Y, Z. A thick axis is averaged over more sample points, as a thick slice is.
        num_organs: Labels 1..num_organs, at most `MAX_ORGANS`.
        contrast: `"T1"` or `"T2"`: which tissue is bright.
        bias_field: Strength b of the receive field exp(b * f), with f smooth and |f| <= 1. 0 switches it off.
        noise: Standard deviation of the noise in both quadrature channels, relative to fat on T1; the magnitude is
            Rician (Gudbjartsson and Patz 1995, https://doi.org/10.1002/mrm.1910340618). 0 switches it off.
        partial_volume: Average several points per voxel and give the voxel the label that most of them have; otherwise
            sample its centre only.

    Returns:
        image: float32 (X, Y, Z), >= 0, arbitrary units with air near 0 and fat near 1.
        label: uint8 (X, Y, Z), 0 for air, fat and body.

    ValueError: an argument is out of the ranges above; the message names it.
    """
    check_arguments(seed, shape, spacing, num_organs, contrast, bias_field=bias_field, noise=noise)
    # independent streams for anatomy and each contrast: changing the imaging must not move an organ
    anatomy = Anatomy.draw(np.random.default_rng([seed, 0]), num_organs)
    acquisition = np.random.default_rng([seed, 1 + list(_SIGNAL).index(contrast)])
    signal = _SIGNAL[contrast][: NUM_TISSUES_WITHOUT_LABEL + num_organs]
    signal = signal * (1 + _SIGNAL_SPREAD * acquisition.uniform(-1, 1, signal.size)).astype(np.float32)

    factors: tuple[int, ...] = (1, 1, 1)
    if partial_volume:  # 2 points on the finest axis, in proportion to the spacing on the others, at most 8
        factors = tuple(int(np.clip(round(2 * s / min(spacing)), 2, 8)) for s in spacing)
    image, label = _render(anatomy, tuple(shape), factors, signal)
    if bias_field > 0:
        field = SmoothField.draw(acquisition, order=3)
        image *= np.exp(bias_field * field(*(_centres(n) for n in shape)))
    if noise > 0:
        real, imaginary = acquisition.normal(0, noise, (2, *shape)).astype(np.float32)
        image = np.hypot(image + real, imaginary)
    return image.astype(np.float32, copy=False), label


def check_arguments(
    seed: int, shape: Sequence[int], spacing: Sequence[float], num_organs: int, contrast: str, **strengths: float
) -> None:
    """Raise ValueError with one clear line for the first argument of `make_phantom` that is out of range."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"phantom seed must be an integer >= 0, got {seed!r}")
    if len(shape) != 3 or any(n != int(n) or n < MIN_VOXELS for n in shape):
        raise ValueError(
            f"phantom shape must be three integers >= {MIN_VOXELS} (voxels along X, Y, Z), got {tuple(shape)}"
        )
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"phantom spacing must be three positive numbers (mm along X, Y, Z), got {tuple(spacing)}")
    if num_organs != int(num_organs) or not 1 <= num_organs <= MAX_ORGANS:
        raise ValueError(f"phantom num_organs must be an integer from 1 to {MAX_ORGANS}, got {num_organs}")
    if contrast not in _SIGNAL:
        raise ValueError(f"phantom contrast must be one of {', '.join(_SIGNAL)}, got {contrast!r}")
    for name, value in strengths.items():
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"phantom {name} must be a number >= 0, got {value}")


def _centres(number: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
    """Centres of the cells start..stop-1 of `number` equal cells that cover the field of view [-1, 1]."""
    return ((np.arange(start, number if stop is None else stop) + 0.5) * 2 / number - 1).astype(np.float32)


def _render(
    anatomy: Anatomy, shape: tuple[int, ...], factors: tuple[int, ...], signal: Array
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Sample the anatomy `factors` times per voxel and axis, then average signals and let labels vote; slab by slab."""
    image, label = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.uint8)
    fine = [n * f for n, f in zip(shape, factors)]
    rows = max(1, _SLAB_POINTS // (factors[0] * fine[1] * fine[2]))
    y, z = _centres(fine[1]), _centres(fine[2])
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        tissue = anatomy(_centres(fine[0], start * factors[0], stop * factors[0]), y, z)
        image[start:stop] = _block_mean(signal[tissue], factors)
        # tissue 0..BODY all carry label 0, so they vote together
        masks = [tissue <= BODY, *(tissue == organ for organ in range(BODY + 1, signal.size))]
        label[start:stop] = np.argmax([_block_mean(mask.astype(np.float32), factors) for mask in masks], axis=0)
    return image, label


def _block_mean(values: Array, factors: tuple[int, ...]) -> Array:
    """Mean over non-overlapping blocks of `factors` points: (X*fx, Y*fy, Z*fz) -> (X, Y, Z)."""
    x, y, z = (n // f for n, f in zip(values.shape, factors))
    return values.reshape(x, factors[0], y, factors[1], z, factors[2]).mean(axis=(1, 3, 5), dtype=np.float32)
