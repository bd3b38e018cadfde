"""Trainings to compare bit for bit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_ext.core.checkpoint import read

CLOCK = ("_timestamps", "_seconds", "_ms")


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit; wall-clock entries left out."""
    if type(a) is not type(b):
        return [f"{at}: {type(a)} against {type(b)}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{at}: keys {a.keys() ^ b.keys()}"]
        return [d for k in a if not str(k).endswith(CLOCK) for d in differences(a[k], b[k], f"{at}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{at}: {len(a)} against {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{at}/{i}")]
    if isinstance(a, (float, np.floating)) and np.isnan(a):  # the pseudo Dice of a class that is nowhere
        return [] if np.isnan(b) else [at]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b)
    return [] if equal else [at]


def epochs(path: Path) -> list[dict[str, str]]:
    """The rows of epochs.csv, without durations."""
    with path.open(newline="") as lines:
        return [{k: v for k, v in r.items() if not k.endswith(CLOCK)} for r in csv.DictReader(lines)]


def finished(trainer: Any) -> dict[str, Any]:
    """Everything of a finished training that an interruption could have changed."""
    folder = Path(trainer.output_folder)
    checkpoint = read(folder / "checkpoint_final.pth")
    for log in folder.glob("training_log*.txt"):  # core goes on without a figure or picture that fails
        failed = [line for line in log.read_text().splitlines() if "could not be taken" in line or "be drawn" in line]
        assert not failed, failed
    store = getattr(trainer, "case_store", None)
    cases = {} if store is None else {case: store.read(case) for case in store.cases()}
    kept = {k: v for k, v in checkpoint.items() if k != "init_args"}
    return kept | {"epochs.csv": epochs(folder / "epochs.csv"), "cases": cases}
