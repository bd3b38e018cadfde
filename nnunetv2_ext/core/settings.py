"""Settings of our trainers: typed, documented, and strict about names.

Sources, later wins: the field's default < the trainer's own default < a method's preset < ``plans["nnunetv2_ext"]`` <
the environment variable ``nnUNet_ext_settings``. nnU-Net's trainers take no further constructor arguments (an extra one
raises KeyError in nnUNetTrainer.__init__), hence the file and the environment.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

ENVIRONMENT_VARIABLE = "nnUNet_ext_settings"
PLANS_KEY = "nnunetv2_ext"

# What a field may say about itself, in ``json_schema_extra``:
RESUMABLE: JsonDict = {
    "resumable": True
}  # may be changed when a training is continued (it sets how long or how often, not what is learnt)
# changes the network or how it predicts; the predictor reads it from one plans.json, so all folds must agree on it
STRUCTURAL: JsonDict = {"structural": True}
LOCAL_PATH: JsonDict = {"local_path": True}  # names a file of the training machine: no export takes it along


class CommonSettings(BaseModel):
    """Settings every trainer of this package understands.

    A method adds its own below its name (``medcontext.mask_ratio``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_epochs: int = Field(
        1000, ge=1, description="epochs; the learning rate decays to zero over them", json_schema_extra=RESUMABLE
    )
    num_iterations_per_epoch: int = Field(
        250, ge=1, description="optimiser steps per epoch", json_schema_extra=RESUMABLE
    )
    num_val_iterations_per_epoch: int = Field(
        50, ge=1, description="validation batches per epoch, for the pseudo Dice", json_schema_extra=RESUMABLE
    )
    initial_lr: float = Field(
        1e-2, gt=0, description="learning rate of the first epoch (polynomial decay, exponent 0.9)"
    )
    weight_decay: float = Field(3e-5, ge=0, description="L2 penalty of the optimiser")
    batch_size: int | None = Field(
        None, ge=1, description="samples per optimiser step over all GPUs; none: what the plans say"
    )
    oversample_foreground_percent: float = Field(
        0.33, ge=0, le=1, description="share of each batch whose patch is forced to contain foreground"
    )
    mirroring: bool = Field(
        True,
        description="mirror patches, in training and by default in prediction, as nnU-Net does; false where structures "
        "are told apart by their side (left and right, front and back): mirrored, they look like each other",
    )
    save_every: int = Field(
        10, ge=1, description="epochs between two checkpoint_latest.pth (nnU-Net: 50)", json_schema_extra=RESUMABLE
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="random seed; with nnUNet_n_proc_DA=0 on CPU two runs are then identical bit for bit",
    )
    train_cases: Annotated[int, Field(ge=1)] | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="few-shot: train on this many of the fold's training cases (nested draws: a smaller set is part of "
        "a larger), or on the listed case ids; validation cases stay as they are",
    )
    train_cases_seed: int = Field(0, ge=0, lt=2**31, description="which draw of train_cases")
    early_stop_patience: int | None = Field(
        None,
        ge=1,
        description="end the training after this many epochs without a better moving average of the pseudo Dice",
        json_schema_extra=RESUMABLE,
    )
    panel_every: int = Field(
        10,
        ge=0,
        description="epochs between two pictures of what the method does; 0: never",
        json_schema_extra=RESUMABLE,
    )
    tensorboard: bool = Field(
        False,
        description='also log to TensorBoard; needs pip install "nnunetv2-ext[tensorboard]"',
        json_schema_extra=RESUMABLE,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads True as 1, which would turn "num_epochs: yes" of a YAML file into one epoch
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected a number, not true or false")
        return value


@dataclass(frozen=True)
class Resolved:
    """Validated settings and, by dotted key, the source of every value that is not a default."""

    settings: CommonSettings
    sources: dict[str, str]

    def explicit(self) -> dict[str, Any]:
        """Dotted keys a user set (presets and trainer defaults are not a user's), with their validated values."""
        values = flatten(self.settings)
        return {key: values[key] for key, source in self.sources.items() if source in ("plans", ENVIRONMENT_VARIABLE)}


def settings_model(name: str, methods: Mapping[str, type[BaseModel]]) -> type[CommonSettings]:
    """The settings model of a trainer: the common keys and one block per method.

    Args:
        name: name of the trainer class, for messages.
        methods: block name (the method's name) to the method's own pydantic model.
    """
    blocks: dict[str, Any] = {method: (model, model()) for method, model in methods.items()}
    return create_model(name, __base__=CommonSettings, **blocks)


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every settable key, dotted (``medcontext.mask_ratio``), with its pydantic field."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields.update({f"{name}.{key}": inner for key, inner in field.annotation.model_fields.items()})
        else:
            fields[name] = field
    return fields


def is_marked(field: FieldInfo, mark: str) -> bool:
    """Whether a field carries ``mark`` (``resumable``, ``structural``, ``local_path``) in its json_schema_extra."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(mark))


def without_local_paths(block: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A plans' block, nested or dotted, without the keys of ``model`` that are marked LOCAL_PATH."""
    local = {key for key, field in fields_by_key(model).items() if is_marked(field, "local_path")}
    kept: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, Mapping):
            kept[key] = {inner: v for inner, v in value.items() if f"{key}.{inner}" not in local}
        elif key not in local:
            kept[key] = value
    return kept


