"""Nearest keys by inner product: FAISS where it is installed, exact torch otherwise."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

EXACT = "Flat"
GPU_SCRATCH_BYTES = 64 * 2**20  # FAISS takes 1.5 GB of a GPU if it is not told
GPU_MAX_K = 2048  # of a FAISS GPU search
# The process that first had guides. A forked child inherits the number, a spawned one imports the module anew
_owner: int | None = None


class Guides(NamedTuple):
    """What a query gets: K guides per sample; invalid slots hold id 0 and zeros.

    Attributes:
        ids: ``(B, K)`` int64, rows of the bank, never negative.
        valid: ``(B, K)`` bool; the valid ones come first, nearest first.
        images: ``(B, K, C, *L)`` fp32, in the network's intensities.
        masks: ``(B, K, M, *L)`` fp32, 0 or 1 per mask channel.
        keys: ``(B, K, D)`` fp32, the stored ones.
    """

    ids: Tensor
    valid: Tensor
    images: Tensor
    masks: Tensor
    keys: Tensor


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
            f"FAISS cannot be imported ({error}): guides are searched exactly by torch, whatever jras.index says. "
            "pip install faiss-cpu, or faiss-gpu on Linux with CUDA",
            stacklevel=2,
        )
        return None
    return faiss


def exact_search(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Ids ``(B, k)`` of the keys ``(N, D)`` with the largest inner product with queries ``(B, D)``, largest first."""
    return (queries @ keys.T).topk(k, dim=1).indices


