"""Steps in a process of their own.

Its largest resident size is that one trainer's, its loader's workers end with it, and if the system kills it for memory
the others go on. Run as
``python -m nnunetv2_ext.bench.isolated``; reads the job as JSON from stdin, writes JSON as the last line of stdout.
"""

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import psutil
import torch

from nnunetv2_ext.bench.candidates import Candidate
from nnunetv2_ext.bench.loading import end_workers, measure_loading
from nnunetv2_ext.bench.memory import is_out_of_memory, resident_peak
from nnunetv2_ext.bench.subject import Subject, Target, dry_environment


def resident_size(candidate: Candidate, target: Target, steps: int, kind: str) -> dict[str, int]:
    """Resident size of a fresh process in bytes: ``before`` training, and at its ``peak`` during ``steps`` steps.

    MemoryError: memory ran out; ValueError: the trainer could not be built, or its steps raised. One line each.
    """
    return _in_process({"candidate": asdict(candidate), "target": asdict(target), "steps": steps, "kind": kind})


def loading(candidate: Candidate, target: Target, steps: int, workers: int) -> dict[str, float]:
    """What `measure_loading` finds in a fresh process with so many loader workers; errors as of `resident_size`."""
    return _in_process({"candidate": asdict(candidate), "target": asdict(target), "steps": steps, "workers": workers})


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "nnunetv2_ext.bench.isolated"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise MemoryError("the system killed the process; memory ran out")
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"its process ended with status {done.returncode}: {last}") from None
    if "failure" in answer:
        raise (MemoryError if answer["out_of_memory"] else ValueError)(answer["failure"])
    return answer


def run(candidate: Candidate, target: Target, steps: int, kind: str | None = None, workers: int = 0) -> dict[str, Any]:
    """The other side: the answer, or a ``failure`` and whether it ran ``out_of_memory``.

    With a batch ``kind`` that of `resident_size`, else that of `loading`.
    """
    if target.threads is not None:
        torch.set_num_threads(target.threads)
    with dry_environment(workers):
        try:
            subject = Subject(candidate, target, () if kind is None else (kind,))
            if kind is None:
                found = measure_loading(subject.trainer, steps)
                end_workers(subject.trainer)
                return found
            before = psutil.Process().memory_info().rss
            return {"before": before, "peak": resident_peak(lambda: subject.step(kind), steps)}
        except Exception as error:
            return {"failure": one_line(error), "out_of_memory": is_out_of_memory(error)}


def one_line(error: BaseException) -> str:
    """Text of an error without line breaks, with its type unless it is of those that explain themselves."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (ValueError, MemoryError)) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    print(json.dumps(run(Candidate(**job.pop("candidate")), Target(**job.pop("target")), **job)))
