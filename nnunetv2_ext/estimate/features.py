"""Features of a prediction that tell how good it is, from the probabilities on the network's grid.

Softmax overlap and entropy are the simple baselines of failure detection, agreement of members the strongest of them
(Zenk et al., arXiv 2406.03323).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

NAMES = ("soft", "ent", "band", "frag")
OPTIONAL = ("tta", "ens")  # agreement of mirrored passes, of folds
_LOW, _HIGH = 0.1, 0.9  # of the undecided band
_MARGIN = 0.02  # keeps the logit of a Dice of 0 or 1 finite
_TINY = 1e-12

Features = dict[str, float]


def logit_of_share(value: float) -> float:
    """log((v + 0.02) / (1.02 - v)): a share from 0 to 1 on a scale without ends."""
    return math.log((value + _MARGIN) / (1 + _MARGIN - value))


def share_of_logit(value: float) -> float:
    """Counterpart of `logit_of_share`."""
    return (1 + 2 * _MARGIN) / (1 + math.exp(-value)) - _MARGIN


def of_structure(probability: Tensor, mask: Tensor, entropy: Tensor) -> Features:
    """The four features of one structure.

    Args:
        probability: ``(*S)`` of the structure, 0 to 1.
        mask: ``(*S)`` bool, where the final segmentation has it.
        entropy: ``(N)`` of the distributions in the mask, as a share of the largest possible, 0 to 1.

    Returns:
        ``soft``: soft Dice of mask and probability, on the scale of `logit_of_share`; ``ent``: mean entropy in the
        mask; ``band``: log(1 + undecided voxels / voxels of the mask); ``frag``: share of the mask outside of its
        largest component. A structure that was not found has the worst soft Dice, entropy 1, and 0 and 0.
    """
    size = len(entropy)
    if size == 0:
        return {"soft": logit_of_share(0.0), "ent": 1.0, "band": 0.0, "frag": 0.0}
    inside, whole = (float(p.sum(dtype=torch.float64)) for p in (probability[mask], probability))
    undecided = int(((probability > _LOW) & (probability < _HIGH)).sum())
    array = mask.numpy()
    (box,) = ndimage.find_objects(array.view(np.uint8))
    parts, _ = ndimage.label(array[box])
    return {
        "soft": logit_of_share(2 * inside / (whole + size)),
        "ent": float(entropy.mean(dtype=torch.float64)),
        "band": math.log(1 + undecided / size),
        "frag": 1 - int(np.bincount(parts.ravel())[1:].max()) / size,
    }


def masks_of(probabilities: Tensor, has_regions: bool) -> Tensor:
    """Where each structure was found, ``(structures, *S)`` bool, before later regions are drawn over earlier ones."""
    if has_regions:
        return probabilities > 0.5
    winner = probabilities.argmax(0)
    return torch.stack([winner == value for value in range(1, len(probabilities))])


def of_case(probabilities: Tensor, has_regions: bool) -> list[tuple[Features, int]]:
    """Features of each structure, and the voxels of its mask.

    Args:
        probabilities: ``(heads, *S)``: softmax with the background first, or a sigmoid for each region.
        has_regions: which of the two.

    Returns:
        In the order of the heads, without the background.
    """
    found = []
    for i, mask in enumerate(masks_of(probabilities, has_regions)):
        inside = (probabilities[i : i + 1, mask] if has_regions else probabilities[:, mask]).double()
        if has_regions:
            inside = torch.cat((inside, 1 - inside))
        inside = inside.clamp(min=_TINY)
        entropy = -(inside * inside.log()).sum(0) / math.log(len(inside))
        found.append((of_structure(probabilities[i if has_regions else i + 1], mask, entropy), int(mask.sum())))
    return found


def with_agreement(
    found: Sequence[tuple[Features, int]], tta: Sequence[float] | None, ens: Sequence[float] | None
) -> list[tuple[Features, int]]:
    """The features of `of_case` with those of `OPTIONAL` that are given, one value a structure."""
    more = [{"tta": [logit_of_share(v) for v in tta]} if tta else {}, {"ens": list(ens)} if ens else {}]
    return [
        ({**features, **{name: values[i] for one in more for name, values in one.items()}}, size)
        for i, (features, size) in enumerate(found)
    ]


def agreement(one: Tensor, others: Sequence[Tensor]) -> list[float]:
    """Mean Dice of each mask with the others' mask of the same structure; 0 where neither has it.

    Args:
        one, others: ``(structures, *S)`` bool, as `masks_of` gives them.
    """
    dimensions = tuple(range(1, one.ndim))
    size = one.sum(dimensions)
    total = torch.zeros(len(one), dtype=torch.float64)
    for other in others:
        total += 2 * (one & other).sum(dimensions) / (size + other.sum(dimensions)).clamp(min=1)
    return [float(value) for value in total / len(others)]
