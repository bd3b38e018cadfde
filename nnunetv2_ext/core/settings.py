"""Settings of our trainers: every key with its type, bounds and meaning, and how keys are written (dotted, nested).

nnU-Net's trainers take no further constructor arguments: nnUNetTrainer.__init__ raises KeyError on one. Values
therefore come from a file or the environment (core/sources.py). They are merged in core/resolve.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

PLANS_KEY = "nnunetv2_ext"

Model = TypeVar("Model", bound="Settings")

# What a field may say about itself, in ``json_schema_extra``:
# may be changed when a training is continued (it sets how long or how often, not what is learnt)
RESUMABLE: JsonDict = {"resumable": True}
_resumable: Any = partial(Field, json_schema_extra=RESUMABLE)
# changes the network or how it predicts; the predictor reads it from one plans.json, so all folds must agree on it
STRUCTURAL: JsonDict = {"structural": True}
LOCAL_PATH: JsonDict = {"local_path": True}  # names a file of the training machine: no export takes it along


class Settings(BaseModel):
    """Base of all settings models: refuses unknown names, NaN, and true or false where the field is not a bool."""

    RENAMED: ClassVar[Mapping[str, str]] = {}  # an old key of this block: the dotted key that it is called today

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads True as 1, which would turn "num_epochs: true" into one epoch
        annotation = cls.model_fields[str(info.field_name)].annotation
        given = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(v, bool) for v in given) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("expected a value, not true or false")
        return value


class CommonSettings(Settings):
    """Settings every trainer of this package understands.

    A method adds its own below its name (``mymethod.weight``).
    """

    num_epochs: int = _resumable(1000, ge=1, description="epochs; the learning rate decays to zero over them")
    num_iterations_per_epoch: int = _resumable(250, ge=1, description="optimiser steps per epoch")
    num_val_iterations_per_epoch: int = _resumable(
        50,
        ge=0,
        description="validation batches per epoch, for the pseudo Dice; 0: no validation during training, and so no "
        "best checkpoint",
    )
    initial_lr: float = Field(
        1e-2, gt=0, description="learning rate of the first epoch (polynomial decay, exponent 0.9)"
    )
    weight_decay: float = Field(3e-5, ge=0, description="L2 penalty of the optimiser")
    clip_norm: float | None = Field(
        None, gt=0, description="norm to which gradients are clipped; none: the base trainer's (nnU-Net: 12)"
    )
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
    save_every: int = _resumable(10, ge=1, description="epochs between two checkpoint_latest.pth (nnU-Net: 50)")
    keep_every: int | None = _resumable(
        None,
        ge=1,
        description="epochs between two checkpoints that are kept (checkpoint_epoch_0050.pth); none: nothing is kept",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="random seed; with nnUNet_n_proc_DA=0 and one thread on a CPU two runs are then identical bit for "
        "bit",
    )
    train_cases: Annotated[int, Field(ge=1)] | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="few-shot: train on this many of the fold's training cases (nested draws: a smaller set is part of "
        "a larger), or on the listed case ids; validation cases stay as they are",
    )
    train_cases_seed: int = Field(0, ge=0, lt=2**31, description="which draw of train_cases")
    group_regex: str | None = Field(
        None,
        description="searched in a case id, its first group is the subject (patient); splits that a trainer writes and "
        "rules about cases of one subject go by it; none: as dataset.json records subjects, else each case is its own",
    )
    early_stop_patience: int | None = _resumable(
        None,
        ge=1,
        description="end the training after this many epochs without a better moving average of the validation score "
        "(the pseudo Dice)",
    )
    panel_every: int = _resumable(10, ge=0, description="epochs between two pictures of what the method does; 0: never")
    tensorboard: bool = _resumable(
        False, description='also log to TensorBoard; needs pip install "nnunetv2-ext[tensorboard]"'
    )

    @model_validator(mode="after")
    def _early_stop_has_a_score(self) -> CommonSettings:
        if self.early_stop_patience is not None and self.num_val_iterations_per_epoch == 0:
            raise ValueError(
                "early_stop_patience goes by the validation score, and num_val_iterations_per_epoch=0 asks for no "
                "validation; unset one of the two"
            )
        return self

    @field_validator("train_cases", mode="before")
    @classmethod
    def _case_ids(cls, value: Any) -> Any:
        # an id of digits reads as a number; the order means nothing, and --c compares
        if isinstance(value, list) and all(type(v) in (str, int) for v in value):
            return sorted({str(v) for v in value})
        return value


def settings_model(
    name: str, methods: Mapping[str, type[BaseModel]], common: Sequence[type[CommonSettings]] = (CommonSettings,)
) -> type[CommonSettings]:
    """The settings model of a trainer of this name: the common keys and one block per method.

    Of the models of common keys one that another one is derived from adds nothing.
    """
    blocks: dict[str, Any] = {method: (model, model()) for method, model in methods.items()}
    bases = tuple(a for a in dict.fromkeys(common) if not any(b is not a and issubclass(b, a) for b in common))
    return create_model(name, __base__=bases, **blocks)


def fields_by_key(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Every settable key, dotted (``mymethod.weight``), with its pydantic field."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields.update({f"{name}.{key}": inner for key, inner in field.annotation.model_fields.items()})
        else:
            fields[name] = field
    return fields


def renamed_keys(model: type[BaseModel]) -> dict[str, str]:
    """Old dotted keys and what they are called today, of the model and of the methods' blocks in it."""
    renamed = dict(getattr(model, "RENAMED", {}))
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            renamed |= {f"{name}.{old}": new for old, new in field.annotation.RENAMED.items()}
    return renamed


