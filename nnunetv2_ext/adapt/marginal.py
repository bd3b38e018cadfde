"""The marginal loss: classes that the labels do not draw share the background's probability.

Shi et al., Medical Image Analysis 2021 (arXiv:2007.03868): where only some classes are annotated, the probabilities of
all others are added to the background's, and the loss is taken over what remains.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_heads(number: int, hidden: Sequence[int], has_regions: bool) -> list[int]:
    """The heads that remain: of classes without the background (head 0), of regions all."""
    return [head for head in range(0 if has_regions else 1, number) if head not in hidden]


def merged_logits(logits: Tensor, hidden: Sequence[int]) -> Tensor:
    """``(B, K, *S)`` to ``(B, K - len(hidden), *S)``, whose softmax has the background's and the hidden classes' sum.

    Head 0 is the background; the others keep their order.
    """
    background = torch.logsumexp(logits[:, [0, *hidden]], dim=1, keepdim=True)
    return torch.cat((background, logits[:, kept_heads(logits.shape[1], hidden, has_regions=False)]), dim=1)


def merged_target(target: Tensor, hidden: Sequence[int], number: int) -> Tensor:
    """Labels ``(B, 1, *S)`` numbered as `merged_logits`; an ignore label (``number`` or more) keeps its value.

    Args:
        target: class labels.
        hidden: classes that become background.
        number: K, of heads before merging.
    """
    table = torch.arange(max(number, int(target.max()) + 1), device=target.device)
    table[list(hidden)] = 0
    for new, old in enumerate(kept_heads(number, hidden, has_regions=False), 1):
        table[old] = new
    return table[target.long()].to(target.dtype)


def without_regions(target: Tensor, hidden: Sequence[int], number: int) -> Tensor:
    """Regions ``(B, K, *S)`` or, with an ignore mask behind them, ``(B, K + 1, *S)``, without the hidden ones."""
    return target[:, [*kept_heads(number, hidden, has_regions=True), *range(number, target.shape[1])]]
