"""The selective scan of state-space models, by mamba-ssm's kernel on a GPU or by mambapy's parallel scan.

h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = C_t h_t + D u_t       (arXiv 2312.00752)
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def require_scan() -> None:
    """Raise ValueError with the command that installs a scan if there is none."""
    if find_spec("mambapy") is None and find_spec("mamba_ssm") is None:
        raise ValueError('VM-UNet needs a selective scan: pip install "nnunetv2-ext[mamba]"')


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Of K sequences, each with a state of its own. The state is float32 or wider, also under autocast.

    Args:
        u, delta: ``(batch, K, D, L)``, delta positive.
        A: ``(K, D, N)``, negative.
        B, C: ``(batch, K, N, L)``.
        D: ``(K, D)``, weight of u itself.

    Returns:
        y ``(batch, K, D, L)``.
    """
    with torch.autocast(u.device.type, enabled=False):
        wide = torch.promote_types(u.dtype, torch.float32)
        u, delta, A, B, C, D = (value.to(wide) for value in (u, delta, A, B, C, D))
        fused = kernel() if u.device.type == "cuda" else None
        if fused is None:
            return _by_mambapy(u, delta, A, B, C, D)
        flat = fused(u.flatten(1, 2), delta.flatten(1, 2), A.flatten(0, 1), B, C, D.flatten())
        return flat.view_as(u)


@cache
def kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's ``selective_scan_fn``; None, with one warning, if it is installed and does not load."""
    if find_spec("mamba_ssm") is None:
        return None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # a missing symbol of another torch or CUDA, say
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"mamba-ssm does not load ({reason}): the slower scan of mambapy takes its place", stacklevel=2)
        return None
    found: Callable[..., Tensor] = selective_scan_fn
    return found


def _by_mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    batch, directions = u.shape[:2]

    def rows(value: Tensor) -> Tensor:  # (batch, K, X, L) to (batch K, L, X)
        return value.flatten(0, 1).transpose(1, 2)

    step = rows(delta)[..., None]  # (batch K, L, D, 1)
    decay = torch.exp(step * A.repeat(batch, 1, 1)[:, None])  # (batch K, L, D, N)
    entering = step * rows(u)[..., None] * rows(B)[:, :, None]
    state = _pscan()(decay, entering)
    y = (state @ rows(C)[..., None])[..., 0]  # (batch K, L, D)
    return y.transpose(1, 2).unflatten(0, (batch, directions)) + D[..., None] * u


def _pscan() -> Any:
    try:
        from mambapy.pscan import pscan
    except ImportError as error:
        raise ValueError(
            f'the scan without a GPU kernel needs mambapy ({error}): pip install "nnunetv2-ext[mamba]"'
        ) from error
    return pscan
