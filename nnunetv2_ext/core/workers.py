"""nnU-Net's loader processes, which here end when the training that started them was killed.

Upstream's (batchgenerators' NonDetMultiThreadedAugmenter) look at an event that only their parent sets: after
``kill -9`` each lives on for ever with the memory of a loaded nnU-Net.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import Any

import psutil
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

SECONDS = 2.0  # between two looks at the parent


class EndsWithParent:
    """A loader whose worker process ends within seconds after the process that made the loader has gone.

    Args:
        loader: an iterator of batches, picklable where processes are spawned.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._parent = os.getpid()

    def __iter__(self) -> EndsWithParent:
        return self

    def __next__(self) -> Any:
        return next(self.loader)

    def set_thread_id(self, thread_id: int) -> None:
        """What a worker calls first, in its own process."""
        if os.getpid() != self._parent:
            threading.Thread(target=self._watch, daemon=True).start()
        if hasattr(self.loader, "set_thread_id"):
            self.loader.set_thread_id(thread_id)

    def _watch(self) -> None:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._parent)  # not os.getppid(), which is another process under forkserver
            while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
                time.sleep(SECONDS)
        os._exit(1)  # the queue's lock may be held by the process that was killed: nothing can be handed over any more


def in_workers(train: Any, validation: Any, pin_memory: bool) -> tuple[Any, Any]:
    """Both loaders in as many background processes as nnU-Net would start (``nnUNet_n_proc_DA``; 0: in this one)."""
    processes = get_allowed_n_proc_DA()
    if processes == 0:
        return SingleThreadedAugmenter(train, None), SingleThreadedAugmenter(validation, None)
    common = {"transform": None, "seeds": None, "pin_memory": pin_memory, "wait_time": 0.002}
    half = processes // 2
    return (
        NonDetMultiThreadedAugmenter(EndsWithParent(train), num_processes=processes, num_cached=max(6, half), **common),
        NonDetMultiThreadedAugmenter(
            EndsWithParent(validation), num_processes=max(1, half), num_cached=max(3, processes // 4), **common
        ),
    )
