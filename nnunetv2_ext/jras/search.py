"""Nearest keys by inner product, always exactly: FAISS proposes them where it is installed, else torch."""

import os
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

GPU_SCRATCH_BYTES = 64 * 2**20  # FAISS takes 1.5 GB of a GPU if it is not told
GPU_MAX_K = 2048  # of a FAISS GPU search
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


@lru_cache(maxsize=1)
def _gpu_resources() -> Any:
    """What FAISS needs on a GPU; None where it sees none, or its CUDA does not work beside torch's."""
    faiss = load_faiss()
    if faiss is None or faiss.get_num_gpus() == 0:
        return None
    import faiss.contrib.torch_utils  # lets FAISS take torch tensors, on torch's current stream

    try:
        resources = faiss.StandardGpuResources()
        resources.setTempMemory(GPU_SCRATCH_BYTES)
    except RuntimeError:
        return None
    return resources


def nearest(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Ids of the keys with the largest inner product, largest first, int64 ``(B, k)`` on the queries' device.

    Queries ``(B, D)`` and keys ``(N, D)`` are fp32, k is 1 to N. Keys are searched where they are. An id is -1 where
    FAISS finds none, as for a query that is not finite.
    """
    found = queries.detach().to(keys.device).contiguous()
    faiss = load_faiss()
    if faiss is not None and keys.device.type == "cpu":
        ids = torch.from_numpy(faiss.knn(found.numpy(), keys.numpy(), k, faiss.METRIC_INNER_PRODUCT)[1])
    elif keys.device.type == "cuda" and k <= GPU_MAX_K and (resources := _gpu_resources()) is not None:
        number = keys.device.index if keys.device.index is not None else torch.cuda.current_device()
        ids = faiss.knn_gpu(resources, found, keys, k, metric=faiss.METRIC_INNER_PRODUCT, device=number)[1]
    else:
        ids = (found @ keys.T).topk(k, dim=1).indices
    return ids.to(queries.device)


def select(
    queries: Tensor,
    keys: Tensor,
    k: int,
    key_groups: Tensor,
    groups: Tensor | None = None,
    largest_group: int = 0,
    dedup_cosine: float | None = None,
    random: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of other groups, k from 1 to N.

    Args:
        queries, keys: ``(B, D)`` and ``(N, D)`` fp32.
        key_groups, groups: ``(N,)`` and ``(B,)``, of keys and queries; own groups are left out. None: nothing is.
        largest_group: keys in the largest group. So many more are searched by ``nearest``, which knows no groups.
        dedup_cosine: leave out keys whose inner product with the query is larger; None leaves out none.
        random, generator: uniform over what is left, without repeats, instead of nearest first.

    Returns:
        Ids ``(B, k)``, nearest first and the lower id first among equals, 0 where invalid; validity, bool ``(B, k)``.
    """
    if random or dedup_cosine is not None:  # rules that leave out any number of keys need the scores of all
        scores = queries @ keys.T
        candidates = torch.arange(len(keys), device=queries.device).expand_as(scores)
        allowed = torch.ones_like(candidates, dtype=torch.bool)
        if dedup_cosine is not None:
            allowed &= ~(scores > dedup_cosine)
        if random:
            device = queries.device if generator is None else generator.device
            scores = torch.rand(scores.shape, generator=generator, device=device).to(queries.device)
    else:
        wanted = k if groups is None else min(len(keys), k + largest_group)
        # FAISS finds nothing for a query that is not finite
        broken = ~torch.isfinite(queries).all(1, keepdim=True)
        found = torch.where(broken, torch.arange(wanted, device=queries.device), nearest(queries, keys, wanted))
        # by id, so that the stable sort by score settles ties, in whatever order FAISS gave them
        candidates = found.sort(dim=1).values
        allowed = candidates >= 0  # -1 would index the last guide
        candidates = candidates.clamp(min=0)
        # scored again row by row: FAISS and matmul round differently for batches of different size
        scores = (queries[:, None] * keys[candidates]).sum(2)
    if groups is not None:
        allowed &= key_groups[candidates] != groups[:, None]
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :k]
    valid = allowed.gather(1, order)
    return candidates.gather(1, order).masked_fill(~valid, 0), valid
