"""The plans' architecture of VM-UNet."""

from collections.abc import Mapping
from typing import Any

from nnunetv2_ext.mambasea.scan import require_scan
from nnunetv2_ext.mambasea.vmunet import DIVISOR, STRIDES, VMUNet

NETWORK = f"{VMUNet.__module__}.{VMUNet.__name__}"  # as plans name it


def architecture(
    configuration: Mapping[str, Any], rest: str = "", options: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """For ``plan-network -network vmunet``.

    Args:
        configuration: nnU-Net's 2d configuration.
        rest: what stood behind ``vmunet:``; nothing is known there.
        options: none are known.

    Raises:
        ValueError: the configuration is not 2-D, its patch is below 32, or no scan is installed.
    """
    patch = list(configuration["patch_size"])
    if rest:
        raise ValueError(f"vmunet has no variants, got vmunet:{rest}; --kwargs sets widths and depths")
    if len(patch) != 2:
        raise ValueError(f"VM-UNet is a 2-D network and this configuration's patch is {patch}: use -c 2d")
    if min(patch) < DIVISOR:
        raise ValueError(
            f"VM-UNet needs patches of at least {DIVISOR} x {DIVISOR}, the plan's is {patch}: set patch_size in the "
            "plans"
        )
    require_scan()
    kwargs = {"strides": [list(s) for s in STRIDES]}
    return {"network_class_name": NETWORK, "arch_kwargs": kwargs, "_kw_requires_import": []}
