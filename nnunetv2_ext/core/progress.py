"""A progress bar on terminals, nothing in log files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from typing import Any


def as_number(value: Any) -> float | None:
    """A Python number from a number or a one-element tensor or array, else None."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return int(value) if isinstance(value, int) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


class ProgressBar:
    """A bar on a terminal, nothing elsewhere; made by `progress_bar`."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, n: int = 1, **postfix: Any) -> None:
        """Advance by `n` steps and show figures behind the bar. Without a bar they are not even read, so a tensor on
        a GPU is not waited for."""
        if self._bar is not None:
            if postfix:
                numbers = {name: as_number(value) for name, value in postfix.items()}
                self._bar.set_postfix({k: postfix[k] if v is None else v for k, v in numbers.items()}, refresh=False)
            self._bar.update(n)

    def close(self) -> None:
        """Wipe the bar off the terminal. Closing twice does no harm."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(total: int | Iterable[Any] | None, desc: str = "", enabled: bool = True) -> ProgressBar:
    """A progress bar of `total` steps (a number, or something with a length) if stdout is a terminal.

    In a log file, a pipe or a notebook's captured stream there is no bar, so log files stay free of control
    characters; `enabled=False` (other ranks) does the same.
    """
    if not (enabled and _stdout_is_terminal()):
        return ProgressBar(None)
    from tqdm import tqdm

    if isinstance(total, Sized):
        total = len(total)
    steps = total if isinstance(total, int) else None
    return ProgressBar(tqdm(total=steps, desc=desc, file=sys.stdout, leave=False, dynamic_ncols=True, mininterval=0.5))


def _stdout_is_terminal() -> bool:
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # closed, as under some schedulers
        return False
