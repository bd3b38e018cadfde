"""One of nnU-Net's commands in a process that was forked from a warm one; a script that `commands.Commands` runs.

A fork has its own memory, signals and exit as a new process has, and saves the imports of 6 s. Real starts of the
console scripts are tested in ``tests/test_end_to_end.py`` and, without this package, by the contract's export.
The caller gives ``REQUEST``, the arguments of `_run`; ``entry`` is a module and a function in it.
"""

import importlib
import multiprocessing
import os
import sys
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any

_get_context = multiprocessing.get_context


def _threads_for_spawned_pools(method: str | None = None) -> Any:  # as in `commands`
    return SimpleNamespace(Pool=ThreadPool) if method == "spawn" else _get_context(method)


def _run(entry: tuple[str, str], argv: list[str], environment: dict[str, str], cwd: str, log: str) -> None:
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.argv = argv
    multiprocessing.get_context = _threads_for_spawned_pools  # type: ignore[assignment]
    getattr(importlib.import_module(entry[0]), entry[1])()


_run(**globals()["REQUEST"])
