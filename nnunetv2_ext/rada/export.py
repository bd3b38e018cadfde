"""One of a RADA model's networks as plain nnU-Net's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MEMBER = re.compile(r"members\.(\d+)\.network\.")


def number_of_networks(network_weights: Mapping[str, Tensor]) -> int:
    """How many networks the weights of a `RADANet` hold.

    Raises:
        ValueError: the weights are not a RADANet's.
    """
    found = {int(match[1]) for name in network_weights if (match := _MEMBER.match(name))}
    if not found:
        raise ValueError("these weights are not those of a RADA model; export a model trained with nnUNetTrainerRADA")
    return len(found)


def index_of_network(name: str, number: int) -> int:
    """Index from 0 of the network a user names `net1`, `net2`, `net3`; with one network `student` as well.

    Raises:
        ValueError: no such network.
    """
    names = [f"net{k + 1}" for k in range(number)]
    if name in names:
        return names.index(name)
    if name == "student" and number == 1:
        return 0
    several = f"a RADA model has {number} networks, not one" if name == "student" else f"there is no {name!r}"
    raise ValueError(f"{several}; choose with --weights {'|'.join(names)}")


def gate_of_member(network_weights: Mapping[str, Tensor], k: int) -> float:
    """The gate of network k's semantic head; 0.0 without one."""
    gate = network_weights.get(f"members.{k}.head.gate")
    return 0.0 if gate is None else float(gate)


def export_member(network_weights: Mapping[str, Tensor], k: int, drop_semantics: bool = False) -> dict[str, Tensor]:
    """Weights of network k that plain nnU-Net's network of the same plans loads.

    A gate of exactly 0 takes the semantic head out of the sum, so the exported network computes the same logits.

    Args:
        network_weights: of a `RADANet`.
        k: from 0.
        drop_semantics: leave out an active semantic head, which changes the predictions.

    Raises:
        ValueError: no network k, or its semantics are active.
    """
    number = number_of_networks(network_weights)
    if not 0 <= k < number:
        raise ValueError(f"there is no network {k + 1}; this model has {number}")
    gate = gate_of_member(network_weights, k)
    if gate != 0 and not drop_semantics:
        raise ValueError(
            f"the semantic head of net{k + 1} is active (gate {gate:.4g}): it depends on the image, so plain nnU-Net "
            "cannot compute it. Predict with nnUNetTrainerRADA and this package, or export with --drop-semantics, "
            "which changes the predictions: validate the exported model"
        )
    prefix = f"members.{k}.network."
    return {name.removeprefix(prefix): value for name, value in network_weights.items() if name.startswith(prefix)}


def export_network(network_weights: Mapping[str, Tensor], name: str, drop_semantics: bool = False) -> dict[str, Tensor]:
    """`export_member` by the name a user gives, see `index_of_network`."""
    return export_member(network_weights, index_of_network(name, number_of_networks(network_weights)), drop_semantics)


def without_semantics(network_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with every gate closed: each network computes what plain nnU-Net computes with its weights.

    Raises:
        ValueError: there is no semantic head.
    """
    gates = [name for name in network_weights if re.fullmatch(r"members\.\d+\.head\.gate", name)]
    if not gates:
        raise ValueError("this model has no semantic heads (rada.semantics=off); export it without --drop-semantics")
    return {name: torch.zeros_like(value) if name in gates else value for name, value in network_weights.items()}


def drop_semantics(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A RADA checkpoint `without_semantics`: what `export --drop-semantics` applies."""
    return checkpoint | {"network_weights": without_semantics(checkpoint["network_weights"])}
