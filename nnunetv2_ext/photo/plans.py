"""The plans' architecture of a network of SMP."""

from collections.abc import Mapping
from typing import Any

from nnunetv2_ext.data.channels import SCALED_BY_255
from nnunetv2_ext.photo.network import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, STRIDES, SMPNetwork, import_smp

NETWORK = f"{SMPNetwork.__module__}.{SMPNetwork.__name__}"  # as plans name it
_SMALLEST_PATCH = {"DeepLabV3": 64, "DeepLabV3Plus": 64, "PSPNet": 64}  # their pooling has fixed bins


def architecture(
    configuration: Mapping[str, Any], rest: str = "", options: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """For ``plan-network -network smp:ARCHITECTURE:ENCODER`` and the trainer.

    Where nnU-Net scales all channels of an RGB image by 255, the network normalises as the encoder was trained.

    Args:
        configuration: nnU-Net's 2d configuration.
        rest: ``ARCHITECTURE:ENCODER``.
        options: none are known.

    Raises:
        ValueError: the configuration is not 2-D, the patch is too small, or an unknown architecture or encoder.
    """
    name, _, encoder = rest.partition(":")
    if not name or not encoder:
        raise ValueError(f"a network of SMP is named smp:ARCHITECTURE:ENCODER, as smp:Unet:resnet34; got smp:{rest}")
    patch = list(configuration["patch_size"])
    if len(patch) != 2:
        raise ValueError(f"smp:{name} is a 2-D network and this configuration's patch is {patch}: use -c 2d")
    if name not in ARCHITECTURES:
        raise ValueError(f"there is no network smp:{name}: it takes {', '.join(ARCHITECTURES)}")
    smallest = _SMALLEST_PATCH.get(name, 1)
    if min(patch) < smallest:
        raise ValueError(f"smp:{name} needs patches of at least {smallest} x {smallest}, the plan's is {patch}")
    kwargs: dict[str, Any] = {"architecture": name, "encoder": encoder, "strides": [list(s) for s in STRIDES]}
    if list(configuration["normalization_schemes"]) == [SCALED_BY_255] * 3:
        kwargs["mean"], kwargs["std"] = normalisation(encoder)
    return {"network_class_name": NETWORK, "arch_kwargs": kwargs, "_kw_requires_import": []}


def normalisation(encoder: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of intensities 0..1 that the encoder's published weights were trained with."""
    import_smp()
    import timm

    config = timm.get_pretrained_cfg(encoder.removeprefix("tu-"), allow_unregistered=True)
    mean = IMAGENET_MEAN if config is None else config.mean
    std = IMAGENET_STD if config is None else config.std
    return list(mean), list(std)
