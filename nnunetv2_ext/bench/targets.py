"""The step and memory ratios that each method promises; the report prints them and the regression guard checks them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """Highest ratio to plain nnUNetTrainer on the same plan and batch.

    Attributes:
        cpu: step time on the CPU.
        cuda: step time on one GPU.
        memory: peak memory.
    """

    cpu: float | None
    cuda: float | None
    memory: float | None = None


# By the label of a candidate. Forward F, backward 2F: a plain step is 3F, MedContext's 2 x 3F + F of the teacher = 7F,
# 2.33 times as much; a masked share p of the batch costs 1 + 4p/3.
PROMISES: dict[str, Promise] = {
    "nnUNetTrainerMedContext": Promise(cpu=2.4, cuda=2.0, memory=1.15),
    "nnUNetTrainerMedContext masked_fraction=0.5": Promise(cpu=1.75, cuda=1.75, memory=1.15),
}


def promised_step_ratio(label: str, device: str) -> float | None:
    """The promised step ratio of a candidate, None if there is none."""
    promise = PROMISES.get(label)
    return getattr(promise, device, None)
