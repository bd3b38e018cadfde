"""What a method can take out of a model before it is handed on: an option of ``nnUNetv2_ext export``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Checkpoint = dict[str, Any]


@dataclass(frozen=True)
class ExportEdit:
    """One such option; a trainer lists its own by name in ``export_edits``, and ``export --NAME`` applies it.

    Attributes:
        description: one sentence for the command's help.
        apply: returns the checkpoint without it and leaves its argument alone; raises ValueError if there is nothing to
            take out.
        keeps_trainer: the result is still a model of its trainer, which needs this package; else a stock one.
        same_predictions: it predicts as before, so its validation result goes along.
        notice: what whoever gets the model has to know, printed at the end.
    """

    description: str
    apply: Callable[[Checkpoint], Checkpoint]
    keeps_trainer: bool = False
    same_predictions: bool = False
    notice: str = ""
