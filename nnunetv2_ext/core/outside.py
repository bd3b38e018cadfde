"""What a method shows to the outside of its package: its trainers, commands, cost and needs.

The package of a method holds ``outside.py`` with one `Method` named ``METHOD``. Commands, bench, export, doctor, the
packaging and the contract suite read it there, so none of them names a method. Everything in it is data: whatever needs
torch or nnU-Net is named as ``"module:attribute"`` and imported when it is used.
"""

import importlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nnunetv2_ext

# What a command is for, in the order of the overview
STORIES = ("prepare data", "train", "judge", "hand on and look inside")

# What a trainer may refuse, and the contract suite (tests/contract) then expects a refusal of
Property = Literal["2d", "3d", "resenc", "regions", "ignore", "cascade", "ddp", "export"]


@dataclass(frozen=True)
class Promise:
    """Highest ratio to plain nnUNetTrainer on the same plan and batch; None promises nothing."""

    cpu: float | None = None  # step time on the CPU
    cuda: float | None = None  # step time on one GPU
    memory: float | None = None  # peak memory
    predict: float | None = None  # the network on one patch
    missing: float | None = None  # the same where the channels that the trainer adds to a finished model are zero

    def step(self, device: str) -> float | None:
        """Of the step on a type of device; None elsewhere than on ``cpu`` and ``cuda``."""
        return {"cpu": self.cpu, "cuda": self.cuda}.get(device)


@dataclass(frozen=True)
class Trainer:
    """What is to be known of one trainer without importing it; settings are dotted keys with their values.

    With the ``smallest`` settings one step is as cheap as the method allows, and its own mechanism stays on. Promises
    are by the settings of a candidate of ``nnUNetv2_ext bench``, as one types them, ``""`` for the defaults.
    """

    summary: str  # one sentence for a table
    smallest: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] | None = None  # the trainer is then plain nnU-Net bit for bit; None: never
    # sparse: an ignore label on all but a few planes; added_channel: two channels, and a finished model of the first,
    # for whose folder {model} stands in `smallest`
    data: Literal["dense", "sparse", "added_channel"] = "dense"
    refuses: Mapping[Property, str] = field(
        default_factory=dict
    )  # regular expression that the one-line refusal matches
    promises: Mapping[str, Promise] = field(default_factory=dict)


@dataclass(frozen=True)
class Command:
    """A subcommand of ``nnUNetv2_ext``.

    Its module has ``add_arguments(parser) -> None`` and ``run(args) -> int``, the exit status; an ``EPILOG`` stands
    below its help. Its `story` is one of `STORIES`.
    """

    module: str
    summary: str  # one line for the overview
    story: str
    formerly: str | None = None  # an old name, which still works and says so


@dataclass(frozen=True)
class ExportEdit:
    """What can be taken out of a model before it is handed on: ``nnUNetv2_ext export --NAME``.

    What `apply` names takes a checkpoint and returns it without, its argument left alone. It raises ValueError if there
    is nothing to take out.
    """

    description: str  # one sentence for the command's help
    apply: str  # "module:function"
    keeps_trainer: bool = False  # the result is still a model of its trainer, which needs this package; else stock
    same_predictions: bool = False  # it predicts as before, so its validation result goes along
    notice: str = ""  # what whoever gets the model has to know, printed at the end


OK, WARN, FAIL = "OK", "WARN", "FAIL"


class Finding(NamedTuple):
    """One line of what ``nnUNetv2_ext doctor`` found.

    ``status`` is OK, WARN (works, not as well as it could) or FAIL (a command will fail).
    ``remedy`` is what to type or change; empty if nothing is wrong.
    """

    status: str
    subject: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Advice:
    """What ``nnUNetv2_ext advise`` says of one dataset.

    A reason is a rule that can be read up or a figure that was measured, with its data; never a gain that was not
    measured. Text is of one line each.
    """

    kind: Literal["fix", "run", "skip"]  # before any training; worth running; not worth running
    run: str  # what to do, use or leave
    reason: str
    commands: tuple[str, ...] = ()  # for a shell, as one types them
    control: str = ""  # what to run beside it, which could explain a gain away
    not_when: str = ""  # where the advice does not hold


@dataclass(frozen=True)
class Network:
    """A network that ``nnUNetv2_ext plan-network`` writes into plans.

    What `architecture` names is called with nnU-Net's configuration (a dictionary), what stood behind the network's
    name (``NAME:REST``, else an empty string) and the options as typed. It returns the configuration's
    ``architecture``, and raises ValueError for a wrong value.
    """

    summary: str  # one sentence for the command's help
    architecture: str  # "module:function"
    options: Mapping[str, str] = field(default_factory=dict)  # name and help of each option, without dashes
    settings: Mapping[str, Any] = field(default_factory=dict)  # written into the plans, which our trainers read


@dataclass(frozen=True)
class Method:
    """One method.

    `requires` are distributions that ``pip install nnunetv2-ext`` brings for it, with what pip understands behind the
    name (``>=3``, ``; sys_platform == 'linux'``).
    """

    name: str  # of its package and of its block of settings
    summary: str  # one sentence
    trainers: Mapping[str, Trainer] = field(default_factory=dict)  # by class name
    commands: Mapping[str, Command] = field(default_factory=dict)  # by name
    weights: Mapping[str, str] = field(default_factory=dict)  # ``export --weights`` besides ``student``, a phrase each
    export_edits: Mapping[str, ExportEdit] = field(default_factory=dict)  # by the option's name, without dashes
    # of weights or edits whose model has other plans or another dataset.json than the trained one: "module:function",
    # which takes both in a dictionary (``plans``, ``dataset_json``) and returns it as they are to be written
    descriptions: Mapping[str, str] = field(default_factory=dict)
    networks: Mapping[str, Network] = field(default_factory=dict)  # by the name that -network takes
    requires: tuple[str, ...] = ()
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # distributions by the name of the extra
    card: str = ""  # its page below docs/
    citation: str = ""  # its paper, as in a list of references; a new training asks to cite it
    # "module:function": takes data.facts.DatasetFacts and returns a list of Advice, empty where it has nothing to say
    advice: str = ""
    # "module:function": returns a list of Finding for doctor, of what the method needs besides `requires`
    doctor: str = ""


def methods() -> dict[str, Method]:
    """Every installed method by name, in the order of the names."""
    names = sorted(file.parent.name for file in Path(nnunetv2_ext.__file__).parent.glob("*/outside.py"))
    modules = (importlib.import_module(f"nnunetv2_ext.{name}.outside") for name in names if name != "core")
    return {module.METHOD.name: module.METHOD for module in modules}


def method_of(module: str) -> Method | None:
    """The method that a module belongs to, by ``outside.py`` beside it or in a package above it; None in core."""
    while module := module.rpartition(".")[0]:
        with suppress(ModuleNotFoundError):  # a part of the name is not a package
            if find_spec(f"{module}.outside"):
                break
    # core has a file of this name too: this one
    return getattr(importlib.import_module(f"{module}.outside"), "METHOD", None) if module else None


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
