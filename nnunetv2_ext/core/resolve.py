"""From the sources of settings to validated ones, and what a continued training may change.

Sources, later wins: the field's default < the trainer's own default < ``plans["nnunetv2_ext"]`` < the environment
variable ``nnUNet_ext_settings``. A method's preset stands for keys of the source that names it, beneath those that the
same source gives itself.
"""

import difflib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from nnunetv2_ext.core.settings import (
    PLANS_KEY,
    CommonSettings,
    fields_by_key,
    flatten,
    flatten_layer,
    is_marked,
    renamed_keys,
)
from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE, from_environment


@dataclass(frozen=True)
class Resolved:
    """Validated settings and, by dotted key, the source of every value that is not a default."""

    settings: CommonSettings
    sources: dict[str, str]

    def explicit(self) -> dict[str, Any]:
        """Dotted keys a user set (presets and trainer defaults are not a user's), with their validated values."""
        values = flatten(self.settings)
        return {key: values[key] for key, source in self.sources.items() if source in ("plans", ENVIRONMENT_VARIABLE)}


def resolve(
    model: type[CommonSettings],
    *,
    trainer_defaults: Mapping[str, Any] | None = None,
    plans: Mapping[str, Any] | None = None,
    environment: str | None = None,
) -> Resolved:
    """Merge all sources into validated settings.

    Args:
        model: from ``settings_model``.
        trainer_defaults: dotted keys a trainer class sets differently from the field's default.
        plans: the plans' block (``plans["nnunetv2_ext"]``), dotted or nested.
        environment: the environment variable's text; None reads ``nnUNet_ext_settings``.

    Raises:
        ValueError: unknown key (with the nearest valid ones), wrong type, value out of range, unreadable source.
    """
    if environment is None:
        environment = os.environ.get(ENVIRONMENT_VARIABLE)
    layers = [
        ("trainer", _flatten_unique(trainer_defaults or {}, model, "trainer")),
        ("plans", _flatten_unique(plans or {}, model, f"plans[{PLANS_KEY!r}]")),
        (ENVIRONMENT_VARIABLE, _flatten_unique(from_environment(environment), model, ENVIRONMENT_VARIABLE)),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for (source, layer), preset in zip(layers, _presets(model, layers)):
        for origin, given in (("preset", preset), (source, layer)):
            values.update(given)
            sources.update(dict.fromkeys(given, origin))
    return Resolved(_validate(model, values, sources), sources)


def resume(model: type[CommonSettings], saved: Mapping[str, Any], now: Resolved, strict: bool) -> Resolved:
    """Settings of a continued training: what the checkpoint says, plus those keys that may change.

    Args:
        model: the trainer's settings model.
        saved: dotted key to value, from the checkpoint.
        now: what the sources say today.
        strict: True for ``--c``. False (``--val``, predicting) adopts the checkpoint's settings without comparing.

    Raises:
        ValueError: a source says something else than the checkpoint for a key that must not change; both values are
            shown.
    """
    fields = fields_by_key(model)
    renamed = renamed_keys(model)
    saved = {renamed.get(key, key): value for key, value in saved.items() if renamed.get(key) not in saved}
    values = {key: value for key, value in saved.items() if key in fields}
    if len(values) < len(saved):
        gone = ", ".join(key for key in saved if key not in fields)
        warnings.warn(f"this version of nnunetv2-ext does not know the checkpoint's {gone}: passed over", stacklevel=2)
    sources = dict.fromkeys(values, "checkpoint")
    before = flatten(_validate(model, values, sources))  # with the defaults of keys an older version did not have
    for key, value in now.explicit().items() if strict else ():
        if is_marked(fields[key], "resumable"):
            values[key], sources[key] = value, now.sources[key]
        elif before[key] != value:
            raise ValueError(
                f"this training was started with {key}={before[key]}, but {now.sources[key]} now says {key}={value}: "
                "continue with the old value (unset the new one), or start a new training without --c"
            )
    return Resolved(_validate(model, values, sources), sources)


def _flatten_unique(layer: Any, model: type[BaseModel], source: str) -> dict[str, Any]:
    if not isinstance(layer, Mapping):
        raise ValueError(f"{source} must hold settings as key: value, not a {type(layer).__name__}")
    flat = flatten_layer(layer, model)
    nested = [f"{block}.{key}" for block, inner in layer.items() if isinstance(inner, Mapping) for key in inner]
    twice = [key for key in nested if key in layer]
    if twice:
        raise ValueError(f"{source} sets {twice[0]!r} twice, nested and dotted; keep one of the two")
    for old, new in renamed_keys(model).items():
        if old in flat and new in flat:
            raise ValueError(f"{source} sets {old!r} and {new!r}, which is its name today; keep {new!r}")
    return {renamed_keys(model).get(key, key): value for key, value in flat.items()}


def _presets(model: type[BaseModel], layers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """For each layer what its presets stand for, by dotted key; of several presets of a method the last one counts."""
    chosen: list[dict[str, Any]] = [{} for _ in layers]
    for name, field in model.model_fields.items():
        presets = getattr(field.annotation, "PRESETS", None)
        naming = [number for number, (_, layer) in enumerate(layers) if f"{name}.preset" in layer]
        if presets is None or not naming:
            continue
        source, layer = layers[naming[-1]]
        preset = layer[f"{name}.preset"]
        if preset is None:
            continue
        if not isinstance(preset, str) or preset not in presets:
            raise ValueError(f"{name}.preset={preset!r} (from {source}) does not exist; there is {', '.join(presets)}")
        chosen[naming[-1]].update({f"{name}.{key}": value for key, value in presets[preset].items()})
    return chosen


def _validate(model: type[CommonSettings], values: Mapping[str, Any], sources: Mapping[str, str]) -> CommonSettings:
    fields = fields_by_key(model)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if any(known.startswith(f"{key}.") for known in fields):
            raise ValueError(
                f"{key}={value!r} (from {sources[key]}): {key} is a method with settings of its own; write them as "
                f"{key}.NAME=VALUE"
            )
        if key not in fields:
            near = _nearest(key, list(fields))
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"unknown setting {key!r} (from {sources[key]}): {hint}"
                f"`nnUNetv2_ext settings {model.__name__}` lists all of them"
            )
        block, _, inner = key.rpartition(".")
        (nested.setdefault(block, {}) if block else nested)[inner] = value
    try:
        return model.model_validate(nested)
    except ValidationError as error:
        raise ValueError(_one_line(error, fields, sources)) from None


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """What ``key`` may have meant: the one known key it is a slip of, else up to three, nearest first."""
    distance = {k: min(_edits(key, k), _edits(key.rpartition(".")[2], k.rpartition(".")[2])) for k in known}
    ranked = sorted(known, key=distance.__getitem__)
    # one or two letters off, or in another block, and the next one at least two letters further away
    if distance[ranked[0]] <= 2 and (len(ranked) == 1 or distance[ranked[1]] >= distance[ranked[0]] + 2):
        return ranked[:1]
    near = [k for k in ranked if distance[k] <= 2]
    near += [k for k in difflib.get_close_matches(key, known, n=3, cutoff=0.5) if k not in near]
    return near[:3]


def _edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of letters that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def _one_line(error: ValidationError, fields: Mapping[str, FieldInfo], sources: Mapping[str, str]) -> str:
    messages: dict[str, str] = {}
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = next(
            (k for k in (".".join(location[:2]), location[0] if location else "") if k in fields), ".".join(location)
        )
        what = problem["msg"].removeprefix("Value error, ")
        # of a union (int or list), pydantic reports every member; one sentence per key is what a reader needs
        messages[key] = (
            f"{messages[key]} / {what}"
            if key in messages
            else f"{key}={problem['input']!r} (from {_source(key, sources)}): {what}"
        )
    meanings = [f"; {key} is: {fields[key].description}" for key in messages if key in fields]
    return "invalid setting " + "; ".join(messages.values()) + "".join(meanings)


def _source(key: str, sources: Mapping[str, str]) -> str:
    """Where a key comes from; for a block that contradicts itself, where its keys come from."""
    inside = dict.fromkeys(source for name, source in sources.items() if name.startswith(f"{key}."))
    return sources.get(key) or " and ".join(inside) or "default"
