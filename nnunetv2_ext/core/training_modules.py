"""Modules that are trained beside the network: what the hook ``build_training_modules`` returns, checked and served."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed, nn

from nnunetv2_ext.core.checkpoint import first_difference, unwrap


def require_own_parameters(modules: Mapping[str, nn.Module], network: nn.Module, owner: str) -> None:
    """Raise ValueError if a module is not a module, or shares a parameter with the network or another module.

    A shared parameter would be in two groups of the optimiser and be stepped twice.
    """
    seen = {id(p): f"the network's {name}" for name, p in unwrap(network).named_parameters()}
    for name, module in modules.items():
        where = f"{owner}: build_training_modules: {name!r}"
        if not isinstance(module, nn.Module):
            raise ValueError(f"{where} is a {type(module).__name__}, not a torch.nn.Module")
        for key, parameter in module.named_parameters():
            if id(parameter) in seen:
                raise ValueError(
                    f"{where} shares its parameter {key} with {seen[id(parameter)]}; give it parameters of its own, or "
                    "keep a module that only looks at the network out of the list"
                )
            seen[id(parameter)] = f"{key} of {name!r}"


def same_on_all_ranks(module: nn.Module) -> nn.Module:
    """The module with rank 0's weights and synchronised batch statistics, for DDP."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for value in module.state_dict().values():
        distributed.broadcast(value, 0)
    return module


def average_gradients(modules: Iterable[nn.Module]) -> None:
    """Average the modules' gradients over DDP's ranks; a parameter that no rank used keeps none.

    DDP's own wrapper stops at modules that a step does not use or uses in several passes; methods do both.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    if not parameters:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    distributed.all_reduce(used)
    gradients = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters])
    distributed.all_reduce(gradients)
    parts = (gradients / distributed.get_world_size()).split([p.numel() for p in parameters])
    for parameter, part, number in zip(parameters, parts, used.tolist()):
        if number:
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def load_states(modules: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]], owner: str) -> list[str]:
    """Load what a checkpoint holds into the modules.

    Returns:
        Sentences for the log: modules that the checkpoint does not have start fresh, and the reverse.

    Raises:
        ValueError: a module has other weights than the checkpoint's; the first difference is named.
    """
    said = [f"WARNING: the checkpoint has no {name!r}, it starts fresh" for name in modules if name not in states]
    said += [f"WARNING: the checkpoint's {name!r} is not used any more" for name in states if name not in modules]
    for name, state in states.items():
        if (module := modules.get(name)) is None:
            continue
        if difference := first_difference(module.state_dict(), state):
            key, here, there = difference
            raise ValueError(
                f"{owner}: {name!r} of the checkpoint is another module: {key} is {there} there and {here} here; "
                "continue with the settings it was trained with, or start a new training without --c"
            )
        module.load_state_dict(state)
    return said
