"""Ending a training early and cleanly: signals (SLURM preemption, Ctrl-C) and a file, ``stop`` or ``exit_training``."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ALIAS = "exit_training"  # of the stop file, for job scripts that write this name


class StopRequest:
    """Context manager that turns SIGTERM, SIGINT and a stop file into a question the training loop asks between steps.

    A second SIGINT interrupts at once. Handlers are installed in the main thread only (Python allows no other) and put
    back on exit.

    Args:
        stop_file: ``stop`` in the fold's folder; its presence asks for a stop, and so does that of `ALIAS` beside it.
            Both are removed when obeyed, or ``--c`` would stop at once.
    """

    def __init__(self, stop_file: Path) -> None:
        self._stop_files = (stop_file, stop_file.with_name(ALIAS))
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        # the first one counts: when SIGTERM kills the parent of DDP's ranks, torch sends them SIGINT as well
        self.signal = self.signal or signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether a signal came or a stop file exists."""
        return self.signal is not None or any(file.exists() for file in self._stop_files)

    @property
    def reason(self) -> str:
        """What asked for the stop, for the log."""
        if self.signal is not None:
            return self.signal.name
        return f"the file {next((file for file in self._stop_files if file.exists()), self._stop_files[0])}"

    def remove_files(self) -> None:
        """What was obeyed; also a stop file that a signal made needless."""
        for file in self._stop_files:
            file.unlink(missing_ok=True)

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it, so ``train && predict`` does not go on; 0 for the stop file."""
        return 128 + self.signal if self.signal is not None else 0
