"""Weights of CLIP and Alpha-CLIP from local files: read without executing code, named as open_clip names them."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_ext.rada.semantics.torchscript import is_torchscript, read_torchscript

WITHOUT_CLIP = "or train without CLIP: rada.semantics=learned or rada.semantics=off"
OPENAI_NOTICE = (
    "OpenAI CLIP: the code is MIT; the model card puts deployed use, and so clinical use, out of scope"
    " (https://github.com/openai/CLIP/blob/main/model-card.md)."
)
ALPHA_NOTICE = (
    "Alpha-CLIP: the code is Apache-2.0, the weights are for research only, the training data CC BY-NC 4.0"
    " (https://github.com/SunzeY/AlphaCLIP)."
)
# OpenAI's archives carry these three numbers as buffers; they are no weights
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


def read_weights(path: str | Path, setting: str, log: Callable[[str], None] = print) -> dict[str, Tensor]:
    """State dict of a local file: ``.safetensors``, a ``torch.save`` file, or a TorchScript archive.

    No code of the file is executed: ``torch.load`` runs with ``weights_only=True``, and of a TorchScript archive (the
    form of OpenAI's own downloads) the tensors are taken without ``torch.jit``. ``module.`` in front of all names is
    dropped.

    Args:
        path: the file.
        setting: setting that named it, for messages.
        log: told when the file is a TorchScript archive.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds something else than a state dict.
    """
    path = require_file(path, setting)
    try:
        content = _read(path, log)
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise _unreadable(path, setting, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # its class is imported only where such a file is read
            raise
        raise _unreadable(path, setting, error) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"{setting}: {path} holds no state dict (names and tensors); give another file, {WITHOUT_CLIP}"
        )
    state = {str(name): tensor for name, tensor in content.items()}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}


def require_file(path: str | Path, setting: str) -> Path:
    """The path with ``~`` expanded; ValueError, naming the setting, if there is no such file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{setting}: there is no file {path}; give the path of a weights file, {WITHOUT_CLIP}")
    return path


def _read(path: Path, log: Callable[[str], None]) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if is_torchscript(path):
        log(f"{path} is a TorchScript archive: its tensors are read, its code is not run.")
        return read_torchscript(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _unreadable(path: Path, setting: str, error: Exception) -> ValueError:
    return ValueError(
        f"{setting}: {path} cannot be read as weights ({first_line(error)}); it is truncated or no weights file: "
        f"download it again, {WITHOUT_CLIP}"
    )


def first_line(error: BaseException, length: int = 160) -> str:
    """An error in one line: libraries put pages of advice into theirs."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return text if len(text) <= length else f"{text[:length]}..."


def alpha_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Alpha-CLIP's visual weights under open_clip's names, for a patch embedding of four channels.

    Alpha-CLIP adds a convolution of the mask to the one of the image: ``conv1(x) + conv1_alpha(a)`` is one convolution
    of the four channels with both kernels side by side. Its attention calls ``in_proj_weight`` ``in_proj.weight``.

    Source: https://github.com/SunzeY/AlphaCLIP, alpha_clip/model.py; equal to 2.4e-6 when measured.

    Raises:
        ValueError: ``conv1.weight`` or ``conv1_alpha.weight`` is missing, or both do not fit together.
    """
    state = {name.removeprefix("module.").removeprefix("visual."): tensor for name, tensor in state.items()}
    missing = [name for name in ("conv1.weight", "conv1_alpha.weight") if name not in state]
    if missing:
        raise ValueError(f"no Alpha-CLIP weights: {' and '.join(missing)} not found")
    colour, alpha = state.pop("conv1.weight"), state.pop("conv1_alpha.weight")
    if (
        alpha.ndim != 4
        or alpha.shape[1] != 1
        or alpha.shape[0] != colour.shape[0]
        or alpha.shape[2:] != colour.shape[2:]
    ):
        raise ValueError(f"conv1_alpha.weight is {shape(alpha)} beside conv1.weight of {shape(colour)}")
    renamed = {
        name.replace(".attn.in_proj.weight", ".attn.in_proj_weight").replace(
            ".attn.in_proj.bias", ".attn.in_proj_bias"
        ): t
        for name, t in state.items()
    }
    return {"conv1.weight": torch.cat((colour, alpha), 1), **renamed}


def load_strict(
    module: torch.nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    setting: str,
    model: str,
    extra_ok: bool = False,
) -> None:
    """Copy `state` into `module`; every name and every size must agree (``extra_ok``: but for tensors in excess).

    Raises:
        ValueError: they do not; names the file, the first difference and the settings to change.
    """
    expected = module.state_dict()
    wrong = [
        f"{name} is {shape(state[name])} instead of {shape(tensor)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = [f"{name} is missing" for name in expected if name not in state]
    extra = [] if extra_ok else [f"{name} has no place in the model" for name in state if name not in expected]
    problems = wrong + missing + extra
    if problems:
        more = f" and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise ValueError(
            f"{setting}: {path} does not fit {model}: {problems[0]}{more}; "
            f"give the weights of that model, or set rada.clip_model to the model of these weights, {WITHOUT_CLIP}"
        )
    module.load_state_dict({name: state[name] for name in expected}, strict=True)


def shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits (about a second for ViT-B/16)."""
    with open(Path(path).expanduser(), "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
