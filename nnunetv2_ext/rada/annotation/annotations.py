"""What is annotated in every case of a preprocessed configuration, cached beside nnU-Net's own files."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.cache import CaseCache
from nnunetv2_ext.data.preprocessed import Preprocessed
from nnunetv2_ext.rada.annotation.cases import cache_root
from nnunetv2_ext.rada.annotation.planes import OUTSIDE, THRESHOLD, Array, Planes, find_planes, scribbled

_VERSION = 2


@dataclass(frozen=True)
class Annotation:
    """Annotation of one label volume."""

    planes: Planes
    share: float  # annotated, of all voxels
    loose: int  # number of labelled voxels on no plane (scribbles)
    values: tuple[int, ...]  # that occur, sorted, without ignore and -1

    @property
    def labelled(self) -> bool:
        """Whether anything is annotated."""
        return bool(self.values)

    def describe(self) -> str:
        """For the log, e.g. ``axis0 [57]  axis1 [88]  axis2 [31,32]  4.1 % annotated``."""
        if not self.labelled:
            return "unlabelled"
        text = f"{self.planes.describe()}  {100 * self.share:.2g} % annotated"
        if not self.planes:
            return f"{text}; scribbles only: supervises all three networks, as with plain ignore labels"
        return text + (f"; {self.loose} labelled voxels on no plane" if self.loose else "")


def survey_label(label: Array, ignore: int) -> Annotation:
    """The annotation of one (X, Y, Z) label."""
    planes = find_planes(label, ignore)
    values = tuple(int(v) for v in np.unique(label) if v not in (ignore, OUTSIDE))
    share = float((label != ignore).mean())
    return Annotation(planes, share, int(scribbled(label, ignore, planes).sum()), values)


def survey_labels(
    data: Preprocessed, kind: str, states: Mapping[str, Any], read: Callable[[str], Array], ignore: int
) -> dict[str, Annotation]:
    """`survey_label` of ``read(case)`` for each case, kept beside the configuration's folder.

    Args:
        data: The configuration.
        kind: ``planes`` of the preprocessed labels or ``raw_planes``.
        states: Case to the state of the files that its label comes from.
        read: Gives a case's (X, Y, Z) label.
        ignore: The ignore label.
    """
    transposed = [int(axis) for axis in data.plans.transpose_forward]
    parameters = {"version": _VERSION, "threshold": THRESHOLD, "ignore": ignore, "transposed": transposed}
    parameters["data"] = data.configuration.data_identifier
    cache = CaseCache(cache_root(data.base), kind, parameters, ".json")
    found: dict[str, Annotation] = {}
    for case, state in progress_bar(list(states.items()), f"finding {kind.replace('_', ' ')}"):
        known = cache.read(case, state, _load)
        found[case] = survey_label(read(case), ignore) if known is None else known
        if known is None:
            cache.write(case, state, json.dumps(asdict(found[case])).encode())
    return found


def require_annotations(annotations: Mapping[str, Annotation], label_values: Collection[int]) -> None:
    """Raise ValueError if no case is annotated, or if a label holds a value that dataset.json does not declare."""
    for case, annotation in annotations.items():
        unknown = [v for v in annotation.values if v not in label_values]
        if unknown:
            raise ValueError(
                f"the label of {case} holds {unknown[0]}, which dataset.json does not declare (it has "
                f"{', '.join(map(str, sorted(label_values)))}): correct the label or dataset.json and preprocess again"
            )
    if not any(a.labelled for a in annotations.values()):
        raise ValueError(
            f"none of the {len(annotations)} cases has any annotation: label whole slices in some of them "
            "(nnUNetv2_ext check-planes shows what is found), then preprocess again"
        )


def log_lines(annotations: Mapping[str, Annotation]) -> list[str]:
    """One line per labelled case, then totals and what they mean for the three views."""
    labelled = {case: a for case, a in annotations.items() if a.labelled}
    width = max(map(len, labelled), default=0)
    lines = [f"{case:<{width}}  {a.describe()}" for case, a in labelled.items()]
    counts = [f"axis{axis} {sum(len(a.planes.indices[axis]) for a in labelled.values())}" for axis in range(3)]
    cases = f"{len(labelled)} labelled and {len(annotations) - len(labelled)} unlabelled cases"
    return [*lines, f"total: {cases}; planes {', '.join(counts)}"]


def warnings(annotations: Mapping[str, Annotation], labels: Mapping[str, Any]) -> list[str]:
    """What a user should know before training: axes and classes that nobody drew, scribbles, no unlabelled case."""
    found = []
    labelled = [a for a in annotations.values() if a.labelled]
    axes = sorted({axis for a in labelled for axis in a.planes.axes})
    if not axes:
        found.append("no case has an annotated plane: scribbles supervise all three networks, view disparity is off")
    elif len(axes) == 1:
        found.append(f"planes on axis {axes[0]} only: all three networks see the same planes, view disparity is off")
    elif len(axes) == 2:
        found.append(f"planes on axes {axes[0]} and {axes[1]} only: one network sees both, two see one")
    values = {v for a in labelled for v in a.values}
    missing = [name for name, v in labels.items() if name != "ignore" and int(v) not in values]
    if missing:
        found.append(f"nowhere annotated: {', '.join(missing)}; it stays declared, but nothing teaches it")
    if len(labelled) == len(annotations):
        found.append("no unlabelled case: the ignored voxels of the labelled ones serve for co-training")
    loose = [case for case, a in annotations.items() if a.loose]
    if loose:
        found.append(
            f"{len(loose)} cases have labelled voxels on no plane (e.g. {loose[0]}): they supervise all networks"
        )
    return [f"WARNING: {text}" for text in found]


def _load(file: Path) -> Annotation:
    entry = json.loads(file.read_text(encoding="utf-8"))
    return Annotation(Planes.of(entry["planes"]["indices"]), entry["share"], entry["loose"], tuple(entry["values"]))
