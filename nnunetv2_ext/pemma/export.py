"""What a model is handed on as: the base as it was, or with the convolutions' changes folded in."""

from collections.abc import Mapping
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.pemma.network import convolutions, key_of
from nnunetv2_ext.pemma.training import PEMMATraining

_PER_CHANNEL = ("normalization_schemes", "use_mask_for_norm")


def described_as_base(described: Mapping[str, Any]) -> dict[str, Any]:
    """``plans`` and ``dataset_json`` with the old channels only."""
    plans, dataset_json = described["plans"], described["dataset_json"]
    old = plans[PLANS_KEY]["pemma"]["base_channels"]
    configurations = {
        name: {key: value[:old] if key in _PER_CHANNEL else value for key, value in configuration.items()}
        for name, configuration in plans["configurations"].items()
    }
    intensities = plans["foreground_intensity_properties_per_channel"]
    kept = {key: value for key, value in intensities.items() if int(key) < old}
    plans = {**plans, "configurations": configurations, "foreground_intensity_properties_per_channel": kept}
    key = "channel_names" if "channel_names" in dataset_json else "modality"
    names = {number: name for number, name in dataset_json[key].items() if int(number) < old}
    return {**described, "plans": plans, "dataset_json": {**dataset_json, key: names}}


def described_as_merged(described: Mapping[str, Any]) -> dict[str, Any]:
    """``plans`` that name a network without changes of convolutions and segmentation layers."""
    plans = described["plans"]
    block = plans[PLANS_KEY]
    merged = {**block, "pemma": {**block["pemma"], "rank": 0, "train_heads": False}}
    return {**described, "plans": {**plans, PLANS_KEY: merged}}


def merged(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with ``W + B A`` and ``V + V'`` in the base's place; the stem stays.

    Raises:
        ValueError: nothing can be folded in, or no stem would be left.
    """
    init = checkpoint["init_args"]
    plans, names = PlansManager(init["plans"]), channel_names(init["dataset_json"])
    heads = plans.get_label_manager(init["dataset_json"]).num_segmentation_heads
    network: Any = PEMMATraining.build_network_architecture(
        plans, plans.get_configuration(init["configuration"]), len(names), heads
    )
    parts = network.adapters
    if "stem" not in parts or not {"convs", "heads"} & set(parts):
        raise ValueError(
            "this model has no change of convolutions or segmentation layers beside a stem (pemma.rank, "
            "pemma.train_heads, pemma.stem): export it without --merged"
        )
    network.load_state_dict(checkpoint["network_weights"])
    with torch.no_grad():
        for name, convolution in convolutions(network.base).items() if "convs" in parts else ():
            convolution.weight.copy_(parts["convs"][key_of(name)].merged(convolution.weight))
        for number, layer in enumerate(network.decoder.seg_layers) if "heads" in parts else ():
            layer.weight.add_(parts["heads"][str(number)].v.weight)
            layer.bias.add_(parts["heads"][str(number)].v.bias)
    gone = ("adapters.convs.", "adapters.heads.")
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(gone)}
    return {**checkpoint, "network_weights": weights}
