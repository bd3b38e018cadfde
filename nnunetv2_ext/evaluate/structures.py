"""What is scored: the classes or regions of a dataset.json, or label values given by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.core.files import read_json


@dataclass(frozen=True)
class Structure:
    """A class (one label value) or a region (several)."""

    name: str  # as in dataset.json
    values: tuple[int, ...]
    region: bool = False  # whether dataset.json gives a list, which may have a single value

    @property
    def key(self) -> str:
        """nnU-Net's key in summary.json: ``1`` for a class, ``(1, 2)`` or ``(2,)`` for a region."""
        return str(self.values) if self.region or len(self.values) > 1 else str(self.values[0])

    def mask(self, labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Where a label map shows this structure."""
        return labels == self.values[0] if len(self.values) == 1 else np.isin(labels, self.values)


@dataclass(frozen=True)
class Labels:
    """The structures of a dataset and what its files may hold."""

    structures: tuple[Structure, ...]
    ignore: int | None = None  # the ignore label's value
    allowed: frozenset[int] | None = None  # every value a prediction may hold; None allows any

    def check(self, what: str, values: Sequence[int], may_ignore: bool) -> None:
        """Raise ValueError if a file, described by ``what``, holds values that the dataset does not have."""
        if self.allowed is None:
            return
        allowed = self.allowed | ({self.ignore} if may_ignore and self.ignore is not None else set())
        if strange := sorted(set(values) - allowed):
            remark = " (the ignore label belongs into the truth only)" if self.ignore in strange else ""
            raise ValueError(
                f"{what} holds the label {', '.join(map(str, strange))}, which dataset.json does not have{remark}: it "
                f"has {', '.join(map(str, sorted(allowed)))}; is this the right folder and the right dataset.json?"
            )


def read_labels(file: Path) -> tuple[dict[str, Any], Labels]:
    """A dataset.json and what it says about labels; ValueError: it cannot be read, or has no usable ``labels``."""
    content = read_json(file)
    return content, from_dataset_json(content, file)


def from_dataset_json(dataset_json: Any, source: str | Path = "dataset.json") -> Labels:
    """Structures, ignore label and allowed values; ValueError, which names ``source``: no usable ``labels``."""
    try:
        found = [_structure(str(name), value) for name, value in dataset_json["labels"].items()]
    except (KeyError, AttributeError, TypeError, ValueError):
        raise ValueError(
            f'{source} has no labels of the form "labels": {{"background": 0, "name": 1, ...}}; give nnU-Net\'s file'
        ) from None
    # as nnU-Net's LabelManager: the background is recognised by its value
    structures = tuple(s for s in found if s.name != "ignore" and any(s.values))
    if not structures:
        raise ValueError(f"{source} has no label beside the background, so there is nothing to evaluate")
    ignore = next((s.values[0] for s in found if s.name == "ignore"), None)
    return Labels(structures, ignore, frozenset({0, *(v for s in structures for v in s.values)}))


def _structure(name: str, value: Any) -> Structure:
    region = isinstance(value, (list, tuple))
    values = tuple(value) if region else (value,)
    if not values or any(int(v) != v for v in values):
        raise ValueError(value)
    return Structure(name, tuple(int(v) for v in values), region)


def from_values(values: Sequence[int], ignore: int | None = None) -> Labels:
    """Label values given by hand; files may hold other labels, which are not looked at.

    ValueError: a value below 1, one given twice, or the ignore label among them.
    """
    if not values or any(v < 1 for v in values) or len(set(values)) < len(values):
        raise ValueError(f"--labels needs different values of 1 or more, but got {' '.join(map(str, values))}")
    if ignore in values:
        raise ValueError(f"the label {ignore} cannot be evaluated and ignored at once")
    return Labels(tuple(Structure(f"label {v}", (v,)) for v in values), ignore)


def tolerances(texts: Sequence[str], structures: Sequence[Structure]) -> dict[str, float]:
    """``["1"]`` (mm, for all) or ``["1", "liver=2"]`` (others 1 mm) to mm by structure name.

    ValueError: not a number, an unknown structure, or a structure left without a tolerance.
    """
    found: dict[str, float] = {}
    names = [s.name for s in structures]
    for text in texts:
        name, separator, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise ValueError(f"--tolerance {text!r} is neither a number of mm nor NAME=mm") from None
        if separator and name not in names:
            raise ValueError(f"--tolerance {text!r}: there is no structure {name!r}; there are {', '.join(names)}")
    if without := [name for name in names if not {name, ""} & set(found)]:
        raise ValueError(f"--tolerance says nothing of {', '.join(without)}; add NAME=mm or one number for all others")
    return {name: found[name] if name in found else found[""] for name in names}
