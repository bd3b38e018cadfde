"""How guides are read: each query cell attends to all cells of its guides and takes what lies there.

The parts of the idea are those of networks that read a support set (UniverSeg, Neuralizer, video memories); written
from their descriptions. All arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_ext.jras.labels import pool

INITIAL_TEMPERATURE = 10.0  # factor of the cosines before the softmax over cells
FLOOR = -1.0  # similarity to a class that no guide shows: that of the opposite
UNKNOWN = -1e4  # added to the logit of a cell without annotation; finite, so that a guide without any gives no NaN
MIN_KNOWN = 0.5  # share of a cell's voxels that must be annotated
QUERIES, CELLS = 4, 64  # of a batch, of a query, for the figure: attention to all guides of the bank is large
_TINY = 1e-6

Function = TypeVar("Function", bound=Callable[..., Any])


def _in_fp32(function: Function) -> Function:
    """Autocast is off in it: cosines, sums over a patch and the softmax over all cells lose too much in fp16."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*arguments)

    return run  # type: ignore[return-value]


class GuideFeatures(NamedTuple):
    """What is read of guides; leading axes `(...)` are `(N,)` in the bank, `(B, K)` for a batch. All fp32.

    Keys `(..., n, D)`, L2-normalised, and values `(..., n, M + V)` are of the n cells, the masks first; bias `(..., n)`
    is 0, or UNKNOWN. Vectors `(..., D)`, L2-normalised, are what guides are searched by. `sums` and `counts` are, for
    each of the two finest resolutions, features summed over a mask `(..., M, C)` and the mask's share `(..., M)`.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    vectors: Tensor
    sums: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]

    def select(self, ids: Tensor, valid: Tensor) -> GuideFeatures:
        """Rows `ids` `(B, K)`; those that are not `valid` `(B, K)` are there but say nothing."""
        counts = tuple(part[ids] * valid[..., None] for part in self.counts)
        sums = tuple(part[ids] * valid[..., None, None] for part in self.sums)
        bias = torch.where(valid[..., None], self.bias[ids], torch.full_like(self.bias[:1, :1], UNKNOWN))
        return GuideFeatures(self.keys[ids], self.values[ids], bias, self.vectors[ids], sums, counts)

    def unflatten(self, batch: int) -> GuideFeatures:
        """Leading axis `(B * K,)` as `(B, K)`."""
        first = [part.unflatten(0, (batch, -1)) for part in self[:4]]
        return GuideFeatures(*first, *(tuple(p.unflatten(0, (batch, -1)) for p in parts) for parts in self[4:]))  # type: ignore[arg-type]


def joined(parts: Sequence[GuideFeatures], axis: int) -> GuideFeatures:
    """Some guides after others, along a leading axis."""
    first = [torch.cat(own, axis) for own in zip(*(part[:4] for part in parts))]
    levels = [tuple(torch.cat(own, axis) for own in zip(*(part[i] for part in parts))) for i in (4, 5)]
    return GuideFeatures(*first, *levels)  # type: ignore[arg-type]


class Reader(nn.Module):
    """Keys, values and vectors of cells, and the read itself.

    Args:
        channels: of the features at the resolution that is read at.
        key_dim, value_dim: D and V.
        dim: axes of a patch.
        scores: whether a guide's score enters the attention; else all guides are alike (`retriever=random`).
    """

    def __init__(self, channels: int, key_dim: int, value_dim: int, dim: int, scores: bool = True) -> None:
        super().__init__()
        convolution = nn.Conv2d if dim == 2 else nn.Conv3d
        self.key = convolution(channels, key_dim, 1, bias=False)
        self.value = convolution(channels, value_dim, 1, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE).log())
        self.scores = scores
        if scores:
            self.query_vector = nn.Linear(key_dim, key_dim)
            self.guide_vector = nn.Linear(key_dim, key_dim)
            self.log_scale = nn.Parameter(torch.zeros(()))

    @_in_fp32
    def keys(self, features: Tensor) -> Tensor:
        """`(B, n, D)` of features `(B, C, *s)`."""
        return F.normalize(self.key(features.float()).flatten(2).transpose(1, 2), dim=2)

    @_in_fp32
    def query_vectors(self, keys: Tensor) -> Tensor:
        """`(B, D)` of the keys of a query's cells; without scores zeros."""
        return F.normalize(self.query_vector(keys.mean(1)), dim=1) if self.scores else keys[:, 0] * 0

    @_in_fp32
    def guide_features(self, features: Tensor, fine: Sequence[Tensor], masks: Tensor, known: Tensor) -> GuideFeatures:
        """What can be read of G guides.

        Args:
            features: `(G, C, *s)` at the resolution that is read at.
            fine: features `(G, C, *S)` at the finest resolutions.
            masks, known: `(G, M, *P)` fp32, 0 where nothing is known, and `(G, 1, *P)`.
        """
        keys, size = self.keys(features), features.shape[2:]
        share = pool(known.float(), size).flatten(1)
        is_known = (share > MIN_KNOWN).float()
        cells = pool(masks, size).flatten(2).transpose(1, 2) / share.clamp(min=_TINY)[..., None]
        values = torch.cat((cells, self.value(features.float()).flatten(2).transpose(1, 2)), 2)
        if self.scores:
            mean = (keys * is_known[..., None]).sum(1) / is_known.sum(1, keepdim=True).clamp(min=1)
            vectors = F.normalize(self.guide_vector(mean), dim=1)
        else:
            vectors = keys[:, 0] * 0
        sums, counts = zip(*(class_sums(f, pool(masks, f.shape[2:])) for f in fine))
        return GuideFeatures(keys, values, UNKNOWN * (1 - is_known), vectors, sums, counts)

    def logits_of_guides(self, vectors: Tensor, guides: GuideFeatures) -> Tensor:
        """Bias of each guide cell `(B, K, n)`: its guide's score, an estimate of the log of its attention mass."""
        if not self.scores:
            return guides.bias
        score = self.log_scale.exp() * (vectors[:, None] * guides.vectors).sum(2)
        return guides.bias + score[..., None]

    @_in_fp32
    def forward(self, keys: Tensor, vectors: Tensor, guides: GuideFeatures) -> Tensor:
        """What the query cells read, `(B, n, M + V)`: values averaged by softmax(t cos + bias) over all guide cells.

        Args:
            keys, vectors: of the queries, `(B, n, D)` and `(B, D)`.
            guides: `(B, K)`.
        """
        bias = self.logits_of_guides(vectors, guides).flatten(1)[..., None]
        of_guides, values = guides.keys.flatten(1, 2), guides.values.flatten(1, 2)
        query = torch.cat((keys * self.log_temperature.exp(), torch.ones_like(keys[..., :1])), 2)
        # the bias is one more number of a key, and all have one width: then torch never keeps queries x keys
        width = -(-max(query.shape[2], values.shape[2]) // 8) * 8
        q, k, v = (F.pad(x, (0, width - x.shape[2]))[:, None] for x in (query, torch.cat((of_guides, bias), 2), values))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, : values.shape[2]]

    @_in_fp32
    def masses(self, keys: Tensor, vectors: Tensor, guides: GuideFeatures, with_scores: bool = True) -> Tensor:
        """Attention that each guide gets, averaged over the query cells: `(B, K)`, rows sum to 1."""
        bias = self.logits_of_guides(vectors, guides) if with_scores else guides.bias
        logits = self.log_temperature.exp() * torch.einsum("bxd,bkyd->bxky", keys, guides.keys) + bias[:, None]
        return torch.logsumexp(logits, 3).softmax(2).mean(1)


