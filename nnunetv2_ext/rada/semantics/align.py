"""Meeting point B: the annotated voxels meet the vectors of the slices that were annotated.

Ours; whether the paper aligns, and how, is not known.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def alignment_loss(
    features: Tensor,
    label: Tensor,
    bits: Tensor,
    view_axes: Sequence[int],
    vectors: Tensor,
    valid: Tensor,
    text: Tensor,
    projection: Callable[[Tensor], Tensor],
    tau: float,
    min_voxels: int,
    bank: Tensor,
) -> Tensor | None:
    """Mean over samples n, axes a in view and foreground classes c of InfoNCE(q; v(n, a, c)) + (1 - cos(q, u(c))) / 2.

    q is the projection of the mean feature of the voxels labelled c on planes of axis a. Negatives are the background's
    vector, the other classes' vectors and their texts. A term needs `min_voxels` such voxels and a vector of the
    sample's own; a negative the sample lacks is the bank's, and left out if that is 0.

    A voxel where planes cross counts for each of their axes. One annotated on no plane (a scribble) has the bits of all
    three axes and counts for each in view, towards `min_voxels` too: it was on no slice that CLIP saw, but is of the
    same class. Where the sample has no plane of an axis that shows the class, there is no vector, and it counts for
    nothing.

    Args:
        features: `(B, F, X, Y, Z)`.
        label: `(B, X, Y, Z)` integers; values outside 1..C-1 (background, ignore) are not aligned.
        bits: `(B, X, Y, Z)` integers; bit a: annotated on a plane of axis a, see `views.view_map`.
        view_axes: axes the network holds.
        vectors: v, `(B, 3, C, D)`; row 0 is the background's.
        valid: `(B, 3, C)` bool, which of them exist.
        text: u, `(C, D)`; row 0 is not used.
        projection: P, `(..., F)` to `(..., D)`.
        tau: temperature of InfoNCE, no unit.
        min_voxels: see above.
        bank: R, `(3, C, D)`.

    Returns:
        0-dim fp32; None if there is no term.
    """
    axes = list(view_axes)
    with torch.autocast(features.device.type, enabled=False):
        sums, counts = _sums_on_planes(features, label, bits, axes, len(text))
        own, exists = vectors[:, axes].float(), valid[:, axes]
        is_term = (counts >= min_voxels) & exists
        is_term[..., 0] = False
        sample, axis, target = is_term.nonzero(as_tuple=True)
        if len(target) == 0:
            return None
        means = sums[sample, axis, target] / counts[sample, axis, target][:, None]
        q = F.normalize(projection(means), dim=-1)
        candidates, allowed = _candidates(own, exists, text.float(), bank[axes].float())
        logits = torch.einsum("td,tkd->tk", q, candidates[sample, axis]) / tau
        usable = allowed[sample, axis]
        # the class's own text is pulled by the second part, it is no negative
        rows = torch.arange(len(target), device=target.device)
        usable[rows, len(text) + target] = False
        logits = logits.masked_fill(~usable, -torch.inf)
        to_text = (q * F.normalize(text.float(), dim=-1)[target]).sum(-1)
        return (F.cross_entropy(logits, target, reduction="none") + (1 - to_text) / 2).mean()


def _sums_on_planes(
    features: Tensor, label: Tensor, bits: Tensor, axes: list[int], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Sums `(B, A, C, F)` of features and numbers `(B, A, C)` of voxels by sample, axis and class; fp32."""
    B, A, C = len(features), len(axes), num_classes
    in_view = sum(1 << axis for axis in axes)
    # planes are a few percent of a patch: only their features are read
    b, *space = ((bits & in_view).bool() & (label > 0) & (label < C)).nonzero(as_tuple=True)
    where = (b, *space)
    chosen = features.movedim(1, -1)[where].float()
    sums = chosen.new_zeros(B * A * C, features.shape[1])
    counts = chosen.new_zeros(B * A * C)
    for i, axis in enumerate(axes):
        on_axis = ((bits[where] >> axis) & 1).to(chosen.dtype)
        cell = (b * A + i) * C + label[where].long()
        sums = sums.index_add(0, cell, chosen * on_axis[:, None])
        counts = counts.index_add(0, cell, on_axis)
    return sums.view(B, A, C, -1), counts.view(B, A, C)


def _candidates(own: Tensor, exists: Tensor, text: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors `(B, A, 2C, D)`, first the classes' images and then their texts, and which of them may be used."""
    image = torch.where(exists[..., None], own, bank)
    usable = exists | (bank != 0).any(-1)
    texts = text.expand(*image.shape[:2], -1, -1)
    has_text = torch.ones_like(usable)
    has_text[..., 0] = False
    return F.normalize(torch.cat((image, texts), 2), dim=-1), torch.cat((usable, has_text), 2)
