"""Whether torch can use the device that was asked for, said in one line before anything is built."""

import torch


def check_device(device: str) -> None:
    """Raise ValueError if torch cannot use ``device`` (``cpu``, ``cuda`` or ``mps``)."""
    if device == "cuda" and not torch.cuda.is_available():
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise ValueError(
            f"-device cuda: torch {torch.__version__} ({build}) sees no GPU; use -device cpu, "
            "or see nnUNetv2_ext doctor"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("-device mps: torch sees no Apple GPU; use -device cpu")
