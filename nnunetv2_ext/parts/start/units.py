"""What becomes of each tensor of a network that starts from somebody's weights: taken, adapted, or left random.

Tensors are matched by name within the plan's own network, wherever that network sits there and here. A network that
holds the plan's network, or several, names where in its attribute ``stock_prefixes``, e.g. ``("backbone.",)``.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.parts.start.source import is_finite

Channels = Literal["repeat", "mean", "first"]
_HEAD = re.compile(r"(^|\.)(seg_layers|segmentation_head)\.")  # of nnU-Net's networks; of segmentation-models-pytorch
NOT_ASKED = "not asked for"
ABSENT = "not in the file"
TORN = "a part of this unit does not fit"


class Asked(NamedTuple):
    """What of a file is wanted.

    Attributes:
        parts: of the network.
        min_share: of the encoder's convolutions; with less the start is refused.
        heads: the segmentation layers too. None: where the file's labels have the names and values of ours.
        channels: how the first convolution's input channels become ours.
    """

    parts: Literal["all", "encoder"] = "all"
    min_share: float = 0.5
    heads: bool | None = None
    channels: Channels = "repeat"


def asked_by(settings: Any, is_cascaded: bool) -> Asked:
    """What the common settings ask for; of a cascade, the first stage's segmentation stands behind the image."""
    channels: Channels = "first" if is_cascaded else settings.init_channels
    return Asked(settings.init_parts, settings.init_min_share, settings.init_heads, channels)


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

    @property
    def is_convolution(self) -> bool:
        """Whether it is the weight of one."""
        return self.target.ndim > 2


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


def compare(
    theirs: Mapping[str, Tensor],
    wanted: Mapping[tuple[str, ...], Tensor],
    transposed: Iterable[int] = (),
    asked: Asked = Asked(),  # noqa: B008  # immutable
) -> list[Row]:
    """What can be loaded, tensor by tensor; nothing is written.

    A convolution and its norm are one unit, which is taken whole or not at all: norms of random convolutions would
    count as loaded.

    Args:
        theirs, wanted: from `within_plan`, and one element of `stock_tensors`.
        transposed: ids of the weights of transposed convolutions, whose kernels are not adapted.
        asked: which part, and how; without ``heads`` the segmentation layers are left out.

    Raises:
        ValueError: a tensor that would be loaded holds NaN or infinity.
    """
    first = next((aliases for aliases, target in wanted.items() if target.ndim > 2), None)
    transposed, rows = set(transposed), []
    for aliases, target in wanted.items():
        name = aliases[0]
        is_head = _HEAD.search(name) is not None
        if (asked.parts == "encoder" and not name.startswith("encoder.")) or (is_head and asked.heads is False):
            rows.append(Row(name, target, None, NOT_ASKED))
            continue
        if is_head and not asked.heads:
            rows.append(Row(name, target, None, "its labels are others, or not known"))
            continue
        source = next((theirs[alias] for alias in aliases if alias in theirs), None)
        channels = asked.channels if aliases == first else None
        rows.append(_row(name, target, source, channels, id(target) not in transposed))
    torn = {unit_of(row.name) for row in rows if row.value is None}
    fit = (row.value is None or unit_of(row.name) not in torn for row in rows)
    return [row if fits else row._replace(value=None, note=TORN) for row, fits in zip(rows, fit)]


def transposed_weights(network: nn.Module) -> set[int]:
    """Ids of the weights of transposed convolutions."""
    return {id(module.weight) for module in network.modules() if isinstance(module, _ConvTransposeNd)}


def _row(name: str, target: Tensor, source: Tensor | None, channels: Channels | None, any_kernel: bool) -> Row:
    if source is None:
        return Row(name, target, None, ABSENT)
    if not is_finite(source):
        raise ValueError(f"its tensor {name} holds NaN or infinite values; use another checkpoint")
    there, here = ("x".join(map(str, tensor.shape)) for tensor in (source, target))
    if _HEAD.search(name) and source.shape[1:] == target.shape[1:] and len(source) != len(target):
        return Row(name, target, None, f"{len(source)} classes there, {len(target)} here")
    value, said = source, []
    if target.ndim > 2 and source.ndim == target.ndim:
        if channels is not None and source.shape[1] != target.shape[1]:
            value, how = of_channels(value, target.shape[1], channels)
            said.append(how)
        if any_kernel and value.shape[2:] != target.shape[2:]:
            value, how = of_kernel(value, target.shape[2:])
            said.append(how)
    if value.shape != target.shape:
        return Row(name, target, None, f"{there} there, {here} here")
    return Row(name, target, value, ", ".join(said))


