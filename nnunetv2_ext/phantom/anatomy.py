"""The phantom's anatomy: a body with a fat rim and organs that keep their place but not their exact shape.

Every function is of continuous coordinates over the field of view, [-1, 1] along each axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

AIR, FAT, BODY = 0, 1, 2  # tissues that carry label 0; organ k is tissue BODY + k
NUM_TISSUES_WITHOUT_LABEL = 3

# Prior of each organ: centre, semi-axes (both relative to the body's semi-axes), rotation about Z in degrees.
_PRIOR = (
    ((-0.38, 0.10, 0.08), (0.40, 0.44, 0.54), 15.0),
    ((0.44, 0.24, 0.22), (0.29, 0.34, 0.38), -20.0),
    ((0.14, -0.44, -0.06), (0.34, 0.25, 0.54), 0.0),
    ((0.36, 0.14, -0.46), (0.27, 0.30, 0.24), 25.0),
    ((-0.42, -0.42, -0.30), (0.23, 0.25, 0.28), -30.0),
    ((0.00, 0.62, -0.16), (0.23, 0.20, 0.30), 0.0),
    ((-0.34, 0.20, -0.60), (0.26, 0.28, 0.22), 10.0),
    ((0.58, -0.26, 0.12), (0.22, 0.24, 0.30), 35.0),
)
MAX_ORGANS = len(_PRIOR)

_BODY_SEMI_AXIS = 0.88  # of half the field of view: some air all around
_FAT_INSIDE = 0.91  # the rim reaches from here to the skin, relative to the body's radius
_CENTRE_SPREAD, _SIZE_SPREAD, _ANGLE_SPREAD = 0.05, 0.10, 12.0  # half ranges from case to case; angle in degrees
_WARP, _RIPPLE = 0.12, 0.30  # amplitude of the deformation (body units) and of the outline (organ radii)


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

    def __call__(self, x: Array, y: Array, z: Array) -> npt.NDArray[np.float32]:
        """Values on the product grid of the three axes, float32 (len(x), len(y), len(z))."""
        # (order, len): the k-th row is cos(pi k (x + 1) / 2), k half waves across [-1, 1]
        waves = np.pi / 2 * np.arange(len(self.coefficients))[:, None]
        cos_x, cos_y, cos_z = (np.cos(waves * (axis[None] + 1)).astype(np.float32) for axis in (x, y, z))
        # contract the shortest intermediate first: (o, o, o) -> (o, o, Z) -> (o, Y, Z) -> (X, Y, Z)
        return np.tensordot(cos_x.T, np.einsum("ijz,jy->iyz", self.coefficients @ cos_z, cos_y), axes=1)


@dataclass(frozen=True)
class Organ:
    """A rippled ellipsoid: inside where |rotate(p - centre) / semi_axes| < 1 + ripple(p)."""

    centre: npt.NDArray[np.float32]  # (3,)
    semi_axes: npt.NDArray[np.float32]  # (3,)
    angle: float  # about Z, radians
    ripple: SmoothField

    @classmethod
    def draw(cls, generator: np.random.Generator, index: int) -> Organ:
        """Draw organ `index` (0-based) around its prior."""
        centre, semi_axes, degrees = _PRIOR[index]
        return cls(
            (np.array(centre) + _CENTRE_SPREAD * generator.uniform(-1, 1, 3)).astype(np.float32),
            (np.array(semi_axes) * (1 + _SIZE_SPREAD * generator.uniform(-1, 1, 3))).astype(np.float32),
            float(np.deg2rad(degrees + _ANGLE_SPREAD * generator.uniform(-1, 1))),
            SmoothField.draw(generator, order=7),
        )

    def depth(self, position: list[Array], ripple: Array) -> Array:
        """Relative radius of warped positions, three arrays (X, Y, Z): below 1 is inside, 0 the centre."""
        px, py, pz = (p - c for p, c in zip(position, self.centre))
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        ax, ay, az = self.semi_axes
        radius = np.sqrt(((cos * px + sin * py) / ax) ** 2 + ((cos * py - sin * px) / ay) ** 2 + (pz / az) ** 2)
        return radius / (1 + _RIPPLE * ripple)


@dataclass(frozen=True)
class Anatomy:
    """One patient. Calling it with three axes in [-1, 1] gives the tissue at every point of their product grid."""

    body_semi_axes: npt.NDArray[np.float32]  # (3,), relative to half the field of view
    warp: tuple[SmoothField, SmoothField, SmoothField]
    organs: tuple[Organ, ...]

    @classmethod
    def draw(cls, generator: np.random.Generator, num_organs: int) -> Anatomy:
        """Draw a patient; the first organs are the same whatever their number."""
        body = _BODY_SEMI_AXIS * (1 + 0.04 * generator.uniform(-1, 1, 3)).astype(np.float32)
        x, y, z = (SmoothField.draw(generator, order=4) for _ in range(3))
        return cls(body, (x, y, z), tuple(Organ.draw(generator, k) for k in range(num_organs)))

    def __call__(self, x: Array, y: Array, z: Array) -> npt.NDArray[np.uint8]:
        """Tissue numbers, uint8 (len(x), len(y), len(z)); where organs meet, the one the point is deeper in wins."""
        axes = [a.reshape(np.roll((-1, 1, 1), d)) / s for d, (a, s) in enumerate(zip((x, y, z), self.body_semi_axes))]
        position = [a + _WARP * field(x, y, z) for a, field in zip(axes, self.warp)]
        radius = np.sqrt(sum(p**2 for p in position))
        tissue = np.select([radius < _FAT_INSIDE, radius < 1], [BODY, FAT], AIR).astype(np.uint8)
        deepest = np.where(radius < _FAT_INSIDE, np.float32(1), np.float32(0))  # an organ does not enter the fat
        for number, organ in enumerate(self.organs, start=1):
            depth = organ.depth(position, organ.ripple(x, y, z))
            wins = depth < deepest
            tissue[wins] = BODY + number
            deepest = np.where(wins, depth, deepest)
        return tissue
