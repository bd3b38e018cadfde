"""``nnUNetv2_ext settings [TRAINER]``: every key of a trainer's settings with its type, default and meaning."""

import argparse
import difflib
import json
import textwrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.core.outside import load_trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "trainer class, e.g. nnUNetTrainerExt; default: the keys of all trainers only"
    parser.add_argument("trainer", nargs="?", help=what)
    parser.add_argument("--json", action="store_true", help="print the keys as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the keys; raises ValueError for an unknown trainer."""
    from nnunetv2_ext.parts.settings import HouseSettings

    known = sorted(installed_trainers())
    if args.trainer is None:
        title, keys, presets = f"Common to all trainers ({', '.join(known)}):", described(HouseSettings, {}), {}
    elif args.trainer in known:
        trainer = load_trainer(args.trainer)
        model = trainer.settings_model()
        title, keys, presets = f"{args.trainer}:", described(model, trainer.trainer_defaults()), presets_of(model)
    elif args.trainer == "nnUNetTrainer":
        raise ValueError("nnUNetTrainer reads no settings; nnUNetTrainerExt is the same training with settings")
    else:
        near = difflib.get_close_matches(args.trainer, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no trainer {args.trainer!r}; {hint}there is {', '.join(known)}")
    if args.json:
        print(json.dumps({"trainer": args.trainer, "settings": keys, "presets": presets}, indent=2, default=str))
    else:
        print(as_text(title, keys, presets))
    return 0


def described(model: Any, defaults: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By key: default (the trainer's own of ``defaults`` first), type, meaning, and what the key is marked as."""
    from nnunetv2_ext.core.settings import fields_by_key, is_marked

    return {
        key: {
            "default": defaults.get(key, field.get_default(call_default_factory=True)),
            "type": type_name(field),
            "description": field.description or "",
            "resumable": is_marked(field, "resumable"),
            "structural": is_marked(field, "structural"),
        }
        for key, field in fields_by_key(model).items()
    }


def presets_of(model: Any) -> dict[str, dict[str, Any]]:
    """What ``METHOD.preset=NAME`` stands for, by itself: dotted keys and values."""
    return {
        f"{method}.preset={name}": {f"{method}.{key}": value for key, value in values.items()}
        for method, field in model.model_fields.items()
        for name, values in getattr(field.annotation, "PRESETS", {}).items()
    }


def as_text(title: str, keys: dict[str, dict[str, Any]], presets: dict[str, dict[str, Any]]) -> str:
    """The keys for a reader, as one would type them."""
    lines = [textwrap.fill(title, 100)]
    for key, what in keys.items():
        lines.append(f"\n{key} = {'none' if what['default'] is None else what['default']}    [{what['type']}]")
        meaning = what["description"] + ("" if what["description"].endswith(".") else ".")
        meaning += " May be changed on --c." if what["resumable"] else ""
        meaning += " Part of the network: equal in all folds." if what["structural"] else ""
        lines.append(textwrap.fill(meaning, 100, initial_indent="    ", subsequent_indent="    "))
    for preset, values in presets.items():
        # no blanks within a list
        typed = " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in values.items())
        lines.append(f"\n{preset} stands for: {typed}")
    lines.append(
        '\nGive them as nnUNet_ext_settings="key=value key=value" or nnUNet_ext_settings=FILE.yaml.\n'
        "They win over the block nnunetv2_ext of the plans."
    )
    return "\n".join(lines)


def type_name(field: Any) -> str:
    """A short name of a pydantic field's type with its bounds, e.g. ``float, >= 0, <= 1``."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs.items() if hasattr(m, name)]
    return ", ".join([" | ".join(dict.fromkeys(_type_names(field.annotation))), *bounds])


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