def of_channels(weight: Tensor, number: int, how: Channels) -> tuple[Tensor, str]:
    """A first convolution's weights ``(O, a, *K)`` for another number of input channels, and what was done.

    ``repeat`` and ``mean`` are scaled by a / number: if all channels show the same, the response is as before.
    """
    there = weight.shape[1]
    if how == "first":
        kept = weight[:, :number]
        further = weight.new_zeros((len(weight), number - kept.shape[1], *weight.shape[2:]))
        if number > there:
            return torch.cat((kept, further), 1), f"{number - there} further input channels start with weight 0"
        return kept, f"the first {number} of {there} input channels"
    share = there / number
    if how == "repeat" and number % there == 0:
        return torch.cat([weight] * (number // there), 1) * share, f"input channels repeated: {there} to {number}"
    mean = weight.mean(1, keepdim=True).expand(-1, number, *weight.shape[2:])
    return mean * share, f"mean of the input channels: {there} to {number}"


def of_kernel(weight: Tensor, size: Sequence[int]) -> tuple[Tensor, str]:
    """A convolution's weights for another kernel, as far as that can be done, and what was done.

    An axis is summed to 1: the response to what is constant along it stays. It grows by zeros around: the response
    stays.
    """
    there = "x".join(map(str, weight.shape[2:]))
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size), 2):
        if new == 1 and old > 1:
            weight = weight.sum(axis, keepdim=True)
        elif new > old and (new - old) % 2 == 0:
            zeros = [0, 0] * (weight.ndim - axis - 1) + [(new - old) // 2] * 2
            weight = nn.functional.pad(weight, zeros)
    return weight, f"kernel {there} to {'x'.join(map(str, size))}"


def unit_of(name: str) -> str:
    """The convolution with its norm that a tensor belongs to, or else its module."""
    module = name.split(".")[:-1]
    return ".".join(module[:-1] if module and module[-1] in ("conv", "norm") else module)


def stage_of(name: str) -> str:
    """The stage of the network that a tensor belongs to: ``encoder.stages.2``, ``encoder.stem``."""
    parts = name.split(".")
    return ".".join(parts[: 3 if len(parts) > 3 and parts[2].isdecimal() else 2])


def describe(rows: Sequence[Row]) -> str:
    """A line per stage of the network and outcome: tensors, values, what happened; the loaded share comes first.

    Of the reasons why tensors of a stage stay random the first is given.
    """
    sizes: dict[tuple[str, bool, str], list[int]] = {}
    reasons: dict[str, str] = {}
    for row in rows:
        stage, note = stage_of(row.name), row.note
        if row.value is None and note != NOT_ASKED:
            if reasons.get(stage, TORN) == TORN:
                reasons[stage] = note
            note = ""
        sizes.setdefault((stage, row.value is None, note), []).append(row.target.numel())
    loaded = sum(sum(some) for (_, stays, _), some in sizes.items() if not stays)
    total = sum(map(sum, sizes.values()))
    lines = [f"{100 * loaded / max(total, 1):.1f} % of the {total:,} values of the plan's network are loaded"]
    for (stage, stays, note), some in sizes.items():
        what = "stays random" if stays else "adapted" if note else "loaded"
        if note == NOT_ASKED:
            what, note = NOT_ASKED, ""
        elif stays:
            note = reasons[stage]
        size = f"{len(some):4d} tensors {sum(some):>12,} values"
        lines.append(f"  {stage:<24} {size}  {what}{f': {note}' if note else ''}")
    return "\n".join(lines)


def gap_in(stages: Mapping[str, int]) -> tuple[str, str] | None:
    """A stage of which nothing is loaded, and a later one that has something; None if there is no such pair.

    Args:
        stages: loaded convolutions by stage, in order.
    """
    empty = next((stage for stage, loaded in stages.items() if not loaded), None)
    names = list(stages)
    later = [] if empty is None else [s for s in names[names.index(empty) :] if stages[s]]
    return (empty, later[0]) if empty and later else None
