"""The plans' architecture of Med2DSegNet."""

from collections.abc import Mapping
from typing import Any

from nnunetv2_ext.med2d.network import BLOCKS, WIDTHS, Med2DSegNet

NETWORK = f"{Med2DSegNet.__module__}.{Med2DSegNet.__name__}"  # as plans name it


def architecture(
    configuration: Mapping[str, Any], rest: str = "", options: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """For ``plan-network -network med2d`` and the trainer: as many of the six stages as the plan's patch can take.

    Args:
        configuration: nnU-Net's 2d configuration.
        rest: what stood behind ``med2d:``; nothing is known there.
        options: ``width``, a factor of all widths (1), and ``gap``.

    Raises:
        ValueError: the configuration is not 2-D, has fewer than three stages, or its patch does not divide; or a value.
    """
    options = options or {}
    patch = list(configuration["patch_size"])
    if rest:
        raise ValueError(f"med2d has no variants, got med2d:{rest}; its options are --width and --gap")
    if len(patch) != 2:
        raise ValueError(f"Med2DSegNet is a 2-D network and this configuration's patch is {patch}: use -c 2d")
    planned = len(configuration["architecture"]["arch_kwargs"]["strides"])
    if planned < 3:
        raise ValueError(f"Med2DSegNet needs plans with at least 3 stages, these have {planned}")
    stages = min(planned, len(WIDTHS))
    divisor = 2 ** (stages - 1)
    if any(n % divisor for n in patch):
        nearest = [max(divisor, round(n / divisor) * divisor) for n in patch]
        raise ValueError(
            f"the patch {patch} is not divisible by {divisor}, the product of the network's strides; the nearest is "
            f"{nearest}: set patch_size in the plans"
        )
    factor = _width(options.get("width", "1"))
    kwargs = {
        "features_per_stage": [max(8, round(w * factor)) for w in WIDTHS[:stages]],
        "n_blocks_per_stage": list(BLOCKS[:stages]),
        "strides": [[1, 1]] + [[2, 2]] * (stages - 1),
        "gap": options.get("gap", "gate"),
    }
    Med2DSegNet(1, 2, **kwargs)  # type: ignore[arg-type]  # refuses a wrong gap
    return {"network_class_name": NETWORK, "arch_kwargs": kwargs, "_kw_requires_import": []}


def _width(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100:
        raise ValueError(f"--width is a factor of all widths, such as 0.5 or 2; got {text!r}")
    return value
