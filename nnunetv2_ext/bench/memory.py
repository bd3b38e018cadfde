"""Peak memory of a training step: the allocator's on CUDA, saved tensors and resident size on the CPU."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class SavedTensors:
    """Context manager that follows how many bytes autograd keeps for backward passes.

    A storage counts once however often it is saved. Parameters do not count: they are there anyway.

    Attributes:
        peak: the highest number of bytes held at one time.

    Example:
        >>> with SavedTensors() as saved:
        ...     loss = model(x).mean()
        ...     loss.backward()
        >>> saved.peak
    """

    def __init__(self) -> None:
        self.peak = 0
        self._held = 0
        self._users: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> _Kept:
        return _Kept(tensor, None if tensor.is_leaf and tensor.requires_grad else self)

    def add(self, storage: torch.UntypedStorage) -> None:
        """``storage`` has one more user."""
        self._users[storage.data_ptr()] += 1
        if self._users[storage.data_ptr()] == 1:
            self._held += storage.nbytes()
            self.peak = max(self.peak, self._held)

    def remove(self, storage: torch.UntypedStorage) -> None:
        """``storage`` has one user less."""
        self._users[storage.data_ptr()] -= 1
        if self._users[storage.data_ptr()] == 0:
            self._held -= storage.nbytes()


class _Kept:
    """A saved tensor that reports its own end, when autograd lets go of it."""

    __slots__ = ("_counter", "_storage", "tensor")

    def __init__(self, tensor: Tensor, counter: SavedTensors | None) -> None:
        self.tensor = tensor
        self._counter = counter
        self._storage = tensor.untyped_storage()
        if counter is not None:
            counter.add(self._storage)

    def __del__(self) -> None:
        if self._counter is not None:
            self._counter.remove(self._storage)


def saved_tensor_peak(step: Callable[[], object], number: int) -> int:
    """Bytes that autograd holds at most during ``number`` steps."""
    with SavedTensors() as saved:
        for _ in range(number):
            step()
    return saved.peak


def cuda_peak(step: Callable[[], object], number: int, device: torch.device, others: int) -> int:
    """Bytes allocated at most during ``number`` steps, without ``others``, those of the trainers beside this one."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(number):
        step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - others


def allocated(device: torch.device) -> int:
    """Bytes in use on a CUDA device; 0 elsewhere, where nothing counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def resident_peak(step: Callable[[], object], number: int) -> int:
    """Largest resident size of this process in bytes during ``number`` steps.

    Outside Linux, and where the kernel does not reset its record (some sandboxes), since the start of the process: so
    measure in a process of its own.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    for _ in range(number):
        step()
    # not getrusage on Linux: its ru_maxrss starts with the size of the process that started this one
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a device or in the process."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