class Searcher:
    """Finds the stored keys with the largest inner product with a query.

    FAISS on the keys' GPU if it sees one, else on the CPU. Exact search of keys on a device FAISS does not reach is
    done by torch where the keys are: the same result without copying queries to the host.

    Args:
        keys: ``(N, D)`` fp32, N >= 1; a FAISS index copies them.
        index: a faiss ``index_factory`` string; ``Flat`` is exact.
        nprobe: lists an IVF index looks into; None leaves FAISS's 1.
        ef_search: candidates an HNSW index keeps; None leaves FAISS's 16.

    Attributes:
        backend: ``faiss-gpu``, ``faiss-cpu`` or ``torch``.

    Raises:
        ValueError: an index string FAISS does not understand or cannot build from so few keys, a parameter the index
            does not have, or a forked process.
    """

    def __init__(
        self, keys: Tensor, index: str = EXACT, nprobe: int | None = None, ef_search: int | None = None
    ) -> None:
        require_main_process()
        self.keys = keys
        self.index = index
        self.backend = "torch"
        self._faiss_index: Any = None
        faiss = load_faiss()
        if faiss is None:
            return
        template = _factory(faiss, index, keys.shape[1])
        parameters = {name: value for name, value in (("nprobe", nprobe), ("efSearch", ef_search)) if value is not None}
        _set_parameters(faiss, template, index, parameters)
        if keys.device.type == "cuda" and faiss.get_num_gpus() > 0:
            self._faiss_index = self._on_gpu(faiss, template)
        if self._faiss_index is not None:
            self.backend = "faiss-gpu"
        elif keys.device.type == "cpu" or index != EXACT:
            self._faiss_index, self.backend = template, "faiss-cpu"
        if self._faiss_index is not None:
            self._fill(faiss)
            _set_parameters(faiss, self._faiss_index, index, parameters)

    @property
    def is_exact(self) -> bool:
        """Whether every search returns the true nearest keys."""
        return self.index == EXACT or self._faiss_index is None

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Ids of the nearest keys, nearest first, int64 ``(B, k)`` on the queries' device; -1 where it found none.

        Args:
            queries: ``(B, D)`` fp32.
            k: 1 to N.

        Raises:
            ValueError: the process is a forked child.
        """
        require_main_process()
        if self._faiss_index is None or (self.backend == "faiss-gpu" and k > GPU_MAX_K):
            return exact_search(queries.to(self.keys.device), self.keys, k).to(queries.device)
        queries = queries.detach().contiguous()
        if self.backend == "faiss-gpu":
            return self._faiss_index.search(queries.to(self.keys.device), k)[1].to(queries.device)
        ids = self._faiss_index.search(queries.cpu().numpy(), k)[1]
        return torch.from_numpy(ids).to(queries.device)

    def recall(self, queries: Tensor, k: int) -> float:
        """Share of the k true nearest keys of queries ``(B, D)`` that ``search`` finds, 0..1 (1 for an exact index)."""
        if self.is_exact:
            return 1.0
        k = min(k, len(self.keys))
        found = self.search(queries, k)
        true = exact_search(queries.to(self.keys.device), self.keys, k).to(found.device)
        return (true[:, :, None] == found[:, None, :]).any(2).float().mean().item()

    def _on_gpu(self, faiss: Any, template: Any) -> Any:
        import faiss.contrib.torch_utils  # lets FAISS take torch tensors, on torch's current stream

        number = self.keys.device.index if self.keys.device.index is not None else torch.cuda.current_device()
        try:
            self._resources = faiss.StandardGpuResources()  # must outlive the index
            self._resources.setTempMemory(GPU_SCRATCH_BYTES)
            return faiss.index_cpu_to_gpu(self._resources, number, template)
        except RuntimeError:  # HNSW has no GPU version, or FAISS' CUDA does not work beside torch's
            return None

    def _fill(self, faiss: Any) -> None:
        keys: Any = self.keys.detach().contiguous()
        if self.backend == "faiss-cpu":
            keys = keys.cpu().numpy()
        try:
            if not self._faiss_index.is_trained:
                self._faiss_index.train(keys)
            self._faiss_index.add(keys)
        except RuntimeError as error:
            raise ValueError(
                f"jras.index={self.index!r} cannot be built from {len(self.keys)} guides ({_reason(error)}); use Flat, "
                "fewer lists, or a larger jras.bank_size"
            ) from None


def select_nearest(
    searcher: Searcher,
    queries: Tensor,
    k: int,
    key_groups: Tensor,
    groups: Tensor | None = None,
    largest_group: int = 0,
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of other groups, by an index that knows no groups.

    Args:
        searcher: over N keys.
        queries: ``(B, D)`` fp32.
        k: 1 to N.
        key_groups: ``(N,)``, group of each key.
        groups: ``(B,)``, group of each query, whose keys are left out; None leaves out nothing.
        largest_group: keys in the largest group. Searching that many more makes the result exact if the index is.

    Returns:
        Ids ``(B, k)``, nearest first and the lower id first among equals, 0 where invalid; validity, bool ``(B, k)``.
    """
    number = len(searcher.keys)
    wanted = k if groups is None else min(number, k + largest_group)
    candidates = searcher.search(queries, wanted)
    # FAISS finds nothing for a query that is not finite
    broken = ~torch.isfinite(queries).all(1, keepdim=True)
    candidates = torch.where(broken, torch.arange(wanted, device=queries.device), candidates)
    allowed = candidates >= 0  # FAISS pads with -1, which would index the last guide
    candidates = candidates.clamp(min=0)
    if groups is not None:
        allowed &= key_groups[candidates] != groups[:, None]
    # by id first: the stable sort by score then settles ties, in whatever order FAISS gave them
    candidates, order = candidates.sort(dim=1)
    allowed = allowed.gather(1, order)
    # scored again row by row: FAISS and matmul round differently for batches of different size
    scores = (queries[:, None] * searcher.keys[candidates]).sum(2).masked_fill(~allowed, -torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    ids, valid = candidates.gather(1, order), allowed.gather(1, order)
    return ids.masked_fill(~valid, 0), valid


def select_from_all(
    queries: Tensor,
    keys: Tensor,
    k: int,
    key_groups: Tensor,
    groups: Tensor | None = None,
    dedup_cosine: float | None = None,
    random: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``select_nearest``, from the scores of all keys, for rules that exclude any number of them.

    Args:
        queries: ``(B, D)``.
        keys: ``(N, D)``.
        k: 1 to N.
        key_groups: ``(N,)``.
        groups: ``(B,)`` or None.
        dedup_cosine: leave out keys whose inner product with the query is larger; None leaves out none.
        random: uniform over what is left, without repeats, instead of nearest first.
        generator: of the random draw, on its own device.
    """
    scores = queries @ keys.T
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if groups is not None:
        allowed &= key_groups != groups[:, None]
    if dedup_cosine is not None:
        allowed &= ~(scores > dedup_cosine)
    if random:
        device = queries.device if generator is None else generator.device
        scores = torch.rand(scores.shape, generator=generator, device=device).to(queries.device)
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :k]
    valid = allowed.gather(1, order)
    return order.masked_fill(~valid, 0), valid


def check_index(index: str, key_dim: int = 128, nprobe: int | None = None, ef_search: int | None = None) -> None:
    """Refuse an index string or parameter before a training starts. Without FAISS nothing can be checked.

    Raises:
        ValueError: FAISS does not understand the string, or the index has no such parameter.
    """
    faiss = load_faiss()
    if faiss is not None:
        parameters = {name: value for name, value in (("nprobe", nprobe), ("efSearch", ef_search)) if value is not None}
        _set_parameters(faiss, _factory(faiss, index, key_dim), index, parameters)


def _factory(faiss: Any, index: str, dim: int) -> Any:
    try:
        return faiss.index_factory(dim, index, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"jras.index={index!r} is no faiss index_factory string ({_reason(error)}); use Flat (exact), or for "
            "example IVF256,Flat or HNSW32,Flat"
        ) from None


def _set_parameters(faiss: Any, built: Any, index: str, parameters: dict[str, int]) -> None:
    on_gpu = hasattr(faiss, "GpuIndex") and isinstance(built, faiss.GpuIndex)
    space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
    for name, value in parameters.items():
        try:
            space.set_index_parameter(built, name, value)
        except RuntimeError:
            raise ValueError(f"jras.index={index!r} has no parameter {name} to set to {value}; unset it") from None


def _reason(error: RuntimeError) -> str:
    return " ".join(str(error).rpartition(": ")[2].split()) or type(error).__name__
