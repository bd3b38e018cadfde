"""Our trainer classes by name, for commands that ask them something."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nnunetv2_ext import installed_trainers

if TYPE_CHECKING:
    from nnunetv2_ext.core.trainer import ExtTrainer


def load_trainer(name: str) -> type[ExtTrainer]:
    """The class; a key of ``installed_trainers()``. Raises ImportError if an optional dependency of it is missing."""
    return getattr(importlib.import_module(installed_trainers()[name]), name)