def flatten(settings: BaseModel) -> dict[str, Any]:
    """Settings as ``{dotted key: plain value}``; plain values can be written as YAML or JSON."""
    return flatten_layer(settings.model_dump(mode="json"), type(settings))


def from_environment(text: str | None) -> dict[str, Any]:
    """Parse the value of ``nnUNet_ext_settings``: the path of a YAML file, or ``key=value`` pairs separated by blanks.

    Values are YAML scalars, ``none``, or flow lists (``train_cases=[case_1,case_2]``); quote a value that contains
    blanks.

    Raises:
        ValueError: missing or unreadable file, something that is not YAML, or a part that is not ``key=value``.
    """
    text = (text or "").strip()
    if not text:
        return {}
    if "=" not in text or _is_file(text):
        return _from_file(Path(text))
    pairs: dict[str, Any] = {}
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} cannot be read ({error}): close the quotes in {text!r}") from error
    for part in parts:
        key, separator, value = part.partition("=")
        if not separator or not key:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: {part!r} is not of the form key=value; write for example "
                f'{ENVIRONMENT_VARIABLE}="num_epochs=250 seed=1", without blanks around "="'
            )
        if key in pairs:
            raise ValueError(f"{ENVIRONMENT_VARIABLE} sets {key!r} twice; keep one of the two")
        try:
            pairs[key] = None if value.lower() == "none" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}: the value of {key!r} cannot be read: {value!r}") from error
    return pairs


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may come once; PyYAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]!r} is set twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a file name can be: a list of cases, for example
        return False


def _from_file(path: Path) -> dict[str, Any]:
    if not _is_file(str(path)):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} names the settings file {str(path)!r}, which does not exist; "
            "give the path of a YAML file or key=value pairs"
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the settings file {str(path)!r} cannot be read as YAML ({reason}); "
            f"mend it or unset {ENVIRONMENT_VARIABLE}"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"the settings file {str(path)!r} must hold key: value lines, not a {type(content).__name__}")
    return content


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
    for source, layer in layers:
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    for key, value in _presets(model, values, sources).items():
        if sources.get(key, "trainer") == "trainer":
            values[key], sources[key] = value, "preset"
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
    values = {key: value for key, value in saved.items() if key in fields}
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
    return flat


def flatten_layer(layer: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Nested blocks of a source as dotted keys; a block without a key in it (``medcontext:``) is no key."""
    blocks = {key.partition(".")[0] for key in fields_by_key(model) if "." in key}
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        if key in blocks and (value is None or isinstance(value, Mapping)):
            flat.update({f"{key}.{inner}": inner_value for inner, inner_value in (value or {}).items()})
        else:
            flat[str(key)] = value
    return flat


def _presets(model: type[BaseModel], values: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        presets = getattr(field.annotation, "PRESETS", None)
        preset = values.get(f"{name}.preset")
        if presets is None or preset is None:
            continue
        if preset not in presets:
            raise ValueError(
                f"{name}.preset={preset!r} (from {sources[f'{name}.preset']}) does not exist; "
                f"there is {', '.join(presets)}"
            )
        chosen.update({f"{name}.{key}": value for key, value in presets[preset].items()})
    return chosen


def _validate(model: type[CommonSettings], values: Mapping[str, Any], sources: Mapping[str, str]) -> CommonSettings:
    fields = fields_by_key(model)
    nested: dict[str, Any] = {}
    for key, value in values.items():
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


def describe(settings: CommonSettings, sources: Mapping[str, str]) -> str:
    """One line per key, ``key = value``, with the source of what is not a default."""
    lines = []
    for key, value in flatten(settings).items():
        origin = sources.get(key)
        lines.append(f"  {key} = {value}" + (f"    ({origin})" if origin else ""))
    return "\n".join(lines)
