"""A progress bar on terminals, nothing in log files."""

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


def progress_bar(steps: int | Sequence[Any] | None, desc: str = "", enabled: bool = True) -> tqdm:
    """tqdm's bar of so many steps, or over a sequence, if stdout is a terminal; it wipes itself.

    In a log file, a pipe or a notebook's captured stream there is no bar, so log files stay free of control
    characters; `enabled=False` (other ranks) does the same.
    """
    try:
        shown = enabled and sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # closed, as under some schedulers
        shown = False
    over: dict[str, Any] = {"iterable" if isinstance(steps, Sequence) else "total": steps}
    return tqdm(**over, desc=desc, file=sys.stdout, leave=False, dynamic_ncols=True, mininterval=0.5, disable=not shown)
