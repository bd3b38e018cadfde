"""The encoder apart from the rest of a network: at another rate, or held still."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nnunetv2_ext.core.checkpoint import unwrap

GROUP = "encoder"  # name of the encoder's group in the optimiser


def encoders(network: nn.Module) -> list[nn.Module]:
    """The encoder of each of the plan's networks that ``network`` holds (attribute ``stock_prefixes``).

    Raises:
        ValueError: a network without one.
    """
    inner = unwrap(network)
    prefixes = getattr(inner, "stock_prefixes", ("",))
    found = [getattr(inner.get_submodule(prefix.rstrip(".")), "encoder", None) for prefix in prefixes]
    if any(encoder is None for encoder in found):
        raise ValueError(
            f"the network {type(inner).__name__} has no part called encoder: unset encoder_lr_factor and "
            "freeze_encoder_epochs"
        )
    return [encoder for encoder in found if encoder is not None]


def scale_rate(optimizer: Optimizer, network: nn.Module, factor: float) -> None:
    """Move the encoder's parameters into a group of their own with `lr_scale`, wherever they stand."""
    mine = {id(p) for encoder in encoders(network) for p in encoder.parameters()}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in mine]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
            rest = {key: value for key, value in group.items() if key not in ("params", "name")}
            optimizer.add_param_group({**rest, "params": moved, "name": GROUP, "lr_scale": factor})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def hold_still(optimizer: Optimizer, network: nn.Module, while_true: Callable[[], bool]) -> None:
    """Let the optimiser pass over the encoder as long as ``while_true()``.

    Its gradients are computed and dropped: DDP counts on each of them, and momentum must not gather them.
    """
    parameters = [p for encoder in encoders(network) for p in encoder.parameters()]

    def drop(*_: Any) -> None:
        if while_true():
            for parameter in parameters:
                parameter.grad = None

    optimizer.register_step_pre_hook(drop)
