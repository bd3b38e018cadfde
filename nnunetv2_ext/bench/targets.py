"""The step, prediction and memory ratios that each method promises.

The report prints them and the regression guard (tests/bench/test_promises.py) checks them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """Highest ratio to plain nnUNetTrainer on the same plan and batch.

    Attributes:
        cpu: step time on the CPU.
        cuda: step time on one GPU.
        memory: peak memory.
        predict: the network on one patch.
    """

    cpu: float | None
    cuda: float | None
    memory: float | None = None
    predict: float | None = None


# By the label of a candidate. Forward F, backward 2F: a plain step is 3F, MedContext's 2 x 3F + F of the teacher = 7F,
# 2.33 times as much; a masked share p of the batch costs 1 + 4p/3.
# J-RAS adds guides at the bottleneck, about 1 % of the FLOPs.
# RADA trains three networks and predicts with their mean, one after the other.
_RADA = Promise(cpu=3.6, cuda=3.6, memory=1.6, predict=3.1)
PROMISES: dict[str, Promise] = {
    "nnUNetTrainerMedContext": Promise(cpu=2.4, cuda=2.0, memory=1.15, predict=1.0),
    "nnUNetTrainerMedContext masked_fraction=0.5": Promise(cpu=1.75, cuda=1.75, memory=1.15, predict=1.0),
    "nnUNetTrainerJRAS": Promise(cpu=1.15, cuda=1.15, memory=1.2, predict=1.15),
    "nnUNetTrainerRADA": _RADA,
    "nnUNetTrainerRADA semantics=learned": _RADA,
    "nnUNetTrainerRADA semantics=off": _RADA,
    "nnUNetTrainerRADA semantics=learned infer=single:1": Promise(cpu=3.6, cuda=3.6, memory=1.6, predict=1.0),
}


def promised_ratio(label: str, what: str) -> float | None:
    """The promised ratio of a candidate, ``memory`` or ``predict``; None if there is none."""
    promise = PROMISES.get(label)
    return getattr(promise, what, None)


def promised_step_ratio(label: str, device: str) -> float | None:
    """The promised step ratio of a candidate, None if there is none."""
    promise = PROMISES.get(label)
    return getattr(promise, device, None)
