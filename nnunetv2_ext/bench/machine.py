"""Device, versions and switches that the figures depend on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from nnunetv2_ext import __version__
from nnunetv2_ext.core.compat import nnunet_version


def describe_machine(device: torch.device, threads: int | None) -> dict[str, Any]:
    """Plain values for a table's head and for JSON."""
    described: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": device_name(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nnunetv2": nnunet_version(),
        "nnunetv2_ext": __version__,
        "cpus": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "nnUNet_compile": os.environ.get("nnUNet_compile"),
    }
    if device.type == "cuda":
        described |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpu_memory": torch.cuda.get_device_properties(0).total_memory,
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        }
    return described


def device_name(device: torch.device) -> str:
    """The GPU's or processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
