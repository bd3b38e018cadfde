"""Weights of a model that exists for the start of a training: what fits is loaded, and a table says what was done.

Tensors are matched by name within the plan's own network, wherever that network sits there and here. A network that
holds the plan's network, or several, names where in its attribute ``stock_prefixes``, e.g. ``("backbone.",)``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunetv2_ext.core.checkpoint import read, unwrap

_LFS_POINTER = b"version https://git-lfs"


class Row(NamedTuple):
    """What becomes of one tensor of our network.

    Attributes:
        name: ours, within the plan's network; the first of its names.
        target: the parameter or buffer itself.
        value: what is loaded, of the target's shape; None: it stays as it is.
        note: how the value was made, or why there is none; empty for a plain copy.
    """

    name: str
    target: Tensor
    value: Tensor | None
    note: str = ""


def stock_tensors(network: nn.Module) -> list[dict[tuple[str, ...], Tensor]]:
    """Tensors of each of the plan's networks that ``network`` holds, by all their names within it.

    nnU-Net's networks list a tensor of the encoder under up to four names.
    """
    state = unwrap(network).state_dict(keep_vars=True)
    found = []
    for prefix in getattr(unwrap(network), "stock_prefixes", ("",)):
        names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            if name.startswith(prefix):
                names.setdefault(id(tensor), []).append(name.removeprefix(prefix))
        found.append({tuple(aliases): state[prefix + aliases[0]] for aliases in names.values()})
    return found


def within_plan(theirs: Mapping[str, Tensor], wanted: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """Their tensors by name within the plan's network.

    What stands before these names there (``module.``, ``_orig_mod.``, the place inside a method's network) is the
    prefix under which most of the wanted names exist; of several the first.
    """
    # by last components, so that not every pair of names is compared
    endings: dict[str, list[str]] = {}
    for name in (alias for aliases in wanted for alias in aliases):
        endings.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    prefixes = Counter(
        key.removesuffix(name)
        for key in theirs
        for name in endings.get(".".join(key.split(".")[-2:]), ())
        if key == name or key.endswith(f".{name}")
    )
    prefix = max(prefixes, key=prefixes.__getitem__, default="")
    return {key.removeprefix(prefix): value for key, value in theirs.items() if key.startswith(prefix)}


def compare(theirs: Mapping[str, Tensor], wanted: Mapping[tuple[str, ...], Tensor]) -> list[Row]:
    """What can be loaded, tensor by tensor; nothing is written.

    A convolution and its norm are one unit, which is taken whole or not at all. Further input channels of the first
    convolution get weights of zero. A segmentation layer for another number of classes stays random.

    Args:
        theirs, wanted: from `within_plan`, and one element of `stock_tensors`.

    Raises:
        ValueError: a tensor that would be loaded holds NaN or infinity.
    """
    first = next((aliases for aliases, target in wanted.items() if target.ndim > 2), None)
    rows = []
    for aliases, target in wanted.items():
        source = next((theirs[alias] for alias in aliases if alias in theirs), None)
        rows.append(_row(aliases[0], target, source, is_first=aliases == first))
    torn = {_unit(row.name) for row in rows if row.value is None}
    note = "a part of this unit does not fit"
    fit = (row.value is None or _unit(row.name) not in torn for row in rows)
    return [row if fits else row._replace(value=None, note=note) for row, fits in zip(rows, fit)]


def _row(name: str, target: Tensor, source: Tensor | None, is_first: bool) -> Row:
    if source is None:
        return Row(name, target, None, "not in the file")
    if not bool(torch.isfinite(source).all()):
        raise ValueError(f"its tensor {name} holds NaN or infinite values; use another checkpoint")
    if source.shape == target.shape:
        return Row(name, target, source)
    there, here = ("x".join(map(str, tensor.shape)) for tensor in (source, target))
    missing = target.shape[1] - source.shape[1] if is_first and source.ndim == target.ndim else 0
    if missing > 0 and (source.shape[0], *source.shape[2:]) == (target.shape[0], *target.shape[2:]):
        zeros = source.new_zeros((len(source), missing, *source.shape[2:]))
        return Row(name, target, torch.cat((source, zeros), 1), f"{missing} further input channels start with weight 0")
    if ".seg_layers." in name and source.shape[1:] == target.shape[1:]:
        there, here = f"{len(source)} classes", str(len(target))
    return Row(name, target, None, f"{there} there, {here} here")


def _unit(name: str) -> str:
    """The convolution with its norm that a tensor belongs to, or else its module."""
    module = name.split(".")[:-1]
    return ".".join(module[:-1] if module and module[-1] in ("conv", "norm") else module)


def describe(rows: Sequence[Row]) -> str:
    """A line per part of the network and outcome: tensors, values, what happened; the loaded share comes first."""
    sizes: dict[tuple[str, bool, str], list[int]] = {}
    for row in rows:
        outcome = (".".join(row.name.split(".")[:2]), row.value is None, row.note)
        sizes.setdefault(outcome, []).append(row.target.numel())
    loaded = sum(sum(some) for (_, stays, _), some in sizes.items() if not stays)
    total = sum(map(sum, sizes.values()))
    lines = [f"{100 * loaded / max(total, 1):.1f} % of the {total:,} values of the plan's network are loaded"]
    for (part, stays, note), some in sizes.items():
        what = "stays random" if stays else "adapted" if note else "loaded"
        size = f"{len(some):4d} tensors {sum(some):>12,} values"
        lines.append(f"  {part:<22} {size}  {what}{f': {note}' if note else ''}")
    return "\n".join(lines)


def start_from(network: nn.Module, path: Path) -> str:
    """Load what fits of a checkpoint of nnU-Net or of ours into the plan's network inside ``network``.

    Where ``network`` holds several of them, each gets the same weights. What a method has beside them is untouched.

    Returns:
        The table of what was done.

    Raises:
        ValueError: the file cannot be used; or nothing of its network, or nothing of its encoder, fits.
    """
    theirs = {name: value for name, value in _read(path)["network_weights"].items() if isinstance(value, Tensor)}
    compared: list[list[Row]] = []
    for wanted in stock_tensors(network):
        mapped = within_plan(theirs, wanted)
        try:
            compared.append(compare(mapped, wanted))
        except ValueError as error:
            raise ValueError(f"init_from={path}: {error}") from error
        # a decoder without its encoder is as good as nothing
        encoder = [row for row in compared[-1] if row.name.startswith("encoder.")] or compared[-1]
        if all(row.value is None for row in encoder):
            example = next((row for row in encoder if row.target.ndim > 2), encoder[0])
            raise ValueError(
                f"init_from={path}: nothing of its encoder fits the network of these plans, e.g. {example.name}: "
                f"{example.note}. Use one of the same kind of network and dimension, or unset init_from"
            )
    with torch.no_grad():
        for row in (row for rows in compared for row in rows):
            if row.value is not None:
                row.target.copy_(row.value)
    text = describe(compared[0])
    if len(compared) > 1:
        text += f"\n  the same in each of {len(compared)} networks"
    unused = len(theirs) - sum(alias in mapped for aliases in wanted for alias in aliases)
    if unused:
        text += f"\n  {unused} tensors of the file belong to nothing here"
    return text


def require_all_of(network: nn.Module, path: Path) -> None:
    """Raise ValueError, naming what works instead, if nnU-Net's ``-pretrained_weights`` could not load the file.

    nnU-Net asks for every weight of the network but those of the segmentation layers.
    """
    theirs = read(path)["network_weights"]
    for name, tensor in unwrap(network).state_dict().items():
        if ".seg_layers." in name or (name in theirs and theirs[name].shape == tensor.shape):
            continue
        try:
            start_from(network, path)  # its random weights are of no use any more
            remedy = f"leave it out and set init_from={path}, which loads what fits"
        except ValueError:
            remedy = "use a checkpoint of the same network"
        raise ValueError(f"-pretrained_weights {path} does not fit this network, first at {name}: {remedy}")


def _read(path: Path) -> dict[str, Any]:
    """The checkpoint; what people name instead of one is told apart."""
    if str(path).startswith(("http:/", "https:/")):
        raise ValueError(f"init_from={path} is an address; download the file and name its place on this machine")
    if path.is_dir():
        inside = sorted(p.relative_to(path) for p in [*path.glob("*.pth"), *path.glob("fold_*/*.pth")])
        which = f"name one of its files: {', '.join(map(str, inside))}" if inside else "name a checkpoint file"
        raise ValueError(f"init_from={path} is a folder; {which}")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(f"init_from={path} is a pointer of Git LFS, not the file itself; run `git lfs pull`")
    return read(path)
