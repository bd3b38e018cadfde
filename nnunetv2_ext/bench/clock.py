"""Wall and CPU time of a block of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Seconds per call.

    Attributes:
        wall: what a clock on the wall shows, the device's work included.
        cpu: processor time of this process over all its threads. On a machine shared with other work it is the
            steadier of the two.
    """

    wall: float
    cpu: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_block(call: Callable[[], object], number: int, device: torch.device) -> Times:
    """Mean over ``number`` calls run in one go.

    One mean and no list: the calls of a block may differ on purpose (a masked pass in every second step), and without
    a wait between them the CPU runs ahead of a GPU as it does in training.
    """
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        call()
    synchronize(device)
    return Times((time.perf_counter() - wall) / number, (time.process_time() - cpu) / number)
