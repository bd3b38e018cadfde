"""``nnUNetv2_ext settings [TRAINER]``: every key of a trainer's settings with its type, default and meaning."""

from __future__ import annotations

import argparse
import difflib
import importlib
import textwrap
from typing import Any

from nnunetv2_ext import installed_trainers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "trainer", nargs="?", help="trainer class, e.g. nnUNetTrainerMedContext; default: the common keys only"
    )


def run(args: argparse.Namespace) -> int:
    """Print the keys; raises ValueError for an unknown trainer."""
    from nnunetv2_ext.core.settings import CommonSettings, fields_by_key, is_marked

    known = sorted(installed_trainers())
    if args.trainer is None:
        model: type[CommonSettings] = CommonSettings
        presets: dict[str, dict[str, dict[str, Any]]] = {}
        defaults: dict[str, Any] = {}
        print(f"Common to all trainers ({', '.join(known)}):")
    elif args.trainer in known:
        trainer = getattr(importlib.import_module(f"nnunetv2_ext.trainers.{args.trainer}"), args.trainer)
        model = trainer.settings_model()
        defaults = trainer.default_settings
        presets = {name: getattr(f.annotation, "PRESETS", {}) for name, f in model.model_fields.items()}
        print(f"{args.trainer}:")
    else:
        near = difflib.get_close_matches(args.trainer, known, n=1, cutoff=0.4)
        raise ValueError(
            f"there is no trainer {args.trainer!r}; {'did you mean ' + near[0] + '? ' if near else ''}there is {', '.join(known)}"
        )
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
            print(
                f"\n{method}.preset={name} stands for: "
                + " ".join(f"{method}.{key}={value}" for key, value in values.items())
            )
    print(
        '\nGive them as nnUNet_ext_settings="key=value key=value" or nnUNet_ext_settings=FILE.yaml; keys given later win over the plans\' block.'
    )
    return 0


def type_name(field: Any) -> str:
    """A short name of a pydantic field's type with its bounds, e.g. ``float, >= 0, <= 1``."""
    text = str(field.annotation) if not isinstance(field.annotation, type) else field.annotation.__name__
    text = text.replace("typing.", "").replace("NoneType", "none").replace("None", "none")
    if "Annotated[" in text:  # bounds of list elements say less than they cost to read
        text = "list of int | int | none"
    bounds = [
        f"{sign} {getattr(m, name)}"
        for m in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if hasattr(m, name)
    ]
    return ", ".join([text, *bounds])
