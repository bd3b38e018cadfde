"""A raw nnU-Net dataset: its files, its reader, and the grid its labels will have after preprocessing."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.utils import (
    create_paths_fn,
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)

from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import Volume, find_reader, read_image, read_label_map, require_same_grid
from nnunetv2_ext.data.find import PREPROCESSED, RAW, dataset_if_there, datasets_of_id, find_dataset, read_plans

Array = npt.NDArray[Any]


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
        """Of all labels, and of the images unless dataset.json lists them."""
        return str(self.json["file_ending"])

    def ending_of(self, file: str | Path) -> str:
        """The ending of one file, of those that the reader knows."""
        name = Path(file).name
        known = [e for e in (self.ending, *self.reader.supported_file_endings) if name.lower().endswith(e.lower())]
        return name[-len(max(known, key=len)) :] if known else Path(name).suffix

    @property
    def ignore(self) -> int | None:
        """The ignore label, None without one."""
        value = self.json["labels"].get("ignore")
        return None if value is None else int(value)

    @property
    def channels(self) -> dict[str, str]:
        """Number to name as dataset.json declares them; {} if it does not, or not in nnU-Net's form."""
        content = self.json.get("channel_names") or self.json.get("modality")
        return content if isinstance(content, dict) else {}

    def label_values(self) -> set[int]:
        """All values dataset.json declares, with the ignore label."""
        return declared_values(self.json["labels"])

    def read_label(self, case: str) -> tuple[Array, dict[str, Any]]:
        """(Z, Y, X) integer label as nnU-Net's reader orders it, and the file's properties.

        Raises:
            ValueError: it cannot be read, or holds values that dataset.json does not declare.
        """
        file = self.files[case]["label"]
        label, properties = read_label_map(case, file, self.reader)
        unknown = sorted(set(np.unique(label).tolist()) - self.label_values())
        if unknown:
            raise ValueError(
                f"case {case}: {file} holds label values that {self.name}/dataset.json does not declare "
                f"({', '.join(map(str, unknown[:5]))}): correct the file or declare them under 'labels'"
            )
        return label.astype(np.int16), properties

    def read_case(self, case: str) -> tuple[Array, Array, dict[str, Any]]:
        """(C, Z, Y, X) fp32 image, (Z, Y, X) label, and the image's properties.

        Raises:
            ValueError: as `data.case.read_image` and `read_label`, or image and label lie on different grids.
        """
        image, properties = read_image(case, self.files[case]["images"], self.reader)
        channels = len(self.channels) or len(image)
        if len(image) != channels:
            raise ValueError(
                f"case {case} of {self.name} has {len(image)} image channels, and dataset.json declares {channels}: "
                "add the missing files, or correct 'channel_names'"
            )
        label, of_label = self.read_label(case)
        require_same_grid(
            case,
            Volume("label", label.shape, of_label),
            Volume("image", image.shape[1:], properties),
            "draw the label on this image, or resample it",
        )
        return image, label, properties


class Grid(NamedTuple):
    """Geometry of a case in the reader's array order."""

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


class _FormError(ValueError):
    """Names or endings that nnU-Net does not understand, said in one line."""


