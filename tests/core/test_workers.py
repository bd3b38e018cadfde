"""Loader processes end with the training that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import multiprocessing, sys, time
import numpy as np
from nnunetv2_ext.core.workers import in_workers

class Loader:
    def __next__(self):
        return {"x": np.zeros(3)}

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    train, validation = in_workers(Loader(), Loader(), pin_memory=False)
    next(train), next(validation)
    print("ready", flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no kill -9")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_after_their_training_was_killed(tmp_path: Path, method: str):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "nnUNet_n_proc_DA": "2"}
    command = [sys.executable, str(script), method]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    time.sleep(3)  # a worker that took another process for its parent would have ended by now
    children = psutil.Process(parent.pid).children(recursive=True)
    workers = [c for c in children if not c.children() and "resource_tracker" not in str(c.cmdline())]
    assert len(workers) == 3, "two for training, one for validation"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.time() + 30
    alive = workers
    while alive and time.time() < deadline:
        time.sleep(0.2)
        alive = [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]
    for worker in alive:
        worker.kill()
    assert not alive


def test_without_processes_the_loaders_are_called_in_place(monkeypatch: pytest.MonkeyPatch):
    from nnunetv2_ext.core.workers import in_workers

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    train, validation = in_workers(iter([{"a": 1}]), iter([{"b": 2}]), pin_memory=False)
    assert next(train) == {"a": 1} and next(validation) == {"b": 2}
