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


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Context manager that follows how many bytes autograd keeps for backward passes, at their ``peak``.

    A storage counts once however often it is saved. Parameters do not count, frozen or not: they are
    there anyway.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, lambda kept: kept.tensor if isinstance(kept, _Kept) else kept)
        self.peak = self._held = 0
        self._users: Counter[int] = Counter()

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        is_parameter = isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        return tensor if is_parameter else _Kept(tensor, self)

    def count(self, storage: torch.UntypedStorage, change: int) -> None:
        """``storage`` has one user more (1) or one less (-1)."""
        self._users[storage.data_ptr()] += change
        if self._users[storage.data_ptr()] == max(change, 0):  # the first came, or the last went
            self._held += change * storage.nbytes()
            self.peak = max(self.peak, self._held)


class _Kept:
    """A saved tensor that reports its own end, when autograd lets go of it."""

    def __init__(self, tensor: Tensor, counter: SavedTensors) -> None:
        self.tensor, self._counter, self._storage = tensor, counter, tensor.untyped_storage()
        counter.count(self._storage, 1)

    def __del__(self) -> None:
        self._counter.count(self._storage, -1)


def saved_tensor_peak(step: Callable[[], object], number: int) -> int:
    """Bytes that autograd holds at most during ``number`` steps."""
    saved = SavedTensors()
    with saved:
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


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no CUDA


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