def from_model_folder(block: Mapping[str, Any], model: type[Model], method: str) -> Model:
    """A method's block of a model folder's plans, which any version of this package may have written.

    Keys that this version does not know are passed over with one warning: a newer one wrote them, and if they changed
    the network its weights do not fit. Renamed keys that moved to another block are passed over in silence.

    Raises:
        ValueError: a value that is not valid in this version.
    """
    values: dict[str, Any] = {}
    unknown = []
    for key, value in block.items():
        block_today, _, inner = model.RENAMED.get(key, f"{method}.{key}").rpartition(".")
        if block_today == method and inner in model.model_fields:
            values.setdefault(inner, value)
        elif key not in model.RENAMED:
            unknown.append(f"{method}.{key}")
    if unknown:
        warnings.warn(
            f"the model was trained by another version of nnunetv2-ext: its {', '.join(unknown)} "
            "mean nothing to this one and are passed over",
            stacklevel=2,
        )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join([method, *map(str, problem["loc"])])
        raise ValueError(
            f"the model was trained with {key}={problem['input']!r}, which this version of nnunetv2-ext does not know "
            f"({problem['msg']}); update it: pip install -U nnunetv2-ext"
        ) from None


def is_marked(field: FieldInfo, mark: str) -> bool:
    """Whether a field carries ``mark`` (``resumable``, ``structural``, ``local_path``) in its json_schema_extra."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get(mark))


def without_local_paths(block: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A plans' block, nested or dotted, without the keys of ``model`` that are marked LOCAL_PATH.

    Nor with keys that ``model`` does not know: another version wrote them, and they may be paths.
    """
    shared = {key for key, field in fields_by_key(model).items() if not is_marked(field, "local_path")}
    shared |= {old for old, new in renamed_keys(model).items() if new in shared}
    kept: dict[str, Any] = {}
    for key, value in block.items():
        if isinstance(value, Mapping):
            kept[key] = {inner: v for inner, v in value.items() if f"{key}.{inner}" in shared}
        elif key in shared:
            kept[key] = value
    return kept


def flatten(settings: BaseModel) -> dict[str, Any]:
    """Settings as ``{dotted key: plain value}``; plain values can be written as YAML or JSON."""
    return flatten_layer(settings.model_dump(mode="json"), type(settings))


def flatten_layer(layer: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Nested blocks of a source as dotted keys; a block without a key in it (``mymethod:``) is not a key."""
    blocks = {key.partition(".")[0] for key in fields_by_key(model) if "." in key}
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        if key in blocks and (value is None or isinstance(value, Mapping)):
            flat.update({f"{key}.{inner}": inner_value for inner, inner_value in (value or {}).items()})
        else:
            flat[str(key)] = value
    return flat


def describe(settings: CommonSettings, sources: Mapping[str, str]) -> str:
    """One line per key, ``key = value``, with the source of what is not a default."""
    origins = {key: f"    ({origin})" for key, origin in sources.items()}
    return "\n".join(f"  {key} = {value}{origins.get(key, '')}" for key, value in flatten(settings).items())
