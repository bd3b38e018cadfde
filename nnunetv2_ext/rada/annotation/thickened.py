"""A sparse dataset with its planes made thick enough, as a new dataset (``sparsify --thicken-only``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext import __version__
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.derive import (
    DENSE,
    final_folder,
    link_folder,
    link_images,
    link_label,
    new_dataset,
    write_json,
    write_label,
)
from nnunetv2_ext.data.raw import Grid, Target, measure, open_raw, require_free_id, target_grids
from nnunetv2_ext.data.split import write_split_for
from nnunetv2_ext.data.subjects import BLOCK, recorded_subjects
from nnunetv2_ext.rada.annotation.planes import Array, Planes, find_planes
from nnunetv2_ext.rada.annotation.thicken import Slab, thicken
from nnunetv2_ext.rada.requirements import require_ignore_label

Print = Callable[[str], None]


@dataclass
class PlaneReport:
    """Planes and slabs that were written, per case, in indices of the whole raw array."""

    planes: dict[str, Planes] = field(default_factory=dict)
    slabs: dict[str, list[Slab]] = field(default_factory=dict)
    classes: set[int] = field(default_factory=set)

    def provenance(self) -> dict[str, Any]:
        """Per case the annotated planes, and the slices they were thickened to as (axis, first, last)."""
        return {
            case: {
                "planes": [list(indices) for indices in planes.indices],
                "slabs": [[s.axis, s.start, s.stop - 1] for s in self.slabs[case]],
            }
            for case, planes in sorted(self.planes.items())
        }

    def missing(self, labels: Mapping[str, Any]) -> list[str]:
        """Classes of dataset.json that are on no plane."""
        return [name for name, value in labels.items() if name != "ignore" and int(value) not in self.classes]

    def tell(self, labels: Mapping[str, Any], target: Target, say: Print) -> None:
        """Say what was thickened, and which classes nobody drew."""
        for case, slabs in sorted(self.slabs.items()):
            thick = [
                f"axis{s.axis} {s.first}->{s.start}..{s.stop - 1}"
                for s in slabs
                if s.stop - s.start > s.last + 1 - s.first
            ]
            say(f"{case}  {self.planes[case].describe()}" + (f"  thickened: {', '.join(thick)}" if thick else ""))
        spacing = " x ".join(f"{s:g}" for s in target.spacing)
        say(f"target spacing {spacing} mm (z, y, x of the file), from {target.source}")
        for name in self.missing(labels):
            say(
                f"WARNING: no plane shows {name}: it stays declared, but nothing teaches it; label more cases or planes"
            )


def thicken_case(
    case: str, label: Array, ignore: int, planes: Planes, grid: Grid, spacing: Sequence[float], report: PlaneReport
) -> Array:
    """A sparse label with the planes (counted from the corner of the grid's box) made thick; noted in `report`."""
    result = label.copy()
    result[grid.box], slabs = thicken(label[grid.box], ignore, planes, grid.resampled(spacing))
    offset = [s.start for s in grid.box]
    report.planes[case] = planes.shifted(offset)
    report.slabs[case] = [Slab(s.axis, *(i + offset[s.axis] for i in s[1:])) for s in slabs]
    report.classes |= set(np.unique(result).tolist())
    return result


def thicken_dataset(
    source: int | str,
    target_id: int,
    plans: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    say: Print = print,
) -> Path:
    """Write a copy of a sparse dataset whose annotated planes survive nnU-Net's resampling; its folder is returned.

    Labels without a plane are linked unchanged. The thickness follows the plans of `source` if it has been planned,
    else nnU-Net's rule for 3d_fullres.

    Raises:
        ValueError: the id is taken, the dataset is 2-D, has no ignore label or no annotated plane at all.
    """
    dataset = open_raw(source)
    require_free_id(target_id)
    ignore = require_ignore_label(dataset.ignore, dataset.name)
    measure(dataset, dataset.cases[0])  # 2-D data is refused before anything long starts
    grids, target = target_grids(dataset, dataset.cases, plans, configuration)
    report = PlaneReport()
    loose = []
    with new_dataset(dataset, target_id) as folder, progress_bar(dataset.cases, "writing cases") as bar:
        for case in dataset.cases:
            link_images(dataset, case, folder / "imagesTr")
            label, properties = dataset.read_label(case)
            planes = find_planes(label[grids[case].box], ignore)
            if planes:
                thick = thicken_case(case, label, ignore, planes, grids[case], target.spacing, report)
                write_label(dataset, case, thick, properties, folder / "labelsTr")
            else:
                link_label(dataset, case, folder / "labelsTr")
                loose += [case] if (label != ignore).any() else []
            bar.update()
        if not report.planes:
            raise ValueError(
                f"no case of {dataset.name} has an annotated plane (a slice with at least 95 % of its voxels labelled, "
                "background included): label whole slices"
            )
        for name in (DENSE, "imagesTs", "labelsTs"):
            link_folder(dataset.folder / name, folder / name)
        if not any((folder / DENSE).iterdir()):
            (folder / DENSE).rmdir()
        block = {
            **((dataset.json.get(BLOCK) or {}).get("sparsify") or {}),
            "thickened_from": dataset.name,
            "version": __version__,
            **target.provenance(),
            "labelled": report.provenance(),
            "classes_on_no_plane": report.missing(dataset.json["labels"]),
        }
        write_json(
            dataset, target_id, folder, dataset.cases, {BLOCK: {**(dataset.json.get(BLOCK) or {}), "sparsify": block}}
        )
    final = final_folder(dataset, target_id)
    say(f"{final}: {len(report.planes)} cases with planes of {len(dataset.cases)}")
    for case in loose:
        say(f"{case}  annotations on no plane (scribbles) are left as they are; resampling may thin them out")
    report.tell(dataset.json["labels"], target, say)
    labelled = {*report.planes, *loose}
    write_split_for(final.name, labelled, set(dataset.cases) - labelled, recorded_subjects(dataset.json), say)
    return final
