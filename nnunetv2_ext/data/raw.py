"""A raw nnU-Net dataset: its files, its reader, and the grid its labels will have after preprocessing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets, maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.rada.annotation.planes import Array

BLOCK = "nnunetv2_ext"  # our block in dataset.json


@dataclass(frozen=True)
class RawDataset:
    """Folder, dataset.json and files of a dataset in nnUNet_raw."""

    folder: Path
    json: dict[str, Any]
    files: dict[str, dict[str, Any]]  # case -> {"images": [...], "label": ...}
    reader: BaseReaderWriter

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def cases(self) -> list[str]:
        return sorted(self.files)

    @property
    def ending(self) -> str:
        return str(self.json["file_ending"])

    @property
    def ignore(self) -> int | None:
        """The ignore label, None without one."""
        value = self.json["labels"].get("ignore")
        return None if value is None else int(value)

    def label_values(self) -> set[int]:
        """All values dataset.json declares, with the ignore label."""
        return {int(v) for value in self.json["labels"].values() for v in np.atleast_1d(value)}

    def read_label(self, case: str) -> tuple[Array, dict[str, Any]]:
        """(Z, Y, X) integer label as nnU-Net's reader orders it, and the file's properties.

        Raises:
            ValueError: it holds values that dataset.json does not declare.
        """
        data, properties = self.reader.read_seg(str(self.files[case]["label"]))
        label = np.rint(data[0]).astype(np.int16)
        unknown = sorted(set(np.unique(label).tolist()) - self.label_values())
        if unknown or not np.array_equal(label, data[0]):
            raise ValueError(
                f"{self.files[case]['label']} holds label values that {self.name}/dataset.json does not declare "
                f"({', '.join(map(str, unknown[:5])) or 'fractions'}): correct the file or declare them under 'labels'"
            )
        return label, properties


class Grid(NamedTuple):
    """Geometry of one case in the reader's array order."""

    spacing: tuple[float, ...]  # mm
    box: tuple[slice, ...]  # nnU-Net's non-zero crop
    shape: tuple[int, ...]  # after the crop

    def resampled(self, target_spacing: Sequence[float]) -> tuple[int, ...]:
        """Shape after nnU-Net's resampling to `target_spacing` (array order, mm)."""
        return tuple(int(n) for n in compute_new_shape(self.shape, self.spacing, target_spacing))


class Target(NamedTuple):
    """Spacing after preprocessing, in the reader's array order."""

    spacing: tuple[float, ...]  # mm
    source: str  # where it is known from

    def provenance(self) -> dict[str, Any]:
        """For dataset.json."""
        return {"target_spacing": list(self.spacing), "target_spacing_from": self.source}


def open_raw(dataset: int | str) -> RawDataset:
    """The dataset with this id or name in nnUNet_raw.

    Raises:
        ValueError: there is none, or its dataset.json is missing or incomplete.
    """
    folder = folder_below("nnUNet_raw", dataset)
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        files = get_filenames_of_train_images_and_targets(str(folder), content)
        first = next(iter(files.values()))["images"][0]
        reader = determine_reader_writer_from_dataset_json(content, first, verbose=False)()
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise ValueError(
            f"{folder} is no complete raw dataset ({type(error).__name__}: {error}); it needs dataset.json, imagesTr "
            "and labelsTr"
        ) from error
    return RawDataset(folder, content, files, reader)


def folder_below(variable: str, dataset: int | str) -> Path:
    """The folder of a dataset, named by id or name, below ``nnUNet_raw`` or ``nnUNet_preprocessed``.

    Raises:
        ValueError: the variable is not set, or no or several datasets have this id.
    """
    root = {"nnUNet_raw": nnUNet_raw, "nnUNet_preprocessed": nnUNet_preprocessed}[variable]
    if not root.is_set():
        raise ValueError(f"{variable} is not set; export {variable}=FOLDER as for nnUNetv2_train")
    try:
        return Path(root) / maybe_convert_to_dataset_name(dataset)
    except RuntimeError as error:
        raise ValueError(
            f"dataset {dataset} is not, or not only once, in nnU-Net's folders ({variable}={Path(root)}): correct the "
            f"id, or {variable}"
        ) from error


