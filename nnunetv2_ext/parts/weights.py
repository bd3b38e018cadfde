"""Weights of a local file as plain tensors, without executing code of the file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CONTAINERS = ("state_dict", "model", "model_state_dict")


def read_weights(path: Path, setting: str) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file or one of ``torch.save``.

    Args:
        path: of the file.
        setting: that names it, for messages.

    Raises:
        ValueError: no such file, or one that holds something else than tensors.
    """
    if not path.is_file():
        raise ValueError(f"{setting}={path} is not a file; name a weights file on this machine")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)  # refuses code
    except Exception as error:  # each reader has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{setting}={path} cannot be read as plain tensors ({reason}): give a .safetensors file, or "
            "a state_dict saved by torch.save"
        ) from error
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{setting}={path} holds no tensors by name; give the network's state_dict")
    return tensors
