"""Checks of ``nnUNetv2_ext doctor``: Python, nnU-Net, torch, faiss."""

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from nnunetv2_ext.cli._finding import FAIL, OK, WARN, Finding
from nnunetv2_ext.core.compat import SUPPORTED, nnunet_version, require_supported_nnunet


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
        yield Finding(
            FAIL,
            "nnunetv2",
            "its metadata is there but it cannot be imported",
            "pip install --force-reinstall nnunetv2",
        )
        return
    kind = "editable, " if _is_editable("nnunetv2") else ""
    yield Finding(OK, "nnunetv2", f"{nnunet_version()} (needs {SUPPORTED}), {kind}{folder}")
    here = Path.cwd() / "nnunetv2"
    if (here / "paths.py").is_file() and here.resolve() != folder.resolve():
        yield Finding(
            WARN,
            "nnunetv2",
            "the nnU-Net in this working directory is not the one that runs; edits to it have no effect",
            f"pip install -e {Path.cwd()}   (if you meant to use it)",
        )


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


def faiss() -> Iterator[Finding]:
    """Which faiss is installed and whether it loads; in its own process, as a clash of OpenMP libraries ends it."""
    installed = [f"{name} {version(name)}" for name in ("faiss-gpu", "faiss-cpu") if _is_installed(name)]
    if len(installed) == 2:
        yield Finding(
            WARN,
            "faiss",
            f"{' and '.join(installed)} overwrite each other's files",
            "pip uninstall -y faiss-gpu faiss-cpu, then pip install the one you need",
        )
    code = "import faiss; print(faiss.__version__, getattr(faiss, 'get_num_gpus', int)())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        yield Finding(WARN, "faiss", f"import faiss fails: {reason}", "pip install --force-reinstall faiss-cpu")
        return
    number, gpus = child.stdout.split()[-2:]
    name = " and ".join(installed) or f"{number} (not from PyPI)"
    yield Finding(OK, "faiss", f"{name}, {gpus} GPU(s) usable by it")


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _is_editable(name: str) -> bool:
    text = distribution(name).read_text("direct_url.json")
    return text is not None and bool(json.loads(text).get("dir_info", {}).get("editable", False))
