"""Checkpoint files: reading them with a clear word about broken ones, and the key for what nnU-Net does not save."""

import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

EXTENSION_KEY = "nnunetv2_ext"  # stock nnU-Net ignores keys it does not know
FORMAT = 1
TRUSTED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own variable
_UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
    *(LookupError, TypeError, AttributeError),  # of torch's own unpickler, for bytes that mean something else
)
_GLOBAL = re.compile(r"GLOBAL:? (\S+) (?:was not|whose module)")  # torch's words


def unwrap(network: nn.Module) -> nn.Module:
    """The network without its DDP and torch.compile wrappers: the module whose state-dict keys nnU-Net saves."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    if isinstance(network, OptimizedModule):
        network = network._orig_mod
    return network


def load(path: Path, whole: bool = False, trust: bool = False, remedy: str = f"set {TRUSTED}=1") -> Any:
    """What torch saved in a file, tensors memory-mapped on the CPU (only those used are read).

    With `whole` all of it is read first and compared with its checksums. Otherwise torch looks at the directory at the
    file's end only, and a damaged tensor comes to light later, or never. A file of pickles can run any program when it
    is opened. Only tensors, plain values and numpy's arrays and scalars are read from it, unless `trust` or the
    variable `TRUSTED` says otherwise; torch before 2.5 cannot tell them apart and reads all of it. `remedy` is what the
    message names.

    Raises:
        ValueError: the file is missing, truncated or damaged, or holds something else, which is named.
    """
    trust = trust or os.environ.get(TRUSTED, "0").lower() in ("1", "y", "yes", "true")
    allowed = getattr(torch.serialization, "safe_globals", None)
    try:
        if whole and _is_zip(path):  # a file of an old torch has no checksums
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} does not match its checksum")
        zipped = _is_zip(path) or not path.is_file()
        options: dict[str, Any] = {"map_location": "cpu", "mmap": True if zipped else None}
        if trust or allowed is None:
            return torch.load(str(path), weights_only=False, **options)
        with allowed(_of_numpy()):
            return torch.load(str(path), weights_only=True, **options)
    except FileNotFoundError as error:
        raise ValueError(f"the checkpoint {path} does not exist; train first, or name another one") from error
    except _UNREADABLE as error:
        if needed := _GLOBAL.search(str(error)):
            raise ValueError(
                f"the checkpoint {path} holds {needed[1]}, which is neither a tensor nor a plain value; "
                f"such a file can run any program when it is opened. If you trust whoever wrote it, {remedy}"
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if path.is_file() and not _is_zip(path):  # torch then speaks of its options
            reason = "it is not a file of torch.save"
        raise ValueError(
            f"the checkpoint {path} is broken or cut short ({reason}); move it away and use another one"
        ) from error


def _is_zip(path: Path) -> bool:
    """zipfile's, which raises for some damaged directories."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def read(path: Path, whole: bool = False) -> dict[str, Any]:
    """A checkpoint written by nnU-Net or by us, as `load` reads it.

    Raises:
        ValueError: as `load`, or the file is not an nnU-Net checkpoint.
    """
    checkpoint = load(path, whole)
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise ValueError(f"{path} is not an nnU-Net checkpoint (it has no network_weights)")
    return checkpoint


def _of_numpy() -> list[Any]:
    """What nnU-Net's checkpoints need besides torch's own list, by the names of numpy 1 and 2."""
    core = getattr(np, "_core", None) or np.core
    made = [core.multiarray._reconstruct, core.multiarray.scalar]
    named = [(f, f"numpy.{room}.multiarray.{f.__name__}") for f in made for room in ("core", "_core")]
    dtypes = [getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")]
    return [np.dtype, np.ndarray, *named, *dtypes]


@contextmanager
def all_of_torch_load() -> Iterator[None]:
    """While nnU-Net reads a file that `read` has read: some of its trainers leave torch's weights_only at its default.

    nnU-Net's checkpoints hold numpy scalars, at which that default ends (nnUNetTrainer_warmup, so Primus).
    """
    name = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def require_known_format(extension: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if a newer version of this package wrote the extension's part of the checkpoint."""
    if extension["format"] > FORMAT:
        raise ValueError(
            f"{path} was written by a newer nnunetv2-ext (format {extension['format']}, this version reads up to "
            f"{FORMAT}); update it: pip install -U nnunetv2-ext"
        )


def read_or_fall_back(path: Path) -> tuple[dict[str, Any], Path, str | None]:
    """Read a checkpoint; where ``checkpoint_latest.pth`` is broken, take ``checkpoint_best.pth`` of the same fold.

    Returns:
        The checkpoint, the file it came from, and a sentence for the log if that is not the file asked for.

    Raises:
        ValueError: the file is broken and there is none to fall back to.
    """
    try:
        return read(path, whole=True), path, None
    except ValueError as error:
        other = path.with_name("checkpoint_best.pth")
        if path.name != "checkpoint_latest.pth" or not other.is_file():
            raise
        try:
            return read(other, whole=True), other, f"WARNING: {error}. Continuing from {other} instead"
        except ValueError as second:
            raise ValueError(f"{error}; and {second}") from second


def check_weights(weights: Mapping[str, Tensor], network: nn.Module, path: Path) -> None:
    """Compare names and shapes with the network before anything is overwritten.

    A network may name buffers that take whatever size is loaded in its attribute ``buffers_of_any_size``.

    Raises:
        ValueError: the checkpoint belongs to another architecture; the first difference is named.
    """
    ours = dict(unwrap(network).state_dict())
    theirs = {key.removeprefix("module."): value for key, value in weights.items()}
    for key in ours.keys() & theirs.keys() & set(getattr(unwrap(network), "buffers_of_any_size", ())):
        del ours[key], theirs[key]
    if difference := first_difference(ours, theirs):
        key, here, there = difference
        raise ValueError(
            f"{path} was trained with another network: {key} is {there} there and {here} here. "
            "Continue with the plans and settings it was trained with, or start a new training without --c"
        )


def first_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    """The first name whose shapes differ, with both in words (``16 x 1 x 3``, ``missing``); None if all agree."""
    for name in [*ours, *theirs]:
        shapes = [tensors[name].shape if name in tensors else None for tensors in (ours, theirs)]
        if shapes[0] != shapes[1]:
            here, there = ("missing" if s is None else " x ".join(map(str, s)) or "one number" for s in shapes)
            return name, here, there
    return None