def class_sums(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Features `(G, C, *S)` averaged over cells with masks `(G, M, *S)` as weights, not normalised: `(G, M, C)`.

    And the masks' shares of the patch `(G, M)`, by which the first is to be divided.
    """
    weights = masks.flatten(2) / masks[0, 0].numel()
    return weights @ features.flatten(2).float().transpose(1, 2), weights.sum(2)


@_in_fp32
def prototype_similarity(features: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Cosine of each cell to each class of the guides, around the mean of the classes: `(B, M, *S)`.

    A class that no guide shows has FLOOR.

    Args:
        features: of the queries, `(B, C, *S)`.
        sums, counts: `(B, K, M, C)` and `(B, K, M)` of `class_sums`.
    """
    count = counts.sum(1)
    shown = count > _TINY
    prototypes = sums.sum(1) / count.clamp(min=_TINY)[..., None]
    centre = (prototypes * shown[..., None]).sum(1) / shown.sum(1).clamp(min=1)[:, None]
    directions = F.normalize(prototypes - centre[:, None], dim=2)
    flat = features.flatten(2).float()
    # |f - c| without f - c, which would be one more tensor of the size of the features
    norm = (flat.square().sum(1) - 2 * (centre[:, None] @ flat)[:, 0] + centre.square().sum(1)[:, None]).clamp(
        min=_TINY
    )
    cosines = (directions @ flat - (directions * centre[:, None]).sum(2)[..., None]) / norm.sqrt()[:, None]
    cosines = torch.where(shown[..., None], cosines, torch.full_like(cosines, FLOOR))
    return cosines.unflatten(2, features.shape[2:])


@_in_fp32
def transported_loss(transported: Tensor, masks: Tensor, known: Tensor, regions: bool) -> Tensor:
    """Cross entropy of what was read of the guides' masks and the query's own mask, averaged over known cells.

    Args:
        transported: `(B, M, *s)`, shares 0 to 1.
        masks, known: of the queries, `(B, M, *P)` and `(B, 1, *P)`, see `labels.masks_of_target`.
        regions: channels overlap: two-state cross entropy of each, summed.

    Returns:
        0-dim; 0 where no cell is known.
    """
    size = transported.shape[2:]
    share = pool(known.float(), size)
    wanted = pool(masks, size) / share.clamp(min=_TINY)
    p = 0.98 * transported.clamp(0, 1) + 0.01  # a class that no guide shows costs a finite, constant amount
    entropy = -wanted * p.log()
    if regions:
        entropy = entropy - (1 - wanted) * (1 - p).log()
    weight = (share > MIN_KNOWN).float()
    return (entropy.sum(1, keepdim=True) * weight).sum() / weight.sum().clamp(min=1)


@torch.no_grad()
def mass_recall(
    reader: Reader, features: GuideFeatures, own: Tensor, keys: Tensor, vectors: Tensor, ids: Tensor, valid: Tensor
) -> float:
    """Attention mass of the retrieved guides over that of the K with the most mass, mean over queries; 0 to 1.

    The mass is that of attention to the whole bank without scores, which the search estimates by one vector a guide.

    Args:
        features, own: of all guides `(N,)`; bool `(B, N)`, guides that a query must not get.
        keys, vectors, ids, valid: of a batch, as in network.Reading.
    """
    at = torch.linspace(0, keys.shape[1] - 1, min(CELLS, keys.shape[1]), device=keys.device).long()
    shares = []
    for query in range(min(QUERIES, len(ids))):
        bias = torch.where(own[query][:, None], UNKNOWN, features.bias)
        everything = GuideFeatures(
            features.keys[None], features.values[None], bias[None], features.vectors[None], (), ()
        )
        masses = reader.masses(keys[query : query + 1, at], vectors[query : query + 1], everything, False)[0]
        found = ids[query][valid[query]]
        shares.append(masses[found].sum() / masses.topk(len(found)).values.sum().clamp(min=1e-9))
    return float(torch.stack(shares).mean())
