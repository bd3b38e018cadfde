"""Steps in a process of their own.

Its largest resident size is that one trainer's, and if the system kills it for memory the others go on. Run as
``python -m nnunetv2_ext.bench.isolated``; reads the job as JSON from stdin, writes JSON as the last line of stdout.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from nnunetv2_ext.bench.candidates import Candidate
from nnunetv2_ext.bench.plan import Target


class StepError(Exception):
    """The steps did not finish; the text says why, in one line.

    Attributes:
        out_of_memory: whether memory ran out.
    """

    def __init__(self, reason: str, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


def resident_size(candidate: Candidate, target: Target, steps: int, kind: str) -> dict[str, int]:
    """Resident size of a fresh process in bytes: ``before`` training, and at its ``peak`` during ``steps`` steps.

    Raises:
        StepError: the process was killed for memory, or the trainer could not be built, or its steps raised.
    """
    job = json.dumps({"candidate": asdict(candidate), "target": asdict(target), "steps": steps, "kind": kind})
    done = subprocess.run(
        [sys.executable, "-m", "nnunetv2_ext.bench.isolated"], input=job, capture_output=True, text=True, check=False
    )
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise StepError("the system killed the process; memory ran out", out_of_memory=True)
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StepError(f"its process ended with status {done.returncode}: {last}") from None
    if "failure" in answer:
        raise StepError(answer["failure"], answer["out_of_memory"])
    return answer


def main() -> None:
    """The other side of ``resident_size``."""
    job = json.loads(sys.stdin.read())
    print(json.dumps(_run(Candidate(**job["candidate"]), Target(**job["target"]), job["steps"], job["kind"])))


def _run(candidate: Candidate, target: Target, steps: int, kind: str) -> dict[str, Any]:
    import psutil
    import torch

    from nnunetv2_ext.bench import memory
    from nnunetv2_ext.bench.subject import Subject, dry_environment

    if target.threads is not None:
        torch.set_num_threads(target.threads)
    with dry_environment():
        try:
            subject = Subject(candidate, target, (kind,))
            before = psutil.Process().memory_info().rss
            return {"before": before, "peak": memory.resident_peak(lambda: subject.step(kind), steps)}
        except Exception as error:
            return {"failure": one_line(error), "out_of_memory": memory.is_out_of_memory(error)}


def one_line(error: BaseException) -> str:
    """Type and text of an error without line breaks."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