def _listed(folder: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """nnU-Net's `get_filenames_of_train_images_and_targets`, which forks twelve processes to match names.

    Forked from a process with threads they sometimes never end.
    """
    if "dataset" in content:
        return get_filenames_of_train_images_and_targets(str(folder), content)
    images, ending = str(folder / "imagesTr"), content["file_ending"]
    if not ending.startswith("."):
        raise _FormError(f"'file_ending' in dataset.json of {folder.name} is {ending!r}: write '.{ending}'")
    names = sorted(name for name in os.listdir(images) if name.endswith(ending))
    if odd := [name for name in names if not re.search(r"_\d{4}$", name.removesuffix(ending))]:
        raise _FormError(f"{images}/{odd[0]} has no channel number: name it CASE_0000{ending}, or move it away")
    return {
        case: {
            "images": create_paths_fn(images, names, ending, case),
            "label": str(folder / "labelsTr" / f"{case}{ending}"),
        }
        for case in map(str, get_identifiers_from_splitted_dataset_folder(images, ending))
    }


def open_raw(dataset: int | str, complete: bool = True) -> RawDataset:
    """The dataset with this id or name in nnUNet_raw.

    Args:
        dataset: id or name.
        complete: Every labelled case must have its files; otherwise `problems` says what is missing.

    Raises:
        ValueError: there is none, its dataset.json is missing or incomplete; or one of `problems`.
    """
    folder = find_dataset(dataset, RAW)
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        files = _listed(folder, content)
        ending, _ = content["file_ending"], content["labels"]
        first = next((entry["images"][0] for entry in files.values()), None)
    except _FormError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{folder} is not a complete raw dataset ({type(error).__name__}: {error}); it needs dataset.json, "
            "imagesTr and labelsTr"
        ) from error
    if first is None:
        raise ValueError(
            f"{folder / 'imagesTr'} has no image that ends in {ending}: add the images, or correct 'file_ending' in "
            "dataset.json"
        )
    reader = find_reader(ending, content.get("overwrite_image_reader_writer"), Path(first))
    raw = RawDataset(folder, content, files, reader)
    if complete and (problem := next(problems(raw), None)):
        raise ValueError(problem)
    return raw


def problems(raw: RawDataset) -> Iterator[str]:
    """Why nnU-Net could not be trained on the files as they are: labels that are not consecutive, missing files.

    nnU-Net forgets a label whose image is missing.
    """
    try:
        require_consecutive_labels(raw.json["labels"], raw.name)
    except ValueError as error:
        yield str(error)
    if not raw.channels:
        yield f'dataset.json of {raw.name} has no "channel_names" such as {{"0": "T1"}}, by which nnU-Net normalises'
    for case, entry in raw.files.items():
        missing = [str(file) for file in (*entry["images"], entry["label"]) if not Path(file).is_file()]
        if missing:
            yield f"case {case} of {raw.name}: {missing[0]} is missing; add the file, or remove the case"
        elif not str(entry["label"]).endswith(raw.ending):
            yield (
                f"case {case} of {raw.name}: the label {entry['label']} does not end in {raw.ending}, under which "
                "nnU-Net copies it: convert the label, or correct 'file_ending' in dataset.json"
            )
    folder = raw.folder / "labelsTr"
    labels = folder.iterdir() if folder.is_dir() and "dataset" not in raw.json else ()
    cases = {p.name.removesuffix(raw.ending) for p in labels if p.name.endswith(raw.ending) and p.name[0] != "."}
    for case in sorted(cases - set(raw.files)):
        yield (
            f"case {case} of {raw.name} has a label, but no image {case}_0000{raw.ending} in imagesTr: add the image, "
            "or move the label away"
        )


def declared_values(labels: Mapping[str, Any]) -> set[int]:
    """All values of dataset.json's ``labels``, regions and ignore label included."""
    return {int(v) for value in labels.values() for v in np.atleast_1d(value)}


