"""One of a RADA model's networks as plain nnU-Net's weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MEMBER = re.compile(r"members\.(\d+)\.network\.")
_GATE = re.compile(r"members\.\d+\.head\.gate")


def export_network(network_weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights of one network that plain nnU-Net's network of the same plans loads.

    A gate of exactly 0 takes the semantic head out of the sum, so the exported network computes the same logits.

    Args:
        network_weights: of a `RADANet`.
        name: `net1`, `net2`, `net3`; with one network `student` as well.

    Raises:
        ValueError: not a RADA model, no such network, or its semantics are active.
    """
    number = len({match[1] for key in network_weights if (match := _MEMBER.match(key))})
    names = [f"net{k}" for k in range(1, number + 1)]
    if not names:
        raise ValueError("these weights are not those of a RADA model; export a model trained with nnUNetTrainerRADA")
    if name == "student" and len(names) == 1:
        name = "net1"
    if name not in names:
        several = f"a RADA model has {len(names)} networks, not one" if name == "student" else f"there is no {name!r}"
        raise ValueError(f"{several}; choose with --weights {'|'.join(names)}")
    k = names.index(name)
    gate = float(network_weights.get(f"members.{k}.head.gate", torch.zeros(())))
    if gate != 0:
        raise ValueError(
            f"the semantic head of {name} is active (gate {gate:.4g}): it depends on the image, so plain nnU-Net "
            "cannot compute it. Predict with nnUNetTrainerRADA and this package, or export with --drop-semantics, "
            "which changes the predictions: validate the exported model"
        )
    prefix = f"members.{k}.network."
    return {key.removeprefix(prefix): value for key, value in network_weights.items() if key.startswith(prefix)}


def drop_semantics(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with every gate closed: each network computes what plain nnU-Net computes with its weights.

    Raises:
        ValueError: there is no semantic head.
    """
    weights = checkpoint["network_weights"]
    gates = {key: torch.zeros_like(value) for key, value in weights.items() if _GATE.fullmatch(key)}
    if not gates:
        raise ValueError("this model has no semantic heads (rada.semantics=off); export it without --drop-semantics")
    return checkpoint | {"network_weights": weights | gates}
