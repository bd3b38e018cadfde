"""One corrupted copy of a preprocessed image, the same in every run: what a worse scan may do to a prediction.

Never written to disk. The kinds are those of the prototype behind docs/methods/estimate.md. Source: ours.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Image = npt.NDArray[np.float32]

KINDS = ("noise", "blur", "bias", "ghost")
KINDS_OF_CT = ("noise", "blur", "low dose", "offset")


def corrupt(image: Image, case: str, is_ct: bool) -> tuple[Image, str]:
    """A corrupted copy, and the kind; both follow from the case's name.

    Args:
        image: ``(C, *S)``, normalised.
        case: the case's id.
        is_ct: CT has no bias field and no ghosts; its intensities may be shifted.
    """
    seed = int.from_bytes(hashlib.blake2b(case.encode(), digest_size=8).digest(), "little")
    rng = np.random.default_rng(seed)
    kind = (KINDS_OF_CT if is_ct else KINDS)[int(rng.integers(4))]
    strength = float(rng.uniform(0.5, 1.5))
    spread = max(float(image.std()), 1e-6)
    changed: Any
    if kind == "noise":
        changed = image + rng.normal(0, 0.4 * strength * spread, image.shape)
    elif kind == "low dose":  # streaks of correlated noise
        noise = ndimage.gaussian_filter1d(rng.normal(0, 1, image.shape), 2, axis=-1)
        changed = image + 0.6 * strength * spread * noise / max(float(noise.std()), 1e-6)
    elif kind == "blur":
        sigma = [0.0] + [1.2 * strength if n > 8 else 0.0 for n in image.shape[1:]]
        changed = ndimage.gaussian_filter(image, sigma)
    elif kind == "bias":
        coarse = rng.uniform(-1, 1, [3] * (image.ndim - 1))
        field: Any = ndimage.zoom(coarse, [n / 3 for n in image.shape[1:]], order=1, grid_mode=True, mode="nearest")
        changed = image * np.exp(0.5 * strength * field) + 0.3 * strength * spread * field
    elif kind == "ghost":
        axis = image.ndim - 1
        changed = image + 0.35 * strength * np.roll(image, image.shape[axis] // 3, axis)
    else:
        changed = image + 0.5 * strength * spread * float(rng.choice([-1, 1]))
    return np.asarray(changed, dtype=np.float32), kind
