"""What a method shows to the outside of its package: its trainers, commands, cost and needs.

The package of a method holds ``outside.py`` with one `Method` named ``METHOD``. Commands, bench, export, doctor, the
packaging and the contract suite read it there, so none of them names a method. Everything in it is data: whatever needs
torch or nnU-Net is named as ``"module:attribute"`` and imported when it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import nnunetv2_ext

# What a trainer may refuse, and the contract suite (tests/contract) then expects a refusal of
Property = Literal["2d", "3d", "resenc", "regions", "ignore", "cascade", "ddp", "pretrained_weights"]


@dataclass(frozen=True)
class Promise:
    """Highest ratio to plain nnUNetTrainer on the same plan and batch; None promises nothing.

    Attributes:
        cpu: step time on the CPU.
        cuda: step time on one GPU.
        memory: peak memory.
        predict: the network on one patch.
    """

    cpu: float | None = None
    cuda: float | None = None
    memory: float | None = None
    predict: float | None = None

    def step(self, device: str) -> float | None:
        """Of the step on a type of device; None elsewhere than on ``cpu`` and ``cuda``."""
        return {"cpu": self.cpu, "cuda": self.cuda}.get(device)


@dataclass(frozen=True)
class Trainer:
    """What is to be known of one trainer without importing it.

    Attributes:
        summary: one sentence for a table.
        smallest: settings (dotted key to value) with which one step is as cheap as the method allows; its own
            mechanism stays on.
        off: settings with which the trainer is plain nnU-Net bit for bit; None if there are none.
        data: ``dense`` labels, or ``sparse``: an ignore label on all but a few planes.
        refuses: what it cannot do, and a regular expression that its one-line refusal matches.
        promises: by the settings of a candidate of ``nnUNetv2_ext bench``, as one types them (dotted keys), ``""`` for
            the defaults.
    """

    summary: str
    smallest: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] | None = None
    data: Literal["dense", "sparse"] = "dense"
    refuses: Mapping[Property, str] = field(default_factory=dict)
    promises: Mapping[str, Promise] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A subcommand of ``nnUNetv2_ext``.

    Attributes:
        module: has ``add_arguments(parser) -> None`` and ``run(args) -> int``, the exit status; an ``EPILOG`` stands
            below its help.
        summary: one line for the overview.
        formerly: an old name, which still works and says so.
    """

    module: str
    summary: str
    formerly: str | None = None


@dataclass(frozen=True)
class ExportEdit:
    """What can be taken out of a model before it is handed on: ``nnUNetv2_ext export --NAME``.

    Attributes:
        description: one sentence for the command's help.
        apply: ``"module:function"``; takes a checkpoint and returns it without, its argument left alone. Raises
            ValueError if there is nothing to take out.
        keeps_trainer: the result is still a model of its trainer, which needs this package; else a stock one.
        same_predictions: it predicts as before, so its validation result goes along.
        notice: what whoever gets the model has to know, printed at the end.
    """

    description: str
    apply: str
    keeps_trainer: bool = False
    same_predictions: bool = False
    notice: str = ""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: of its package and of its block of settings.
        summary: one sentence.
        trainers: by class name.
        commands: by name.
        weights: what ``export --weights`` takes besides ``student``, with one phrase each.
        export_edits: by the option's name, without dashes.
        requires: distributions that ``pip install nnunetv2-ext`` brings for it, with what pip understands behind the
            name (``>=3``, ``; sys_platform == 'linux'``).
        extras: by the name of the extra, distributions that it brings.
        card: its page below ``docs/``.
    """

    name: str
    summary: str
    trainers: Mapping[str, Trainer] = field(default_factory=dict)
    commands: Mapping[str, Command] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    export_edits: Mapping[str, ExportEdit] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    card: str = ""


def methods() -> dict[str, Method]:
    """Every installed method by name, in the order of the names."""
    return {method.name: method for method in _found()}


def method_of(module: str) -> Method | None:
    """The method that a module belongs to, by ``outside.py`` beside it or in a package above it; None in core."""
    parts = module.split(".")[:-1]
    while parts:
        name = ".".join([*parts, "outside"])
        try:
            found = getattr(importlib.import_module(name), "METHOD", None)  # core has a file of this name too: this one
        except ModuleNotFoundError as error:
            if error.name not in (name, *(".".join(parts[:n]) for n in range(1, len(parts) + 1))):
                raise
        else:
            return found
        parts.pop()
    return None


def methods_of(cls: type) -> list[Method]:
    """The methods that a trainer is made of, by the modules of its base classes, the nearest first; [] for core's."""
    found = {method.name: method for base in cls.__mro__ if (method := method_of(base.__module__)) is not None}
    return list(found.values())


def trainer_of(cls: type) -> Trainer | None:
    """What a method says of a trainer's class; None if none names it."""
    return next((m.trainers[cls.__name__] for m in methods_of(cls) if cls.__name__ in m.trainers), None)


def load(reference: str) -> Any:
    """What ``"module:attribute"`` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_trainer(name: str) -> Any:
    """The class of one of `installed_trainers`. Raises ImportError if something that its module needs is missing."""
    return load(f"{nnunetv2_ext.installed_trainers()[name]}:{name}")


def _found() -> Iterator[Method]:
    root = Path(nnunetv2_ext.__file__).parent
    for file in sorted(root.glob("*/outside.py")):
        if file.parent.name != "core":
            yield importlib.import_module(f"nnunetv2_ext.{file.parent.name}.outside").METHOD
