"""Features of a prediction that tell how good it is, from the probabilities on the network's grid.

Softmax overlap and entropy are the simple baselines of failure detection (Zenk et al., arXiv 2406.03323).
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[Any]

NAMES = ("soft", "ent", "band", "frag")
_LOW, _HIGH = 0.1, 0.9  # of the undecided band
_MARGIN = 0.02  # keeps the logit of a soft Dice of 0 or 1 finite
_TINY = 1e-12


def logit_of_share(value: float) -> float:
    """log((v + 0.02) / (1.02 - v)): a share from 0 to 1 on a scale without ends."""
    return math.log((value + _MARGIN) / (1 + _MARGIN - value))


def of_structure(probability: Array, mask: Array, entropy: Array) -> dict[str, float]:
    """The four features of one structure.

    Args:
        probability: ``(*S)`` of the structure, 0 to 1.
        mask: ``(*S)`` bool, where the final segmentation has it.
        entropy: ``(*S)`` of the voxel's distribution, as a share of the largest possible, 0 to 1.

    Returns:
        ``soft``: soft Dice of mask and probability, on the scale of `logit_of_share`; ``ent``: mean entropy in the
        mask; ``band``: log(1 + undecided voxels / voxels of the mask); ``frag``: share of the mask outside of its
        largest component. A structure that was not found has the worst soft Dice, entropy 1, and 0 and 0.
    """
    size = int(mask.sum())
    if size == 0:
        return {"soft": logit_of_share(0.0), "ent": 1.0, "band": 0.0, "frag": 0.0}
    soft = 2 * float(probability[mask].sum(dtype=np.float64)) / (float(probability.sum(dtype=np.float64)) + size)
    undecided = int(((probability > _LOW) & (probability < _HIGH)).sum())
    parts, number = ndimage.label(mask)
    largest = int(np.bincount(parts.ravel())[1:].max()) if number else 0
    return {
        "soft": logit_of_share(soft),
        "ent": float(entropy[mask].mean(dtype=np.float64)),
        "band": math.log(1 + undecided / size),
        "frag": 1 - largest / size,
    }


def of_case(probabilities: Array, has_regions: bool) -> list[tuple[dict[str, float], int]]:
    """Features of each structure, and the voxels of its mask.

    Args:
        probabilities: ``(heads, *S)``: softmax with the background first, or a sigmoid for each region.
        has_regions: which of the two.

    Returns:
        In the order of the heads, without the background.
    """
    if has_regions:
        found = []
        for p in probabilities:
            q = np.clip(p.astype(np.float64), _TINY, 1 - _TINY)
            entropy = -(q * np.log(q) + (1 - q) * np.log1p(-q)) / math.log(2)
            mask = p > 0.5
            found.append((of_structure(p, mask, entropy), int(mask.sum())))
        return found
    q = np.clip(probabilities.astype(np.float64), _TINY, None)
    entropy = -(q * np.log(q)).sum(0) / math.log(len(q))
    winner = probabilities.argmax(0)
    masks = [winner == value for value in range(1, len(probabilities))]
    return [(of_structure(probabilities[i + 1], mask, entropy), int(mask.sum())) for i, mask in enumerate(masks)]
