"""How guides enter the segmentation network: attention in its deepest features, or concatenation at its input.

Both leave the network exactly as it is where all weight lies on the null guide: no bias, and a null value of zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_ext.jras.encoder import CONV
from nnunetv2_ext.jras.labels import adaptive_pool

TOKENS_PER_AXIS = 4
WIDTH, HEADS = 128, 4  # channels of queries, keys and values, over all heads
INITIAL_GATE = 0.1  # at 0 the retriever and the guide encoder would get exactly no gradient
_LINEAR = {2: "bilinear", 3: "trilinear"}


def safe_log(weights: Tensor) -> Tensor:
    """log w with log 0 = -inf, and gradient 0 there (the logarithm itself never sees the zero)."""
    positive = weights > 0
    logarithm = torch.where(positive, weights, torch.ones_like(weights)).log()
    return torch.where(positive, logarithm, torch.full_like(weights, -torch.inf))


class AttentionFusion(nn.Module):
    """Lets the two deepest feature maps look at the guides.

        logits[x, (j, t)] = (Wq f_x) . (Wk v_jt) / sqrt(d) + log w_j - log T
        null: learned key, value 0, + log w_null
        f' = f + gate_f Wo(sum softmax Wv v)
        h' = h + gate_h Po(sum_j w_j act(Pc [h, resize(u_j)]))

    With Wq = 0 the attention on all T tokens of guide j is w_j: without - log T a guide would outweigh the null T
    times.

    Channels are those of f, the bottleneck, h, the skip above it, u and v; `dim` is 2 or 3.
    """

    def __init__(
        self, deep_channels: int, skip_channels: int, fine_channels: int, coarse_channels: int, dim: int
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = HEADS, WIDTH // HEADS
        self.query = nn.Linear(deep_channels, WIDTH, bias=False)
        self.key = nn.Linear(coarse_channels, WIDTH, bias=False)
        self.value = nn.Linear(coarse_channels, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, deep_channels, bias=False)
        self.null_key = nn.Parameter(torch.randn(HEADS, self.head_dim) / self.head_dim**0.5)
        self.deep_gate = nn.Parameter(torch.tensor(INITIAL_GATE))
        # Pc in two halves, so that h is read once and not once per guide, and u before it is resized
        self.skip_from_query = CONV[dim](skip_channels, skip_channels, 1, bias=False)
        self.skip_from_guide = CONV[dim](fine_channels, skip_channels, 1, bias=False)
        self.skip_out = CONV[dim](skip_channels, skip_channels, 1, bias=False)
        self.skip_gate = nn.Parameter(torch.tensor(INITIAL_GATE))

    def forward(self, f: Tensor, h: Tensor, u: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """f' and h', shaped as f `(B, deep_channels, *)` and h `(B, skip_channels, *)`.

        u is `(B, K, fine_channels, *)`, v `(B, K, coarse_channels, *)`; weights `(B, K + 1)` fp32 sum to 1, the null
        guide's last.
        """
        deep, skip = self._from_tokens(f, v, weights), self._from_maps(h, u, weights[:, :-1])
        return f + self.deep_gate * deep, h + self.skip_gate * skip

    def tokens(self, v: Tensor) -> Tensor:
        """`(B, K, C, *)` to `(B, K, T, C)`: at most 4 cells per axis."""
        shape = [min(TOKENS_PER_AXIS, n) for n in v.shape[3:]]
        return adaptive_pool(v.flatten(0, 1), shape).flatten(2).transpose(1, 2).unflatten(0, v.shape[:2])

    def attention(self, f: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """Softmax `(B, heads, positions of f, K T + 1)` in fp32; the null token is the last."""
        B, K, T, _ = tokens.shape
        query = self.query(f.flatten(2).transpose(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key = self.key(tokens.flatten(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        with torch.autocast(f.device.type, enabled=False):
            key = torch.cat((key.float(), self.null_key.float()[None, :, None].expand(B, -1, -1, -1)), 2)
            logits = query.float() @ key.transpose(2, 3) / self.head_dim**0.5
            log_weights = safe_log(weights.float())
            share = (log_weights[:, :K] - math.log(T)).repeat_interleave(T, 1)
            prior = torch.cat((share, log_weights[:, K:]), 1)
            return (logits + prior[:, None, None]).softmax(-1)

    def _from_tokens(self, f: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        tokens = self.tokens(v)
        attention = self.attention(f, tokens, weights)[..., :-1]  # the null token's value is zero
        value = self.value(tokens.flatten(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        seen = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return self.out(seen).transpose(1, 2).unflatten(2, f.shape[2:])

    def _from_maps(self, h: Tensor, u: Tensor, weights: Tensor) -> Tensor:
        B, K = u.shape[:2]
        guide = self.skip_from_guide(u.flatten(0, 1))
        guide = F.interpolate(guide, h.shape[2:], mode=_LINEAR[h.ndim - 2], align_corners=False).unflatten(0, (B, K))
        # in place and as a matrix product: these maps are K times a skip's, and every copy of them costs
        mixed = F.leaky_relu(self.skip_from_query(h)[:, None] + guide, 0.01, inplace=True)
        mean = weights[:, None].to(mixed.dtype) @ mixed.flatten(2)
        return self.skip_out(mean.reshape(h.shape))


def concat_guides(x: Tensor, images: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """The input `(B, C_in, *P)` with the weighted guide below it: `(B, C_in + C + M, *P)`.

    Images are `(B, K, C, *L)`, weights `(B, K + 1)`, the null guide's last, which adds zero. Masks `(B, K, M, *L)` are
    one-hot, never integer labels: the mean of labels 0 and 2 would look like 1.
    """
    guides = torch.cat((images, masks), 2)
    share = weights[:, :-1].to(guides.dtype).reshape(*guides.shape[:2], *(1,) * (guides.ndim - 2))
    mean = (share * guides).sum(1)
    mean = F.interpolate(mean, x.shape[2:], mode=_LINEAR[x.ndim - 2], align_corners=False)
    return torch.cat((x, mean.to(x.dtype)), 1)
