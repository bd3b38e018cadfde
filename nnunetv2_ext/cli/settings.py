"""``nnUNetv2_ext settings [TRAINER]``: every key of a trainer's settings with its type, default and meaning."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.cli._trainers import load_trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "trainer", nargs="?", help="trainer class, e.g. nnUNetTrainerMedContext; default: the common keys only"
    )


def run(args: argparse.Namespace) -> int:
    """Print the keys; raises ValueError for an unknown trainer."""
    from nnunetv2_ext.core.settings import CommonSettings, fields_by_key, is_marked
    from nnunetv2_ext.parts.settings import HouseSettings

    known = sorted(installed_trainers())
    if args.trainer is None:
        model: type[CommonSettings] = HouseSettings
        presets: dict[str, dict[str, dict[str, Any]]] = {}
        defaults: dict[str, Any] = {}
        print(textwrap.fill(f"Common to all trainers ({', '.join(known)}):", width=100))
    elif args.trainer in known:
        trainer = load_trainer(args.trainer)
        model = trainer.settings_model()
        defaults = trainer.default_settings
        presets = {name: getattr(f.annotation, "PRESETS", {}) for name, f in model.model_fields.items()}
        print(f"{args.trainer}:")
    else:
        near = difflib.get_close_matches(args.trainer, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no trainer {args.trainer!r}; {hint}there is {', '.join(known)}")
    for key, field in fields_by_key(model).items():
        default = defaults.get(key, field.get_default(call_default_factory=True))
        remark = " May be changed on --c." if is_marked(field, "resumable") else ""
        remark += " Part of the network: equal in all folds." if is_marked(field, "structural") else ""
        print(f"\n{key} = {'none' if default is None else default}    [{type_name(field)}]")
        print(
            textwrap.fill(
                f"{field.description}{'' if (field.description or '').endswith('.') else '.'}{remark}",
                100,
                initial_indent="    ",
                subsequent_indent="    ",
            )
        )
    for method, named in presets.items():
        for name, values in named.items():
            # as one would type them: no blanks within a list
            typed = " ".join(f"{method}.{key}={str(value).replace(' ', '')}" for key, value in values.items())
            print(f"\n{method}.preset={name} stands for: {typed}")
    print(
        '\nGive them as nnUNet_ext_settings="key=value key=value" or nnUNet_ext_settings=FILE.yaml.\n'
        "They win over the block nnunetv2_ext of the plans."
    )
    return 0


def type_name(field: Any) -> str:
    """A short name of a pydantic field's type with its bounds, e.g. ``float, >= 0, <= 1``."""
    text = " | ".join(dict.fromkeys(_type_names(field.annotation)))
    bounds = [
        f"{sign} {getattr(m, name)}"
        for m in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(m, name)
    ]
    return ", ".join([text, *bounds])


def _type_names(annotation: Any) -> list[str]:
    """The alternatives of a type in words: ``Optional[Literal['a', 'b']]`` is a, b, none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:  # bounds of list elements say less than they cost to read
        return _type_names(arguments[0])
    if origin is Literal:
        return [str(value) for value in arguments]
    if origin in (Union, UnionType):
        return [name for argument in arguments for name in _type_names(argument)]
    if origin is list:
        return [f"list of {' | '.join(_type_names(arguments[0]))}"]
    return ["none" if annotation is NoneType else annotation.__name__]
