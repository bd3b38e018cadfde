"""Tensors of a TorchScript archive, read without running anything that is in it.

OpenAI's own CLIP files are such archives. ``torch.load(weights_only=True)`` refuses them, and ``torch.jit.load``
compiles the code they carry and may run part of it (``__setstate__``), which a file of unknown origin must not be
allowed to do. An archive is a zip with one pickle (``data.pkl``) and one record per tensor storage: the pickle is read
here with every class of the archive replaced by an inert holder, and any other name refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Holder:
    """Stands for any TorchScript object; keeps its attributes."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive (and not an ordinary ``torch.save`` file, which has no constants)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Name to tensor for all tensors of the archived module, parameters, buffers and other tensor attributes alike.

    Raises:
        pickle.UnpicklingError: the archive holds something else than modules, tensors and plain values.
        zipfile.BadZipFile, KeyError, RuntimeError: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("written on a big-endian machine")
        with archive.open(f"{root}data.pkl") as file:
            module = _Reader(file, lambda key: archive.read(f"{root}data/{key}")).load()
    return dict(_tensors(module, ""))


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, read_record: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read_record = read_record
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Holder
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch", "device"): str,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if module == "torch.jit._pickle":  # typed lists and dictionaries: build_intlist(x), restore_type_tag(x, type)
            return _first
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the archive asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, _count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown record {kind}")
        if key not in self._storages:
            content = bytearray(self._read_record(key))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _first(value: Any, *_: Any) -> Any:
    return value


def _rebuild_tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, _Holder) and isinstance(value.state, dict):
        prefix = f"{name}." if name else ""
        return [pair for key, child in value.state.items() for pair in _tensors(child, f"{prefix}{key}")]
    return []
