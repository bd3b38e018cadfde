"""What is annotated in every case of a preprocessed configuration, cached beside nnU-Net's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.rada.annotation.planes import (
    OUTSIDE,
    THRESHOLD,
    Array,
    Planes,
    find_planes,
    scribbled,
)

_VERSION = 1


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


def survey_cases(
    folder: str | os.PathLike[str],
    identifiers: Iterable[str],
    ignore: int,
    cache_file: str | os.PathLike[str] | None = None,
) -> dict[str, Annotation]:
    """The annotation of cases of a preprocessed configuration folder, in sorted order.

    Args:
        folder: ``nnUNet_preprocessed/<Dataset>/<data_identifier>``.
        identifiers: Cases.
        ignore: The ignore label.
        cache_file: See `cache_path`; used for cases whose label file kept its size and time. None: no cache.

    Raises:
        ValueError: a case is missing or 2-D.
    """
    cases = sorted(set(identifiers))
    dataset = infer_dataset_class(str(folder))(str(folder), list(cases))

    def read(case: str) -> Array:
        try:
            _, seg, _, _ = dataset.load_case(case)
            return np.asarray(seg[0])
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{case} cannot be read from {folder} ({error}): preprocess the dataset again") from error

    files = {case: _label_file(Path(folder), case) for case in cases}
    return survey_files(files, read, ignore, cache_file, "finding planes")


def survey_files(
    files: Mapping[str, Path],
    read: Callable[[str], Array],
    ignore: int,
    cache_file: str | os.PathLike[str] | None,
    title: str,
    key: str = "",
) -> dict[str, Annotation]:
    """`survey_label` of ``read(case)`` for each case, from the cache where `files` of the case are unchanged.

    Args:
        files: Case to the file its label comes from.
        read: Gives a case's (X, Y, Z) label.
        ignore: The ignore label.
        cache_file: JSON, or None.
        title: Of the progress bar.
        key: Anything else the result depends on, kept in the cache.
    """
    head = {"version": _VERSION, "threshold": THRESHOLD, "ignore": ignore, "key": key}
    known = _load(cache_file, head)
    entries: dict[str, Any] = {}
    found: dict[str, Annotation] = {}
    with progress_bar(list(files), title) as bar:
        for case, file in files.items():
            stamp = _stamp(file)
            entry = known.get(case)
            if entry is None or entry["stamp"] != stamp:
                entry = {"stamp": stamp, **asdict(survey_label(read(case), ignore))}
            entries[case] = entry
            found[case] = _from_entry(entry)
            bar.update()
    if cache_file is not None and any(known.get(case) != entry for case, entry in entries.items()):
        path = Path(cache_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(c)}: {json.dumps(e)}" for c, e in sorted({**known, **entries}.items()))
        atomic_write_text(path, f'{{"head": {json.dumps(head)}, "cases": {{\n{lines}\n}}}}\n')
    return found


def cache_path(dataset_folder: str | os.PathLike[str], data_identifier: str, kind: str = "planes") -> Path:
    """``nnUNet_preprocessed/<Dataset>/nnunetv2_ext/rada/``: an extra file in a configuration folder breaks nnU-Net."""
    return Path(dataset_folder) / "nnunetv2_ext" / "rada" / f"{kind}_{data_identifier}.json"


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
    axes = {axis for a in labelled for axis in a.planes.axes}
    if not axes:
        found.append("no case has an annotated plane: scribbles supervise all three networks, view disparity is off")
    elif len(axes) == 1:
        found.append(f"planes on axis {min(axes)} only: all three networks see the same planes, view disparity is off")
    elif len(axes) == 2:
        found.append(f"planes on axes {' and '.join(map(str, sorted(axes)))} only: one network sees both, two see one")
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


def _label_file(folder: Path, case: str) -> Path:
    """The file that changes when a case is preprocessed again."""
    for name in (f"{case}_seg.b2nd", f"{case}.npz"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{case} is not in {folder}: preprocess the dataset again (nnUNetv2_preprocess)")


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_mtime_ns, status.st_size]


def _load(cache_file: str | os.PathLike[str] | None, head: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a cache written under the same conditions; an unreadable or older one is as good as none."""
    if cache_file is None:
        return {}
    try:
        content = json.loads(Path(cache_file).read_text(encoding="utf-8"))
        return content["cases"] if content["head"] == head else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _from_entry(entry: Mapping[str, Any]) -> Annotation:
    indices: Sequence[Sequence[int]] = entry["planes"]["indices"]
    first, second, third = (tuple(ii) for ii in indices)
    return Annotation(Planes((first, second, third)), entry["share"], entry["loose"], tuple(entry["values"]))
