"""Checks of ``nnUNetv2_ext doctor``: device, memory, worker processes, nnU-Net's folders."""

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding

GIB = 2**30
LITTLE_RAM = 16 * GIB  # nnU-Net states 32 GB for training; below half of that background workers are killed
LITTLE_RAM_PER_WORKER = (
    2 * GIB
)  # measured order of magnitude for 3d patches: a worker holds a few cases' crops and imports torch
LITTLE_SHM = 2 * GIB  # containers get 64 MiB unless told otherwise; batches of 3d patches travel through it

NNUNET_FOLDERS = {
    "nnUNet_raw": "the data sets",
    "nnUNet_preprocessed": "preprocessed data",
    "nnUNet_results": "trained models",
}


def devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(OK, f"cuda:{index}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield Finding(OK, "mps", "Apple GPU; pass -device mps to nnU-Net's commands")
    else:
        remedy = "train with -device cpu"
        if torch.version.cuda:
            remedy += "; if there is an NVIDIA GPU, its driver does not answer: see nvidia-smi"
        yield Finding(
            WARN, "device", "CPU only: full-size training takes weeks, small runs and prediction work", remedy
        )


def memory() -> Iterator[Finding]:
    total, available = ram()
    text = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB of it free"
    if total < LITTLE_RAM:
        yield Finding(WARN, "RAM", f"{text}; nnU-Net asks for 32 GiB", "export nnUNet_n_proc_DA=2 (fewer workers)")
    else:
        yield Finding(OK, "RAM", text)


def ram() -> tuple[int, int]:
    """Total and available memory of this process in bytes, the container's limit respected."""
    import psutil

    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # not Linux, no cgroup v2, or "max"
        return total, available
    return min(total, limit), max(0, min(available, limit - used))


def shared_memory() -> Iterator[Finding]:
    """Size of ``/dev/shm``, through which workers hand over batches. Linux only."""
    if not os.path.isdir("/dev/shm"):
        return
    usage = shutil.disk_usage("/dev/shm")
    text = f"{usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} GiB of it free"
    if usage.free < LITTLE_SHM:
        yield Finding(
            WARN,
            "/dev/shm",
            f"{text}; background workers may die",
            "start the container with --shm-size=8g or --ipc=host",
        )
    else:
        yield Finding(OK, "/dev/shm", text)


def workers() -> Iterator[Finding]:
    """CPUs, and how many augmentation processes nnU-Net will start on them."""
    usable, present = usable_cpus(), os.cpu_count() or 1
    text = f"{usable} usable" + (f" of {present}" if usable != present else "")
    yield Finding(OK, "CPUs", text)
    value = os.environ.get("nnUNet_n_proc_DA")
    if value is not None and not _is_count(value):
        yield Finding(
            FAIL,
            "nnUNet_n_proc_DA",
            f"is {value!r}; it must be a whole number >= 0",
            f"export nnUNet_n_proc_DA={usable}",
        )
        return
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    number = get_allowed_n_proc_DA()
    source = "not set" if value is None else value
    text = f"{source}: {number} worker processes for training and {max(1, number // 2)} for validation, per GPU"
    if number == 0:
        yield Finding(
            WARN,
            "nnUNet_n_proc_DA",
            "0: data are loaded in the main process (slow; right for debugging), but planning fails with it",
            "export nnUNet_n_proc_DA=1 for nnUNetv2_plan_and_preprocess",
        )
    elif number > usable:
        yield Finding(
            WARN, "nnUNet_n_proc_DA", f"{text}, on {usable} CPUs", f"export nnUNet_n_proc_DA={max(1, usable)}"
        )
    elif ram()[0] < number * LITTLE_RAM_PER_WORKER:
        fewer = max(1, ram()[0] // LITTLE_RAM_PER_WORKER)
        yield Finding(WARN, "nnUNet_n_proc_DA", f"{text}: many for this RAM", f"export nnUNet_n_proc_DA={fewer}")
    else:
        yield Finding(OK, "nnUNet_n_proc_DA", text)


def usable_cpus() -> int:
    """CPUs that this process may use: a scheduler such as SLURM gives fewer than ``os.cpu_count()`` says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def nnunet_folders() -> Iterator[Finding]:
    for variable, content in NNUNET_FOLDERS.items():
        value = os.environ.get(variable)
        if not value:
            yield Finding(FAIL, variable, "not set", f"export {variable}=/path/to/{variable}   (folder for {content})")
        elif not os.path.exists(value) and (meant := _as_a_shell_reads(value)) != value:
            detail = f"{value!r} is taken literally, with its quotes, blanks or ~; there is no such folder"
            yield Finding(FAIL, variable, detail, f"export {variable}={shlex.quote(meant)}")
        elif not os.path.exists(value):
            yield Finding(WARN, variable, f"{value} does not exist", f"mkdir -p {shlex.quote(value)}")
        elif not os.path.isdir(value):
            yield Finding(FAIL, variable, f"{value} is not a folder", f"point {variable} to a folder for {content}")
        elif not _is_writable(value):
            # raw data may well lie on a read-only share
            status = WARN if variable == "nnUNet_raw" else FAIL
            yield Finding(status, variable, f"{value} is not writable", f"chmod u+w {value}, or another folder")
        else:
            free = shutil.disk_usage(value).free / GIB
            yield Finding(OK, variable, f"{value}, {free:.0f} GiB free")


def _as_a_shell_reads(value: str) -> str:
    """A folder without what a shell takes away: quotes and blanks around it (a .env file keeps them), ``~``."""
    return os.path.expanduser(value.strip().strip("'\"").strip())


def _is_writable(folder: str) -> bool:
    """By writing: permission bits say nothing on network shares and for root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_count(text: str) -> bool:
    try:
        return int(text) >= 0
    except ValueError:
        return False