def require_free_id(dataset_id: int) -> None:
    """Raise ValueError if a dataset with this id is among raw data, preprocessed data or results."""
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"a dataset id is a number from 1 to 999, got {dataset_id}")
    taken = [str(name) for name in find_candidate_datasets(dataset_id)]
    if taken:
        raise ValueError(
            f"dataset id {dataset_id} is taken by {', '.join(taken)} (raw data, preprocessed data or results) and "
            "nothing is overwritten: choose another id with -o, or remove those folders"
        )


def measure(dataset: RawDataset, case: str) -> Grid:
    """Spacing, non-zero crop and cropped shape of a case; reads its images.

    Raises:
        ValueError: the case is 2-D.
    """
    images, properties = dataset.reader.read_images([str(f) for f in dataset.files[case]["images"]])
    if images.ndim != 4 or images.shape[1] == 1:
        raise ValueError(
            f"{case} of {dataset.name} is two-dimensional (array {images.shape[1:]}): planes are annotated in volumes; "
            "RADA needs 3-D data"
        )
    cropped, _, box = crop_to_nonzero(images)
    return Grid(tuple(map(float, properties["spacing"])), tuple(slice(*b) for b in box), cropped.shape[1:])


def target_grids(
    dataset: RawDataset, cases: Sequence[str], plans: str | None, configuration: str
) -> tuple[dict[str, Grid], Target]:
    """The grid of each case, and the spacing it will be resampled to.

    Args:
        dataset: Of the cases.
        cases: All training cases: nnU-Net chooses the spacing from them.
        plans: Plans of this dataset to read the spacing from, if they exist; else it is estimated.
        configuration: 3-D configuration of the plans.

    Raises:
        ValueError: a case is 2-D, or the configuration is not 3d_fullres and there are no plans that tell its spacing.
    """
    planned = planned_spacing(dataset.name, plans, configuration) if plans else None
    if planned is None and configuration != "3d_fullres":
        raise ValueError(
            f"the spacing of {configuration} is known from plans only, and {dataset.name} has no plans "
            f"{plans or ''}: run nnUNetv2_plan_experiment -d {dataset.name} and name them with -p"
        )
    grids = {}
    with progress_bar(cases, "reading images") as bar:
        for case in cases:
            grids[case] = measure(dataset, case)
            bar.update()
    if planned is not None:
        return grids, Target(planned, f"{plans}, {configuration} of {dataset.name}")
    return grids, Target(estimated_spacing(list(grids.values())), "nnU-Net's rule for 3d_fullres")


def planned_spacing(dataset_name: str, plans_name: str, configuration: str) -> tuple[float, ...] | None:
    """Target spacing (array order) of existing plans; None if there are no such plans.

    Raises:
        ValueError: the plans lack the configuration, or it is 2-D.
    """
    if not nnUNet_preprocessed.is_set():
        return None
    file = Path(nnUNet_preprocessed) / dataset_name / f"{plans_name}.json"
    if not file.is_file():
        return None
    plans = read_json(file)
    block = plans["configurations"].get(configuration)
    while block is not None and "spacing" not in block and "inherits_from" in block:
        block = plans["configurations"].get(block["inherits_from"])
    spacing = None if block is None else block.get("spacing")
    if spacing is None or len(spacing) != 3:
        raise ValueError(
            f"{file.name} of {dataset_name} has no 3-D configuration {configuration!r} "
            f"(it has {', '.join(plans['configurations'])})"
        )
    return tuple(float(spacing[i]) for i in plans["transpose_backward"])


def estimated_spacing(grids: Sequence[Grid]) -> tuple[float, ...]:
    """3d_fullres target spacing (array order) that nnU-Net's ExperimentPlanner will choose for these training cases.

    Its own rule is called with their spacings and cropped shapes: the median, and the 10th percentile along a much
    coarser axis.
    """
    planner = object.__new__(ExperimentPlanner)  # its constructor wants a fingerprint on disk
    planner.overwrite_target_spacing = None
    planner.anisotropy_threshold = ANISO_THRESHOLD
    planner.dataset_fingerprint = {
        "spacings": [grid.spacing for grid in grids],
        "shapes_after_crop": [grid.shape for grid in grids],
    }
    return tuple(float(s) for s in planner.determine_fullres_target_spacing())
