"""``nnUNetv2_ext plan-network``: plans with another network, for any trainer and without new preprocessing."""

import argparse
import copy
import inspect
import json
import pydoc
import re
import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from nnunetv2_ext.core.outside import Network, load, methods
from nnunetv2_ext.core.settings import PLANS_KEY

EPILOG = """\
Examples:
  nnUNetv2_ext plan-network -d 50 -network smp:Unet:tu-tf_efficientnet_lite0
  nnUNetv2_ext plan-network -d 50 -network my_package.my_module.MyNet --kwargs '{"width": 32}'

The new plans lie beside the old ones and use the same preprocessed data. A class of your own takes input_channels,
num_classes, deep_supervision and those arguments of the plans that its constructor names. Wherever the model predicts,
the class must be importable.
"""
_ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    known = _networks()
    listed = "; ".join(f"{name}: {network.summary}" for name, network in known.items())
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of a planned dataset")
    parser.add_argument("-network", required=True, metavar="NETWORK", help=f"{listed}; or a class by its dotted name")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans to start from (default: %(default)s)")
    parser.add_argument("-c", default="2d", metavar="CONFIGURATION", help="to change (default: %(default)s)")
    parser.add_argument("-o", metavar="PLANS", help="name of the new plans (default: PLANS_NETWORK)")
    parser.add_argument("--kwargs", metavar="JSON", help="further arguments of the network's constructor")
    parser.add_argument("--force", action="store_true", help="overwrite plans of this name with another network")
    parser.add_argument("--no-timing", action="store_true", help="do not time a step of the old and the new network")
    for option, (text, names) in _options(known).items():
        parser.add_argument(f"--{option}", dest=f"option_{option}", help=f"{', '.join(names)}: {text}")


def _networks() -> dict[str, Network]:
    return {name: network for method in methods().values() for name, network in method.networks.items()}


def _options(known: Mapping[str, Network]) -> dict[str, tuple[str, list[str]]]:
    options: dict[str, tuple[str, list[str]]] = {}
    for name, network in known.items():
        for option, text in network.options.items():
            options.setdefault(option, (text, []))[1].append(name)
    return options


def run(args: argparse.Namespace) -> int:
    """Write the plans, print what they cost against the old ones, and the next command."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    from nnunetv2_ext.core.files import atomic_write_text, read_json
    from nnunetv2_ext.data.preprocessed import open_preprocessed

    found = open_preprocessed(args.d, args.c, args.p, files=False)
    plans = copy.deepcopy(read_json(found.base / f"{args.p}.json"))
    whole = found.configuration.configuration  # with what it inherits
    options = {k.removeprefix("option_"): v for k, v in vars(args).items() if k.startswith("option_") and v is not None}
    architecture = network_architecture(args.network, whole, options, _json(args.kwargs))
    plans["plans_name"] = args.o or f"{args.p}_{_short(args.network)}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", plans["plans_name"]) or "__" in plans["plans_name"]:
        raise ValueError(f"-o {plans['plans_name']} cannot be a plans name: use letters, digits and single underscores")
    plans["configurations"][args.c] = {**plans["configurations"].get(args.c, {}), "architecture": architecture}
    network = _networks().get(args.network.partition(":")[0])
    if network is not None and network.settings:
        plans[PLANS_KEY] = {**plans.get(PLANS_KEY, {}), **network.settings}
    file = found.base / f"{plans['plans_name']}.json"
    if plans["plans_name"] == args.p:
        raise ValueError(f"-o {args.p} are the plans to start from, which stay as they are: give another name")
    if file.is_file() and not args.force and read_json(file) != plans:
        raise ValueError(f"{file} exists with another network or plan: give another name with -o, or --force")

    channels = determine_num_input_channels(found.plans, found.configuration, found.dataset_json)
    heads = found.plans.get_label_manager(found.dataset_json).num_segmentation_heads
    old, new = (_build(a, channels, heads) for a in (whole["architecture"], architecture))
    shape = (2, channels, *whole["patch_size"])
    check_network(new, shape, heads, architecture, args.network)
    costs = _costs((old, new), shape, timing=not args.no_timing)
    atomic_write_text(file, json.dumps(plans, indent=4) + "\n")
    print(_table(costs, whole["patch_size"], (args.p, plans["plans_name"])))
    print(f"wrote {file}; the preprocessed data of {args.p} are used as they are")
    if network is not None and network.settings:
        said = " ".join(f"{key}={value}" for key, value in network.settings.items())
        print(f"trainers of this package train it with {said}, unless you set something else")
    print(f"next: nnUNetv2_train {args.d} {args.c} 0 -p {plans['plans_name']}")
    where = architecture["network_class_name"].partition(".")[0]
    if where not in ("dynamic_network_architectures", "nnunetv2"):
        refused = "; its export to plain nnU-Net is refused" if where == "nnunetv2_ext" else ""
        print(f"whoever predicts with such a model needs {where} installed{refused}")
    return 0


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--kwargs is not JSON ({error}); write it as '{{\"width\": 32}}'") from None
    if not isinstance(value, dict):
        raise ValueError(f"--kwargs is an object of names and values, as '{{\"width\": 32}}'; got {text}")
    return value


def _short(network: str) -> str:
    """What tells the network in a plans name: the class without its package, letters and digits only."""
    name = network if ":" in network else network.rpartition(".")[2]
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def network_architecture(
    network: str, configuration: Mapping[str, Any], options: Mapping[str, str], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``architecture`` of a configuration for a network.

    Args:
        network: a name of a method's networks, maybe with ``:REST``, or the dotted name of a class.
        configuration: nnU-Net's, complete.
        options: as typed, by name.
        kwargs: further arguments of the constructor; they overwrite.

    Raises:
        ValueError: no such network or class, an option it does not know, or a value it refuses.
    """
    known = _networks()
    name, _, rest = network.partition(":")
    if name in known:
        unknown = [option for option in options if option not in known[name].options]
        if unknown:
            has = ", ".join(f"--{o}" for o in known[name].options) or "none"
            raise ValueError(f"the network {name} has no option --{unknown[0]} (it has {has})")
        architecture: dict[str, Any] = load(known[name].architecture)(configuration, rest, options)
        return {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], **kwargs}}
    if options:
        raise ValueError(f"a class of your own takes --kwargs, not --{next(iter(options))}")
    cls = pydoc.locate(network) if "." in network else None
    if not isinstance(cls, type):
        raise ValueError(
            f"there is no network {network!r}: -network takes {', '.join(known)}, or the dotted name of a class that "
            "Python can import here (my_package.my_module.MyNet)"
        )
    takes = inspect.signature(cls).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    own = configuration["architecture"]["arch_kwargs"]
    kept = {key: value for key, value in own.items() if everything or key in takes}
    imports = [key for key in configuration["architecture"]["_kw_requires_import"] if key in kept and key not in kwargs]
    return {"network_class_name": network, "arch_kwargs": {**kept, **kwargs}, "_kw_requires_import": imports}


