"""The contrastive loss of the retriever: patches whose masks overlap shall be close, two views of one patch as well.

    L_con = CE(softmax(S / 0.1), softmax(q . k / tau)) + NT-Xent(view 1, view 2)

The paper's abstract names "alternating contrastive and supervised learning" and gives no formula; this one is ours.
NT-Xent is SimCLR's (https://arxiv.org/abs/2002.05709).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.jras.labels import MIN_FOREGROUND, adaptive_pool

TARGET_TEMPERATURE = 0.1
MAX_CELLS = 8  # per axis, of the masks that are compared


class Masks(NamedTuple):
    """Low-resolution masks of n patches: the foreground channels' share of each cell's annotated part, 0..1
    `(n, M, *cells)` fp32, and how much of each cell is annotated, 0..1 `(n, *cells)` fp32.
    """

    share: Tensor
    annotated: Tensor


def pool_masks(masks: Tensor, annotated: Tensor) -> Masks:
    """Pool foreground masks `(n, M, *L)`, 0 or 1, to at most 8 cells per axis; `annotated` is `(n, *L)` bool."""
    shape = [min(MAX_CELLS, n) for n in annotated.shape[1:]]
    known = adaptive_pool(annotated[:, None].float(), shape)
    share = adaptive_pool(masks.float() * annotated[:, None], shape) / known.clamp(min=1e-6)
    return Masks(share, known[:, 0])


def masks_of_target(target: Tensor, low_shape: tuple[int, ...], labels: LabelManager) -> Masks:
    """Masks of a batch, downsampled to L by the rule of the bank's labels (`low_res_labels`), without a wait.

    `target` is `(B, 1, *P)` label values, or `(B, regions, *P)` with the ignore map as a further last channel.
    """
    heads, ignore_label = labels.num_segmentation_heads, labels.ignore_label
    if labels.has_regions:
        ignored = target[:, heads] > 0 if ignore_label is not None else torch.zeros_like(target[:, 0], dtype=torch.bool)
        foreground = [(target[:, m] > 0) & ~ignored for m in range(heads)]
    else:
        ignored = target[:, 0] == (-2 if ignore_label is None else ignore_label)
        foreground = [target[:, 0] == m for m in range(1, heads)]
    # one channel at a time: all of a hundred classes at full resolution would not fit
    shares = torch.cat([adaptive_pool(mask[:, None].float(), low_shape) for mask in foreground], 1)
    annotated = adaptive_pool(ignored[:, None].float(), low_shape)[:, 0] <= 0.5
    if labels.has_regions:
        masks = shares >= MIN_FOREGROUND
    else:
        winner = F.one_hot(shares.argmax(1), shares.shape[1]).movedim(-1, 1).bool()
        masks = winner & (shares.sum(1, keepdim=True) >= MIN_FOREGROUND)
    return pool_masks(masks & annotated[:, None], annotated)


def mask_overlap(a: Masks, b: Masks) -> Tensor:
    """S `(n_a, n_b)`: the soft Dice of every pair, mean over the classes either has; both empty 1, one empty 0.

    2 sum min(a, b) / sum(a + b)      over cells, each with the weight of what is annotated in both
    """
    rows = []
    for share, annotated in zip(a.share, a.annotated):  # pair by pair would need n_a n_b M cells of memory
        weight = (annotated * b.annotated).flatten(1)[:, None]
        mine, theirs = share.flatten(1)[None], b.share.flatten(2)
        common = (torch.minimum(mine, theirs) * weight).sum(2)
        total = ((mine + theirs) * weight).sum(2)
        present = total > 0
        dice = 2 * common / total.clamp(min=1e-6)
        number = present.sum(1)
        rows.append(torch.where(number > 0, (dice * present).sum(1) / number.clamp(min=1), torch.ones_like(dice[:, 0])))
    return torch.stack(rows)


def overlap_loss(similarities: Tensor, overlap: Tensor, allowed: Tensor, tau: float) -> Tensor:
    """CE(softmax(S / 0.1), softmax(q . k / tau)), mean over the queries.

    Cosines q . k, S and `allowed` are `(queries, candidates)`; `allowed` is false for candidates of the query's own
    subject, and true for at least one of each row.
    """
    target = torch.where(allowed, overlap / TARGET_TEMPERATURE, -torch.inf).softmax(1)
    logarithm = torch.where(allowed, similarities / tau, -torch.inf).log_softmax(1)
    # 0 * -inf would be NaN
    return -(target * torch.where(allowed, logarithm, torch.zeros_like(logarithm))).sum(1).mean()


def nt_xent(first: Tensor, second: Tensor, tau: float) -> Tensor:
    """NT-Xent of two views `(n, D)`, L2-normalised: each view shall find the other among all 2n - 1 others."""
    views, n = torch.cat((first, second)), len(first)
    itself = torch.eye(2 * n, dtype=torch.bool, device=views.device)
    logits = torch.where(itself, -torch.inf, views @ views.T / tau)
    return F.cross_entropy(logits, torch.arange(2 * n, device=views.device).roll(n))


def flip(x: Tensor, flips: Tensor) -> Tensor:
    """Mirror each sample of `(n, C, *S)` along the axes where `flips` (n, axes), bool, says so."""
    for axis in range(flips.shape[1]):
        chosen = flips[:, axis].reshape(-1, *(1,) * (x.ndim - 1))
        x = torch.where(chosen, x.flip(axis + 2), x)
    return x


def perturb(x: Tensor, generator: torch.Generator) -> Tensor:
    """A view of patches `(n, C, *L)`: scaled by 0.7..1.3 and shifted by 0.1 of its spread per channel, noise of 0.1."""
    per_channel = (*x.shape[:2], *(1,) * (x.ndim - 2))
    spread = x.flatten(2).std(2).reshape(per_channel)
    scale = 0.7 + 0.6 * torch.rand(per_channel, generator=generator, device=x.device)
    shift, noise = (torch.randn(shape, generator=generator, device=x.device) for shape in (per_channel, x.shape))
    return x * scale + spread * (0.1 * shift + 0.1 * noise)
