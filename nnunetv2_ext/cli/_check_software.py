"""Checks of ``nnUNetv2_ext doctor``: Python, nnU-Net, torch, and what the methods need."""

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding
from nnunetv2_ext.core.compat import SUPPORTED, nnunet_version, require_supported_nnunet
from nnunetv2_ext.core.outside import load, methods
from nnunetv2_ext.core.processes import NUMBERS, unusable

_RESENC = {"M": 8, "L": 22, "XL": 38}  # sizes of the plans, and GiB of GPUs sold with 9-11, 24 and 40 GB


def python() -> Iterator[Finding]:
    yield Finding(OK, "Python", f"{platform.python_version()} on {platform.system()}, {sys.executable}")


def nnunet() -> Iterator[Finding]:
    """Which nnU-Net runs, from where, and whether the working directory holds another one."""
    try:
        require_supported_nnunet()
    except ValueError as error:
        detail, _, remedy = str(error).partition(" Run: ")
        yield Finding(FAIL, "nnunetv2", detail, remedy)
        return
    folder = nnunet_folder()
    if folder is None:
        detail, remedy = "its metadata is there but it cannot be imported", "pip install --force-reinstall nnunetv2"
        yield Finding(FAIL, "nnunetv2", detail, remedy)
        return
    origin = json.loads(distribution("nnunetv2").read_text("direct_url.json") or "{}")
    kind = "editable, " if origin.get("dir_info", {}).get("editable", False) else ""
    yield Finding(OK, "nnunetv2", f"{nnunet_version()} (needs {SUPPORTED}), {kind}{folder}")
    here = Path.cwd() / "nnunetv2"
    if (here / "paths.py").is_file() and here.resolve() != folder.resolve():
        detail = "the nnU-Net in this working directory is not the one that runs; edits to it have no effect"
        yield Finding(WARN, "nnunetv2", detail, f"pip install -e {Path.cwd()}   (if you meant to use it)")


def nnunet_folder() -> Path | None:
    """Folder of the nnunetv2 that ``import nnunetv2`` gives, without importing it."""
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or spec.origin is None:  # no origin: an empty namespace package is left of a removed installation
        return None
    return Path(spec.origin).parent


def torch() -> Iterator[Finding]:
    try:
        import torch as torch_
    except Exception as error:
        yield Finding(FAIL, "torch", f"import torch fails: {error}", "install torch as https://pytorch.org says")
        return
    build = f"CUDA {torch_.version.cuda}" if torch_.version.cuda else "no CUDA in this build"
    yield Finding(OK, "torch", f"{torch_.__version__}, {build}")


def planners() -> Iterator[Finding]:
    """Residual encoder planners, which nnU-Net's documentation recommends, and the one that fits the GPU."""
    if any(map(unusable, NUMBERS)):  # a finding of the section on the machine; nnU-Net cannot be imported
        return
    try:
        import torch as torch_
        from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as of
    except Exception as error:
        detail = f"nnU-Net's cannot be imported: {type(error).__name__}: {error}"
        yield Finding(WARN, "ResEnc planners", detail, "pip install --upgrade dynamic-network-architectures")
        return
    there = [size for size in _RESENC if hasattr(of, f"nnUNetPlannerResEnc{size}")]
    free = torch_.cuda.get_device_properties(0).total_memory / 2**30 if torch_.cuda.is_available() else 0.0
    size = max((s for s in there if _RESENC[s] <= free), key=_RESENC.__getitem__, default="M")
    detail = f"{', '.join(there)}; for this machine: nnUNetv2_plan_and_preprocess -pl nnUNetPlannerResEnc{size}"
    yield Finding(OK, "ResEnc planners", detail)


def of_methods() -> Iterator[Finding]:
    """What the methods say themselves."""
    for method in methods().values():
        if method.doctor:
            yield from load(method.doctor)()


def requirements() -> Iterator[Finding]:
    """What the methods need on this platform: is it installed, does its version fit, does it load?"""
    from packaging.requirements import Requirement

    for name, method in methods().items():
        parsed = [Requirement(text) for text in method.requires]
        here = [r for r in parsed if r.marker is None or r.marker.evaluate()]
        elsewhere = [r.name for r in parsed if r not in here and _version(r.name)]
        for requirement in here:
            yield from _requirement(requirement, elsewhere, name)


def _requirement(requirement: Any, elsewhere: list[str], method: str) -> Iterator[Finding]:
    """Of one packaging.Requirement; ``elsewhere``: distributions that the method needs on other platforms only."""
    name, version = requirement.name, _version(requirement.name)
    install = f'pip install "{str(requirement).partition(";")[0].strip()}"'
    rivals = [other for other in elsewhere if version is None or _modules(other) & _modules(name)]
    remedy = f"pip uninstall -y {' '.join(sorted([name, *rivals]))}; {install}" if rivals else install
    if version is None:
        found = f", but {' and '.join(rivals)} is" if rivals else ""
        yield Finding(WARN, name, f"not installed{found}; {method} needs it", remedy)
    elif rivals:
        yield Finding(WARN, name, f"{' and '.join([name, *rivals])} overwrite each other's files", remedy)
    elif not requirement.specifier.contains(version, prereleases=True):
        yield Finding(WARN, name, f"{version} is installed; {method} needs {requirement.specifier}", remedy)
    elif (tried := _child("".join(_IMPORT.format(module) for module in sorted(_modules(name)))))[1]:
        remedy = install.replace("install", "install --force-reinstall", 1)
        detail = f"{version} is installed and cannot be imported: {tried[1]}; {method} needs it"
        yield Finding(WARN, name, detail, remedy)
    else:
        yield Finding(OK, name, ", ".join([version, *tried[0], f"for {method}"]))


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _modules(name: str) -> set[str]:
    """Packages that an installed distribution puts at the top of site-packages."""
    return {f.parts[0] for f in distribution(name).files or () if len(f.parts) == 2 and f.name == "__init__.py"}


# a search library of two distributions, with GPUs and without (faiss), tells itself which of them it sees
_IMPORT = """import {0}
if hasattr({0}, "get_num_gpus"):
    print("sees", {0}.get_num_gpus(), "GPU(s)")
"""


def child_error(code: str, *arguments: str) -> str:
    """The last line that a new Python says when it runs ``code``; empty if all goes well."""
    return _child(code, *arguments)[1]


def _child(code: str, *arguments: str) -> tuple[list[str], str]:
    """What a new Python prints when it runs ``code``, and its last line if that fails.

    In a process of its own: what is imported may do anything, and a clash of OpenMP libraries ends it.
    """
    command = [sys.executable, "-c", f"{code}\nprint('done')", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = child.stdout.splitlines()
    if said[-1:] == ["done"]:
        return said[:-1], ""
    return [], (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
