"""Which nnU-Net releases this package works with, and what is read from their code."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ">=2.8,<3"  # 2.8.0 is the first release that reads nnUNet_extTrainer
_FIRST, _BEFORE = (2, 8), (3, 0)


def nnunet_version() -> str | None:
    """Version of the installed nnunetv2 as its metadata states it, or None if there is none."""
    try:
        return version("nnunetv2")
    except PackageNotFoundError:
        return None


def is_supported(nnunet: str) -> bool:
    """Whether version ``nnunet``, e.g. ``"2.8.1"``, lies in :data:`SUPPORTED` (pre-releases count as their release)."""
    match = re.match(r"(\d+)\.(\d+)", nnunet)
    return match is not None and _FIRST <= (int(match[1]), int(match[2])) < _BEFORE


def require_supported_nnunet() -> None:
    """Raise ValueError with the command that fixes it if nnunetv2 is missing or not in :data:`SUPPORTED`."""
    found = nnunet_version()
    if found is None or not is_supported(found):
        what = "nnunetv2 is not installed" if found is None else f"nnunetv2 {found} is not supported"
        raise ValueError(f'{what}: nnunetv2-ext needs {SUPPORTED}. Run: pip install "nnunetv2{SUPPORTED}"')


def pretrained_weights_file() -> str | None:
    """The file of ``nnUNetv2_train -pretrained_weights`` that nnU-Net will load next, read from its waiting call.

    nnU-Net tells its trainers nothing of the option and ends in an AssertionError where the file does not fit.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "maybe_load_checkpoint":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("pretrained_weights_file")


CLIP_NORM = 12.0  # nnUNetTrainer's


def clip_norm_in(train_step: Callable) -> float | None:
    """The norm at which a trainer's ``train_step`` clips gradients, from its source; None if it does not say.

    nnU-Net's trainers write the number into that call and nowhere else (12, Primus 1).
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(train_step)))
    except (OSError, TypeError, SyntaxError):
        return None
    norms = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if getattr(call.func, "attr", getattr(call.func, "id", "")) == "clip_grad_norm_":
            given = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "max_norm")]
            norms |= {node.value if isinstance(node, ast.Constant) else None for node in given}
    norm = norms.pop() if len(norms) == 1 else None
    return float(norm) if isinstance(norm, (int, float)) else None
