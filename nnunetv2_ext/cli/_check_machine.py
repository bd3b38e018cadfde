"""Checks of ``nnUNetv2_ext doctor``: device, memory, worker processes, nnU-Net's folders."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding, judged
from nnunetv2_ext.core.processes import NUMBERS, unusable, usable_cpus

GIB = 2**30
LITTLE_RAM = 16 * GIB  # nnU-Net states 32 GB for training; below half of that background workers are killed
# measured order of magnitude for 3d patches: a worker holds a few cases' crops and imports torch
LITTLE_RAM_PER_WORKER = 2 * GIB
FEW_WORKERS = 2
NNUNET_EXPORT_PROCESSES = 8  # nnunetv2/configuration.py, where the variable is not set
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
        what, remedy = (
            "CPU only: full-size training takes weeks, small runs and prediction work",
            "train with -device cpu",
        )
        if torch.version.cuda:
            remedy += "; if there is an NVIDIA GPU, its driver does not answer: see nvidia-smi"
        yield Finding(WARN, "device", what, remedy)


def memory() -> Iterator[Finding]:
    total, available = ram()
    text = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB of it free"
    workers = os.environ.get("nnUNet_n_proc_DA", "").strip()
    few = workers.isdecimal() and int(workers) <= FEW_WORKERS
    lack = "nnU-Net asks for 32 GiB" if total < LITTLE_RAM and not few else ""
    yield judged("RAM", text, lack, f"export nnUNet_n_proc_DA={FEW_WORKERS} (fewer workers)")


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
    lack = "background workers may die" if usage.free < LITTLE_SHM else ""
    yield judged("/dev/shm", text, lack, "start the container with --shm-size=8g or --ipc=host")


def workers() -> Iterator[Finding]:
    """CPUs, and how many processes nnU-Net will start on them for augmentation and for exporting segmentations."""
    usable, present = usable_cpus(), os.cpu_count() or 1
    yield Finding(OK, "CPUs", f"{usable} usable" + (f" of {present}" if usable != present else ""))
    wrong = {name: text for name in NUMBERS if (text := unusable(name))}
    for name, text in wrong.items():
        yield Finding(FAIL, name, f"{text}, and nnU-Net does not start", f"export {name}={usable}")
    if not wrong:  # nnU-Net reads both when it is imported
        yield from _augmentation(usable)
        yield from _export(usable)


def _augmentation(usable: int) -> Iterator[Finding]:
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    name = "nnUNet_n_proc_DA"
    value = os.environ.get(name)
    number, affordable = get_allowed_n_proc_DA(), max(1, ram()[0] // LITTLE_RAM_PER_WORKER)
    source = "not set" if value is None else value
    text = f"{source}: {number} worker processes for training and {max(1, number // 2)} for validation, per GPU"
    if number == 0:
        text = "0: data are loaded in the main process (slow; right for debugging), but planning fails with it"
        yield Finding(WARN, name, text, f"export {name}=1 for nnUNetv2_plan_and_preprocess")
    elif number > usable:
        yield Finding(WARN, name, f"{text}, on {usable} CPUs", f"export {name}={min(usable, affordable)}")
    elif number > affordable:
        yield Finding(WARN, name, f"{text}: many for this RAM", f"export {name}={affordable}")
    else:
        yield Finding(OK, name, text)


def _export(usable: int) -> Iterator[Finding]:
    """Too many processes that write segmentations cost more than they bring: 656 s against 86 s for five cases."""
    name = "nnUNet_def_n_proc"
    value = os.environ.get(name)
    number = int(value) if value is not None else NNUNET_EXPORT_PROCESSES
    text = f"{'not set' if value is None else value}: {number} processes export and score the validation cases"
    lack = f"on two CPUs five cases took 656 s with 8 processes, 86 s with 2; here are {usable} CPUs"
    yield judged(name, text, lack if number > usable else "", f"export {name}={usable}")


def nnunet_folders() -> Iterator[Finding]:
    for variable, content in NNUNET_FOLDERS.items():
        value = os.environ.get(variable)
        if not value:
            yield Finding(FAIL, variable, "not set", f"export {variable}=/path/to/{variable}   (folder for {content})")
        # a shell takes away quotes and blanks (a .env file keeps them) and knows ~ and $HOME
        elif not os.path.exists(value) and (meant := _meant(value)) != value:
            detail = f"{value!r} is taken literally, with its quotes, blanks, ~ or $; there is no such folder"
            yield Finding(FAIL, variable, detail, f"export {variable}={shlex.quote(meant)}")
        elif not os.path.exists(value):
            yield Finding(WARN, variable, f"{value} does not exist", f"mkdir -p {shlex.quote(value)}")
        elif not os.path.isdir(value):
            yield Finding(FAIL, variable, f"{value} is not a folder", f"point {variable} to a folder for {content}")
        elif not _is_writable(value):
            # raw data may well lie on a read-only share
            status = WARN if variable == "nnUNet_raw" else FAIL
            yield Finding(
                status, variable, f"{value} is not writable", f"chmod u+w {shlex.quote(value)}, or another folder"
            )
        else:
            yield Finding(OK, variable, f"{value}, {shutil.disk_usage(value).free / GIB:.0f} GiB free")


def colours() -> Iterator[Finding]:
    """Datasets of colour images that nnU-Net would z-score instead of scaling them."""
    from nnunetv2_ext.data.channels import hint_on_rgb

    raw = os.environ.get("nnUNet_raw")
    for file in sorted(Path(raw).glob("Dataset*/dataset.json")) if raw else ():
        try:
            hint = hint_on_rgb(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError):  # whoever opens the dataset says what is wrong with it
            continue
        if hint is not None:
            what, _, remedy = hint.partition("; ")
            yield Finding(WARN, file.parent.name, what, remedy)


def _meant(value: str) -> str:
    """A folder as a shell would have understood it."""
    return os.path.expanduser(os.path.expandvars(value.strip().strip("'\"").strip()))


def _is_writable(folder: str) -> bool:
    """By writing: permission bits say nothing on network shares and for root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