def require_consecutive_labels(labels: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless the values of dataset.json's ``labels`` are 0, 1, 2 ..., with the ignore label last.

    nnU-Net's loss has as many channels as labels: value 5 of the labels 0, 1, 2 and 5 is an index out of bounds.
    """
    try:
        values = sorted(declared_values(labels))
    except (TypeError, ValueError, AttributeError):
        cause = f"the labels of {name} are not names with integers"
        raise ValueError(f"{cause}: correct 'labels' in dataset.json") from None
    if values != list(range(len(values))):
        raise ValueError(
            f"the labels of {name} are {', '.join(map(str, values))}, but nnU-Net needs consecutive integers from 0: "
            f"renumber them to 0 ... {len(values) - 1} in dataset.json and in the label files, then plan and preprocess"
        )
    if labels.get("ignore", values[-1]) != values[-1]:
        raise ValueError(
            f"the ignore label of {name} is {labels['ignore']}, but nnU-Net needs the highest value for it, "
            f"{values[-1]}: exchange the two in dataset.json and in the label files, then plan and preprocess"
        )


def require_free_id(dataset_id: int, option: str = "-o") -> None:
    """Raise ValueError if this id, given by `option`, is of a dataset in raw data, preprocessed data or results."""
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"a dataset id is a number from 1 to 999, got {dataset_id}")
    taken = datasets_of_id(dataset_id)
    if taken:
        raise ValueError(
            f"dataset id {dataset_id} is taken by {', '.join(taken)} (raw data, preprocessed data or results) and "
            f"nothing is overwritten: choose another id with {option}, or remove those folders"
        )


def measure(dataset: RawDataset, case: str) -> Grid:
    """Spacing, non-zero crop and cropped shape of a case; reads its image and label.

    Raises:
        ValueError: the case is 2-D, or its files are damaged or do not fit together (`RawDataset.read_case`).
    """
    image, _, properties = dataset.read_case(case)
    if image.shape[1] == 1:
        raise ValueError(
            f"case {case} of {dataset.name} is two-dimensional (array {image.shape[1:]}): planes are annotated in "
            "volumes, so use a 3-D dataset"
        )
    cropped, _, box = crop_to_nonzero(image)
    return Grid(tuple(map(float, properties["spacing"])), tuple(slice(*b) for b in box), cropped.shape[1:])


def target_grids(
    dataset: RawDataset, cases: Sequence[str], plans: str | None, configuration: str
) -> tuple[dict[str, Grid], Target]:
    """The grid of each training case, and the spacing it will be resampled to.

    The spacing is that of the dataset's `plans` and their `configuration` if they exist, else what nnU-Net will choose
    from all training cases.

    Raises:
        ValueError: a case is 2-D, or the configuration is not 3d_fullres and there are no plans that tell its spacing.
    """
    planned = planned_spacing(dataset.name, plans, configuration) if plans else None
    if planned is None and configuration != "3d_fullres":
        named = f" named {plans}" if plans else ""
        raise ValueError(
            f"the spacing of {configuration} is known from plans only, and {dataset.name} has none{named}: run "
            f"nnUNetv2_plan_experiment -d {dataset.name} and name them with -p"
        )
    grids = {case: measure(dataset, case) for case in progress_bar(cases, "reading images")}
    if planned is not None:
        return grids, Target(planned, f"{plans}, {configuration} of {dataset.name}")
    return grids, Target(estimated_spacing(list(grids.values())), "nnU-Net's rule for 3d_fullres")


def planned_spacing(dataset_name: str, plans_name: str, configuration: str) -> tuple[float, ...] | None:
    """Target spacing (array order) of existing plans; None if there are no such plans.

    Raises:
        ValueError: the plans lack the configuration, or it is 2-D.
    """
    base = dataset_if_there(dataset_name, PREPROCESSED)
    if base is None or not (base / f"{plans_name}.json").is_file():
        return None
    plans = read_plans(base, plans_name, f"run nnUNetv2_plan_experiment -d {dataset_name}")
    known = plans["configurations"]
    block = known.get(configuration) or {}
    while "spacing" not in block and "inherits_from" in block:
        block = known.get(block["inherits_from"]) or {}
    if len(block.get("spacing", ())) != 3:
        raise ValueError(
            f"{plans_name} of {dataset_name} has no 3-D configuration {configuration!r} (it has {', '.join(known)})"
        )
    return tuple(float(block["spacing"][i]) for i in plans["transpose_backward"])


def estimated_spacing(grids: Sequence[Grid]) -> tuple[float, ...]:
    """3d_fullres target spacing (array order) that nnU-Net's ExperimentPlanner will choose for these training cases.

    Its own rule is called with their spacings and cropped shapes: the median, and the 10th percentile along a much
    coarser axis.
    """
    planner = object.__new__(ExperimentPlanner)  # its constructor wants a fingerprint on disk
    planner.overwrite_target_spacing = None
    planner.anisotropy_threshold = ANISO_THRESHOLD
    planner.dataset_fingerprint = {
        "spacings": [g.spacing for g in grids],
        "shapes_after_crop": [g.shape for g in grids],
    }
    return tuple(float(s) for s in planner.determine_fullres_target_spacing())