def _build(architecture: Mapping[str, Any], channels: int, heads: int) -> Any:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    name, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
    try:
        return get_network_from_plans(
            name, kwargs, architecture["_kw_requires_import"], channels, heads, deep_supervision=True
        )
    except Exception as error:  # whatever the constructor of a foreign class raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the network {name} cannot be built from these plans: {reason}") from error


def check_network(network: Any, shape: tuple[int, ...], heads: int, architecture: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless a network does on a batch of the plan's patches what nnU-Net's trainers expect of it.

    With ``decoder.deep_supervision`` it returns the list over the resolutions that the strides of its own architecture
    name, the finest first; without, the logits alone.

    Args:
        network: to be checked.
        shape: ``(B, C, *S)`` of the batch.
        heads: channels of the logits.
        architecture: as it is to stand in the plans.
        name: of the network, for messages.
    """
    import numpy as np
    import torch

    strides = architecture["arch_kwargs"].get("strides")
    if strides is None:
        raise ValueError(
            f"the network {name} takes no strides, from which nnU-Net reads the resolutions of deep supervision: let "
            "its constructor take an argument strides"
        )
    if not hasattr(network, "decoder"):
        raise ValueError(
            f"the network {name} has no attribute decoder, whose deep_supervision nnU-Net switches: add one"
        )
    scales = np.cumprod(np.array(strides), axis=0)[:-1]  # as nnUNetTrainer._get_deep_supervision_scales
    wanted = [(shape[0], heads, *(round(n / s) for n, s in zip(shape[2:], scale))) for scale in scales]
    with torch.no_grad():
        for deep in (False, True):
            network.decoder.deep_supervision = deep
            try:
                outputs = network(torch.zeros(shape))
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                patch = list(shape[2:])
                raise ValueError(f"the network {name} fails on the plan's patch {patch}: {reason}") from error
            got = [tuple(o.shape) for o in outputs] if isinstance(outputs, (list, tuple)) else [tuple(outputs.shape)]
            expected = wanted if deep else wanted[:1]
            if got != expected or isinstance(outputs, (list, tuple)) != deep:
                how = "with" if deep else "without"
                raise ValueError(
                    f"the network {name} returns {got} {how} deep supervision on the plan's patch, nnU-Net needs "
                    f"{expected}: let its outputs follow the strides in arch_kwargs, {[list(s) for s in strides]}"
                )


class _Cost(NamedTuple):
    parameters: int
    saved: int  # bytes that autograd keeps for a sample
    seconds: float | None  # of forward and backward, a sample


def _costs(networks: tuple[Any, Any], shape: tuple[int, ...], timing: bool) -> list[_Cost]:
    """Of both; timed by turns, so that both see the same machine."""
    from nnunetv2_ext.bench.memory import saved_tensor_peak

    parameters = [sum(p.numel() for p in network.parameters()) for network in networks]
    saved = [saved_tensor_peak(partial(_step, network, shape), 1) // shape[0] for network in networks]
    seconds: list[list[float]] = [[], []]
    for _ in range(_ROUNDS if timing else 0):
        for own, network in zip(seconds, networks):
            start = time.perf_counter()
            _step(network, shape)
            own.append((time.perf_counter() - start) / shape[0])
    timed = [median(own) if own else None for own in seconds]
    return [_Cost(*cost) for cost in zip(parameters, saved, timed)]


def _step(network: Any, shape: tuple[int, ...]) -> None:
    import torch

    sum(output.square().mean() for output in network(torch.randn(shape))).backward()
    network.zero_grad(set_to_none=True)


def _table(costs: list[_Cost], patch: list[int], names: tuple[str, str]) -> str:
    lines = [f"on the plan's patch of {' x '.join(map(str, patch))}, on the CPU:",
             f"  {'plans':<40} {'parameters':>12} {'saved MB a sample':>18} {'step s a sample':>16}"]  # fmt: skip
    for cost, name in zip(costs, names):
        seconds = "" if cost.seconds is None else f"{cost.seconds:.3f}"
        lines.append(f"  {name:<40} {cost.parameters:>12,} {cost.saved / 1e6:>18.1f} {seconds:>16}")
    old, new = costs
    step = "" if old.seconds is None or new.seconds is None else f"{new.seconds / old.seconds:.2f}"
    ratios = [new.parameters / old.parameters, new.saved / old.saved]
    lines.append(f"  {'ratio':<40} {ratios[0]:>12.2f} {ratios[1]:>18.2f} {step:>16}")
    return "\n".join(lines)
