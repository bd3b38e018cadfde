"""The start of a training from a file: what would be loaded, why it is refused, and the loading itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunetv2_ext.core.checkpoint import read, unwrap
from nnunetv2_ext.parts.start.source import Source, facts_of, heads_of, read_source
from nnunetv2_ext.parts.start.units import (
    Asked,
    Row,
    compare,
    describe,
    gap_in,
    stage_of,
    stock_tensors,
    transposed_weights,
    within_plan,
)


class Home(NamedTuple):
    """Where the weights are to live: nnU-Net's configuration, complete, and dataset.json."""

    configuration: Mapping[str, Any]
    dataset_json: Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """What a file would do to a network.

    Attributes:
        rows: of each of the plan's networks that it holds.
        table: the same for people, with the plans compared.
        refusal: why it must not be loaded; empty: it may.
    """

    rows: list[list[Row]]
    table: str
    refusal: str = ""

    def apply(self) -> str:
        """Load the weights and return the table.

        Raises:
            ValueError: it is refused; nothing is written.
        """
        if self.refusal:
            raise ValueError(self.refusal)
        with torch.no_grad():
            for row in (row for rows in self.rows for row in rows):
                if row.value is not None:
                    row.target.copy_(row.value)
        return self.table


def look_at(
    network: nn.Module,
    source: Source,
    home: Home | None = None,
    asked: Asked = Asked(),  # noqa: B008  # immutable
) -> Start:
    """What of a file fits the plan's networks inside ``network``; nothing is written.

    Where ``network`` holds several of them, each gets the same weights. What a method has beside them is untouched.

    Args:
        network: just built.
        source: the file.
        home: ours, to compare the plans and the labels.
        asked: which part, and how.

    Raises:
        ValueError: heads are asked for, and the labels are others, or not known.
    """
    labels = heads_of(home.dataset_json) if home else None
    same = labels is not None and labels == source.labels
    if asked.heads and not same:
        there = "which the file does not name" if source.labels is None else ", ".join(source.labels)
        raise ValueError(
            f"init_heads=true needs the same labels there and here. {source.path} was trained for {there}; this "
            f"dataset has {', '.join(labels or ())}. Unset init_heads"
        )
    if asked.heads is None and same:
        asked = asked._replace(heads=True)
    compared: list[list[Row]] = []
    unused = 0
    for wanted in stock_tensors(network):
        theirs = within_plan(source.weights, wanted)
        try:
            compared.append(compare(theirs, wanted, transposed_weights(unwrap(network)), asked))
        except ValueError as error:
            return Start([], "", f"init_from={source.path}: {error}")
        unused = len(source.weights) - sum(alias in theirs for aliases in wanted for alias in aliases)
    rows = compared[0]
    convolutions = [row for row in rows if row.is_convolution and row.name.startswith("encoder.")]
    convolutions = convolutions or [row for row in rows if row.is_convolution]
    loaded = sum(row.value is not None for row in convolutions)
    table = describe(rows) + f"\n  {loaded} of the {len(convolutions)} convolutions of the encoder are loaded"
    if len(compared) > 1:
        table += f"\n  the same in each of {len(compared)} networks"
    if unused:
        table += f"\n  {unused} tensors of the file belong to nothing here"
    if home:
        table += "\n" + _plans_compared(source, home)
    start = Start(compared, table)
    if why := _refusal(rows, convolutions, loaded, asked.min_share):
        return replace(start, refusal=f"init_from={source.path}: {why}. {_remedy(source, home)}")
    return start


def _refusal(rows: list[Row], convolutions: list[Row], loaded: int, min_share: float) -> str:
    if loaded == 0 or loaded < min_share * len(convolutions):
        left = next((row for row in convolutions if row.value is None), None)
        example = f", e.g. {left.name}: {left.note}" if left else ""
        what = "nothing" if loaded == 0 else f"only {loaded} of {len(convolutions)} convolutions"
        return f"{what} of its encoder fits the network of these plans{example}"
    stages: dict[str, int] = {}
    for row in convolutions:
        stage = stage_of(row.name)
        stages[stage] = stages.get(stage, 0) + (row.value is not None)
    if gap := gap_in(stages):
        return f"{gap[0]} would stay random and {gap[1]} behind it be loaded, which then sees noise"
    values = [row for row in rows if row.value is not None]
    if all(torch.equal(row.target.detach().cpu(), row.value.to(row.target.dtype)) for row in values):  # type: ignore[union-attr]
        return "all its values are those that this network has already, so nothing would change"
    return ""


def _remedy(source: Source, home: Home | None) -> str:
    if source.family:
        return (
            f"It is a network of {source.family}: use a checkpoint of nnU-Net v2, of TotalSegmentator v2 or of "
            "nnssl's ResEnc networks"
        )
    here = len(home.configuration["patch_size"]) if home else 0
    if here and source.dimensions and source.dimensions != here:
        return f"It is {source.dimensions}-D and these plans are {here}-D: use one of the same dimension"
    if source.configuration.get("architecture"):
        return (
            f"`nnUNetv2_ext plan-like {source.path} -d DATASET` writes plans on which it loads; or use a checkpoint of "
            "the same kind of network"
        )
    return "Use one of the same kind of network and dimension, or unset init_from"


def _plans_compared(source: Source, home: Home) -> str:
    there, here = facts_of(source.configuration, source.dataset_json), facts_of(*home)
    width = max(map(len, there.values()))
    lines = [f"  {'plan':<15} {'of the file':<{width}}   ours (* differs)"]
    for name, theirs in there.items():
        mark = "*" if theirs not in ("?", here[name]) else " "
        lines.append(f"{mark} {name:<15} {theirs:<{width}}   {here[name]}")
    return "\n".join(lines)


def require_all_of(network: nn.Module, path: Any) -> None:
    """Raise ValueError, naming what works instead, if nnU-Net's ``-pretrained_weights`` could not load the file.

    nnU-Net asks for every weight of the network but those of the segmentation layers.
    """
    theirs = read(path)["network_weights"]
    for name, tensor in unwrap(network).state_dict().items():
        if ".seg_layers." in name or (name in theirs and theirs[name].shape == tensor.shape):
            continue
        loads = not look_at(network, read_source(path)).refusal
        remedy = f"leave it out and set init_from={path}, which loads what fits"
        remedy = remedy if loads else "use a checkpoint of the same network"
        raise ValueError(f"-pretrained_weights {path} does not fit this network, first at {name}: {remedy}")
