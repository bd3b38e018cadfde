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
from nnunetv2_ext.core.outside import methods


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
