"""Smooth random scalar fields over the field of view, exact at any coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


def _cosines(x: npt.NDArray[Any], order: int) -> npt.NDArray[np.float32]:
    """(order, len(x)): the k-th row is cos(pi k (x + 1) / 2), k half waves across [-1, 1]."""
    return np.cos(np.pi / 2 * np.arange(order)[:, None] * (x[None] + 1)).astype(np.float32)


@dataclass(frozen=True)
class SmoothField:
    """A finite cosine series f(x, y, z) on [-1, 1]^3 without its constant term; max |f| is 1 up to the check grid.

    A series and not filtered noise: it does not know the voxel grid, and separates into three small matrix products.
    """

    coefficients: npt.NDArray[np.float32]  # (order, order, order)

    @classmethod
    def draw(cls, generator: np.random.Generator, order: int) -> SmoothField:
        """Draw a field with up to `order` - 1 half waves per axis; amplitudes fall with the squared frequency."""
        k2 = sum(k.astype(float) ** 2 for k in np.indices((order,) * 3))
        coefficients = generator.normal(size=(order,) * 3) / (1 + k2)
        coefficients[0, 0, 0] = 0  # a shift or a gain is not a deformation
        grid = np.linspace(-1, 1, 17)
        peak = np.abs(cls(coefficients.astype(np.float32))(grid, grid, grid)).max()
        return cls((coefficients / peak).astype(np.float32))

    def __call__(self, x: npt.NDArray[Any], y: npt.NDArray[Any], z: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Values on the product grid of the three axes, float32 (len(x), len(y), len(z))."""
        order = self.coefficients.shape[0]
        # contract the shortest intermediate first: (o, o, o) -> (o, o, Z) -> (o, Y, Z) -> (X, Y, Z)
        partial = self.coefficients @ _cosines(z, order)
        partial = np.einsum("ijz,jy->iyz", partial, _cosines(y, order))
        return np.tensordot(_cosines(x, order).T, partial, axes=1)
