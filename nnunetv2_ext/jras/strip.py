"""Weights without patients: plain nnU-Net's out of a J-RAS network, and a J-RAS network with an empty bank.

A guide bank holds image patches of the training cases, and with it every checkpoint and exported zip does.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY
from nnunetv2_ext.jras.bank import PER_GUIDE
from nnunetv2_ext.jras.settings import FIRST_DESIGN

_GUIDES = {f"bank.{name}" for name in PER_GUIDE}


def plain_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Weights of plain nnU-Net's network: what the J-RAS network computes with an empty bank.

    Those of a plain network (`retriever=none`) come back as they are. Further inputs that the first convolution had in
    the first design (`fusion=concat`) are cut off to fit `shapes`, the `stock_shapes`.
    """
    plain = {name.removeprefix("backbone."): v for name, v in weights.items() if name.startswith("backbone.")}
    for name, value in plain.items():
        inputs = shapes.get(name, ())[1:2]
        if inputs and value.shape[1:2] > inputs:
            plain[name] = value[:, : inputs[0]].clone()
    return plain or dict(weights)


def without_bank(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint without guides, their cases' names and the optimiser's state; it predicts on the plain path.

    Raises:
        ValueError: trained without a bank (`retriever=none`), or a model of the first design.
    """
    return _for_prediction(checkpoint, "strip-bank", empty_bank(checkpoint["network_weights"]))


def empty_bank(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same J-RAS network with a bank of no guides."""
    # clone: a slice would be written with the storage it is a part of
    return {name: value[:0].clone() if name in _GUIDES else value for name, value in weights.items()}


def without_groups(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint with the guides but without the numbers of their subjects, their cases' names and places.

    Raises:
        ValueError: as `without_bank`.
    """
    weights = checkpoint["network_weights"].items()
    blank = {name: torch.zeros_like(value) if name == "bank.groups" else value for name, value in weights}
    return _for_prediction(checkpoint, "blank-groups", blank)


def _for_prediction(checkpoint: Mapping[str, Any], option: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    if "null_logit" in weights:
        raise ValueError(FIRST_DESIGN)
    if "bank.images" not in weights:
        raise ValueError(f"this model has no guide bank (jras.retriever=none); export it without --{option}")
    left_out = (EXTENSION_KEY, "optimizer_state", "grad_scaler_state")
    return {name: value for name, value in checkpoint.items() if name not in left_out} | {"network_weights": weights}
