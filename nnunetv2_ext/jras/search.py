"""Nearest vectors by inner product, always exactly: by FAISS on a CPU; by torch on a GPU, or where FAISS is missing."""

import os
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# The process that first had guides. A forked child inherits the number, a spawned one imports the module anew
_owner: int | None = None


def require_main_process() -> None:
    """Refuse guides in a child forked from the process that has some: FAISS can hang there once the parent used it.

    See facebookresearch/faiss#5206. A child of a process that never had guides may have its own.

    Raises:
        ValueError: this process was forked from one that had guides.
    """
    global _owner
    if _owner is None:
        _owner = os.getpid()
    elif os.getpid() != _owner:
        raise ValueError(
            f"guides were looked up in process {os.getpid()}, forked from {_owner}: FAISS can hang in a forked "
            "child. Run the network in the main process, or start workers with the spawn method"
        )


@lru_cache(maxsize=1)
def load_faiss() -> Any:
    """The ``faiss`` module, or None with one warning per process."""
    try:
        import faiss
    except ImportError as error:
        warnings.warn(
            f"FAISS cannot be imported ({error}): torch searches the guides, with the same result. "
            "pip install faiss-cpu, or faiss-gpu on Linux with CUDA",
            stacklevel=2,
        )
        return None
    return faiss


def nearest(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Ids of the keys with the largest inner product, largest first, int64 ``(B, k)`` on the queries' device.

    Queries ``(B, D)`` and keys ``(N, D)`` are fp32, k is 1 to N. Keys are searched where they are. An id is -1 where
    FAISS finds none, as for a query that is not finite.
    """
    found = queries.detach().to(keys.device).contiguous()
    faiss = load_faiss()
    if faiss is not None and keys.device.type == "cpu":
        ids = torch.from_numpy(faiss.knn(found.numpy(), keys.numpy(), k, faiss.METRIC_INNER_PRODUCT)[1])
    else:
        ids = (found @ keys.T).topk(k, dim=1).indices
    return ids.to(queries.device)


def select(
    queries: Tensor,
    keys: Tensor,
    k: int,
    key_groups: Tensor,
    groups: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of other groups, k from 1 to N.

    Args:
        queries, keys: ``(B, D)`` and ``(N, D)`` fp32.
        key_groups, groups: ``(N,)`` and ``(B,)``, of keys and queries; own groups are left out. None: nothing is.
        generator: uniform over what is left, without repeats, by this generator, instead of nearest first.

    Returns:
        Ids ``(B, k)``, nearest first and the lower id first among equals, 0 where invalid; validity, bool ``(B, k)``.

    Raises:
        ValueError: the process was forked from one that had guides.
    """
    require_main_process()
    if generator is not None:
        candidates = torch.arange(len(keys), device=queries.device).expand(len(queries), -1)
        allowed = torch.ones_like(candidates, dtype=torch.bool)
        drawn = torch.rand(candidates.shape, generator=generator, device=generator.device)
        scores = drawn.to(queries.device)
    else:
        # so many more are searched by `nearest`, which knows no groups
        largest = 0 if groups is None else int(torch.unique(key_groups, return_counts=True)[1].max())
        wanted = min(len(keys), k + largest)
        # FAISS finds nothing for a query that is not finite: it gets any guides, and its NaN reaches the loss
        broken = ~torch.isfinite(queries).all(1, keepdim=True)
        found = torch.where(broken, torch.arange(wanted, device=queries.device), nearest(queries, keys, wanted))
        # by id, so that the stable sort by score settles ties, in whatever order FAISS gave them
        candidates = found.sort(dim=1).values
        allowed = candidates >= 0  # -1 would index the last guide
        candidates = candidates.clamp(min=0)
        # scored again row by row: FAISS and matmul round differently for batches of different size
        scores = (queries[:, None] * keys[candidates]).sum(2)
    if groups is not None:
        allowed = allowed & (key_groups[candidates] != groups.to(key_groups.device)[:, None])
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :k]
    valid = allowed.gather(1, order)
    return candidates.gather(1, order).masked_fill(~valid, 0), valid
