"""The one table of trainers: every installed one, and those of ``tests/toy_method/``.

A row is what ``outside.py`` of the trainer's method says (`nnunetv2_ext.core.outside.Trainer`); nothing is listed here.
A trainer that belongs to no method is plain nnU-Net until something is set. Trainers of ``tests/toy_method/`` are files
``nnUNetTrainerNAME.py`` there; their ``outside.py`` lies beside them or in a package below. They are imported as
``toy_method.nnUNetTrainerNAME``, in this process and in those that the tests start.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.core.outside import Method, Trainer, methods

TOY = Path(__file__).parents[1] / "toy_method"
# answers for the toy's trainers as nnunetv2_ext/shim does for ours
_SHIM = """from importlib import import_module


def __getattr__(name):
    if name not in {names!r}:
        raise AttributeError(name)
    return getattr(import_module("toy_method." + name), name)
"""


@dataclass(frozen=True)
class Row:
    """One trainer.

    Attributes:
        name: of the class.
        module: that defines it.
        facts: from ``outside.py``.
        method: that it belongs to; None for a trainer of core's.
    """

    name: str
    module: str
    facts: Trainer
    method: Method | None

    @property
    def cls(self) -> type[Any]:
        """The class."""
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def configuration(self) -> str:
        """The cheapest one that it trains in."""
        return "3d_fullres" if "2d" in self.facts.refuses else "2d"

    def settings(self, text: str = "", **options: Any) -> str:
        """Its smallest settings as text for ``nnUNet_ext_settings``, with more of them."""
        return " ".join(part for part in (written(self.facts.smallest | options), text) if part)


def written(settings: Mapping[str, Any]) -> str:
    """Dotted keys and values as ``nnUNet_ext_settings`` takes them."""
    values = {k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for k, v in settings.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _toy_site() -> Path | None:
    """A folder from which ``toy_method`` can be imported, and nothing else of the tests; None without a toy method."""
    names = sorted(file.stem for file in TOY.glob("nnUNetTrainer*.py"))
    if not names:
        return None
    site = Path(tempfile.mkdtemp(prefix="nnunetv2_ext_toy."))
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    (site / "toy_method").symlink_to(TOY, target_is_directory=True)
    (site / "shim").mkdir()
    (site / "shim" / "toy_method_shim.py").write_text(_SHIM.format(names=names))
    sys.path.append(str(site))
    return site


def _rows() -> Iterator[Row]:
    trainers, known = installed_trainers(), list(methods().values())
    if SITE is not None:
        for file in sorted(TOY.rglob("outside.py")):
            parts = file.relative_to(TOY).with_suffix("").parts
            known.append(importlib.import_module(".".join(("toy_method", *parts))).METHOD)
        trainers |= {file.stem: f"toy_method.{file.stem}" for file in sorted(TOY.glob("nnUNetTrainer*.py"))}
    for name, module in trainers.items():
        method = next((method for method in known if name in method.trainers), None)
        yield Row(name, module, Trainer("", off={}) if method is None else method.trainers[name], method)


def environment() -> dict[str, str]:
    """By which a process finds the toy's trainers too."""
    if SITE is None:
        return {}
    shims = [part for part in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if part]
    paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    found = {"nnUNet_extTrainer": [*shims, str(SITE / "shim")], "PYTHONPATH": [*paths, str(SITE)]}
    return {name: os.pathsep.join(dict.fromkeys(parts)) for name, parts in found.items()}


SITE = _toy_site()
ROWS = {row.name: row for row in _rows()}


def over(condition: Callable[[Row], bool] = lambda row: True) -> pytest.MarkDecorator:
    """Once for each row that meets the condition, under the trainer's name."""
    rows = [row for row in ROWS.values() if condition(row)]
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])
