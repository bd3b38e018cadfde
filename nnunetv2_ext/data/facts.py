"""What can be seen of a dataset as it lies there: raw, planned, trained. For ``nnUNetv2_ext advise``."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.data.find import (
    PREPROCESSED,
    RESULTS,
    dataset_if_there,
    models_of,
    plans_files_in,
    read_plans,
)
from nnunetv2_ext.data.fingerprint import needs_fix
from nnunetv2_ext.data.mirror import MirrorPair, pairs_by_name, pairs_by_shape, thumbnail
from nnunetv2_ext.data.pool import pools_folder, read_pool
from nnunetv2_ext.data.raw import RawDataset, open_raw, problems
from nnunetv2_ext.data.split import SPLIT, read_split
from nnunetv2_ext.data.subjects import PairsSuggested, divided, pairs_suggested, subjects_of_dataset

Pattern = Literal["dense", "slices", "scattered", "none"]

_THUMBNAILS = 8  # label maps whose shapes are compared
_WHOLE = 0.95  # share of a slice that is annotated, from which on the slice counts as annotated
_ON_SLICES = 0.9  # share of the annotated voxels that lie on such slices, where slices are what was annotated
_FEW = 0.5  # share of the volume, above which the annotation is not one of a few slices
_PLAIN = "nnUNetPlans"
_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")  # that nnU-Net plans, where it has not yet
_SHOWN = 3  # problems


class LabelFacts(NamedTuple):
    """One label map that was read."""

    shape: tuple[int, ...]  # (Z, Y, X), as nnU-Net's reader orders it
    spacing: tuple[float, ...]  # mm
    values: tuple[int, ...]  # that occur, sorted, without the ignore label
    annotated: float  # share of the voxels that do not have the ignore label
    slices: tuple[int, ...]  # number of annotated slices along each axis
    pattern: Pattern  # dense: all voxels; slices: whole slices; scattered: anything else; none: nothing


class PlansFacts(NamedTuple):
    """What the plans say of a configuration; sizes in voxels, (Z, Y, X) unless transposed."""

    name: str
    configurations: tuple[str, ...]
    patch: tuple[int, ...]
    image: tuple[float, ...]  # median
    spacing: tuple[float, ...]  # mm
    batch_size: int
    preprocessed: bool  # its folder is there
    wrong_intensities: bool  # CT, normalised by intensities that count ignored voxels as foreground
    pool: int  # unlabelled cases, preprocessed for this configuration (data/pool.py)


class Trained(NamedTuple):
    """A result folder of the dataset."""

    trainer: str
    plans: str
    configuration: str
    finished: tuple[str, ...]  # folds with a final checkpoint
    unfinished: tuple[str, ...]


class Elsewhere(NamedTuple):
    """A model of another dataset, with a fold that is finished."""

    folder: str  # TRAINER__PLANS__CONFIGURATION
    fold: str  # the first one that is finished
    configuration: str
    channels: tuple[str, ...]
    labels: Mapping[str, tuple[int, ...]]  # as those of `DatasetFacts`


@dataclass(frozen=True)
class DatasetFacts:
    """What rules of advice are about. Counts of cases are of the label maps that were read, where they say so."""

    name: str  # DatasetXXX_name
    configuration: str  # that is asked for, or that the dataset has: 3d_fullres or 2d
    labels: Mapping[str, tuple[int, ...]]  # name to values, several for a region, without the ignore label
    ignore: int | None
    channels: tuple[str, ...]  # their names
    cases: tuple[str, ...]  # with image and label
    read: Mapping[str, LabelFacts]  # by case
    without_label: tuple[str, ...]  # cases of imagesTr
    test_cases: int  # of imagesTs
    subjects: Mapping[str, str] | None  # by case, where they are recorded
    suggested: PairsSuggested | None  # subjects that the names suggest, where none are recorded
    mirrored: tuple[MirrorPair, ...]
    problems: tuple[str, ...]  # on which planning or training stops, with their remedies
    plans: PlansFacts | None  # None: not planned
    split: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]  # training and validation cases of splits_final.json
    trained: tuple[Trained, ...]
    elsewhere: tuple[Elsewhere, ...] = ()

    @property
    def id(self) -> int:
        """Number of the dataset."""
        return int(self.name[7:10])

    @cached_property
    def pattern(self) -> Pattern:
        """How the annotated ones of the label maps that were read are annotated; the most frequent way."""
        found = Counter(label.pattern for label in self.read.values() if label.pattern != "none")
        return found.most_common(1)[0][0] if found else "none"

    @cached_property
    def unlabelled(self) -> int:
        """Of the label maps that were read, those that hold nothing but the ignore label."""
        return sum(label.pattern == "none" for label in self.read.values())

    @property
    def number_of_subjects(self) -> int:
        """Subjects if they are recorded, else cases."""
        return len(set(self.subjects.values())) if self.subjects else len(self.cases)

    @property
    def has_regions(self) -> bool:
        """Whether a label stands for several values."""
        return any(len(values) > 1 for values in self.labels.values())

    @property
    def is_2d(self) -> bool:
        """Whether the label maps are single slices."""
        return all(label.shape[0] == 1 for label in self.read.values())

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Median, (Z, Y, X) in voxels."""
        return tuple(int(n) for n in np.median([label.shape for label in self.read.values()], axis=0))

    @cached_property
    def spacing(self) -> tuple[float, ...]:
        """Median, (Z, Y, X) in mm."""
        return tuple(float(s) for s in np.median([label.spacing for label in self.read.values()], axis=0))

    @property
    def anisotropy(self) -> float:
        """Coarsest to finest median spacing; 1 for single slices, whose distance nobody knows."""
        return 1.0 if self.is_2d else max(self.spacing) / min(self.spacing)

    @property
    def divided(self) -> bool:
        """Whether a fold of the split has cases of one subject in training and validation, as far as they are known."""
        subjects = self.subjects or (self.suggested.subjects if self.suggested else None)
        return subjects is not None and any(divided(*parts, subjects) for parts in self.split)


def look_at(
    dataset: int | str, configuration: str | None = None, plans: str | None = None, cases: int = 32
) -> DatasetFacts:
    """Look at a dataset by id or name in nnUNet_raw, and at what was planned and trained on it.

    Args:
        dataset: id or name.
        configuration: for which advice is asked; None: 3d_fullres, or 2d for single slices.
        plans: of this name; None: nnUNetPlans, or the only ones there are.
        cases: label maps that are read, spread over the dataset; 0 for all.

    Raises:
        ValueError: the dataset is not there or unreadable, a label map is damaged (it is named), or plans or
            configuration do not exist.
    """
    if cases < 0:
        raise ValueError(f"--cases is the number of label maps to read, 0 for all, got {cases}")
    raw = open_raw(dataset, complete=False)
    labels, ignore = _labels(raw)
    labelled = [case for case in raw.cases if Path(raw.files[case]["label"]).is_file()]
    if not labelled:
        raise ValueError(f"none of the {len(raw.cases)} cases in imagesTr of {raw.name} has a label: add labelsTr")
    planned = _read_plans(raw.name, plans)
    known = tuple(planned.available_configurations) if planned else _CONFIGURATIONS
    if configuration is not None and configuration not in known:
        raise ValueError(f"{raw.name} has no configuration {configuration!r}: -c takes {', '.join(known)}")
    read: dict[str, LabelFacts] = {}
    thumbnails = []
    chosen = _spread(labelled, cases or len(labelled))
    compared = set(_spread(chosen, _THUMBNAILS))
    for case in progress_bar(chosen, "reading labels"):
        label, properties = raw.read_label(case)
        read[case] = label_facts(label, tuple(map(float, properties["spacing"])), ignore)
        if case in compared:
            thumbnails.append(thumbnail(label))
    if configuration is None:
        single = all(label.shape[0] == 1 for label in read.values())
        configuration = "3d_fullres" if "3d_fullres" in known and not single else known[0]
    named = {name: values for name, values in labels.items() if 0 not in values}
    plain = {name: values[0] for name, values in named.items() if len(values) == 1}
    pairs = {(pair.first, pair.second): pair for pair in pairs_by_name(list(named))}
    pairs |= {(pair.first, pair.second): pair for pair in pairs_by_shape(thumbnails, plain)}
    subjects = subjects_of_dataset(raw.json, labelled)
    base = dataset_if_there(raw.name, PREPROCESSED)
    split = read_split(base / SPLIT) if base and (base / SPLIT).is_file() else []
    return DatasetFacts(
        name=raw.name,
        configuration=configuration,
        labels=labels,
        ignore=ignore,
        channels=tuple(map(str, raw.channels.values())),
        cases=tuple(labelled),
        read=read,
        without_label=tuple(sorted(set(raw.cases) - set(labelled))),
        test_cases=_number_of_images(raw.folder / "imagesTs", raw.ending),
        subjects=subjects,
        suggested=None if subjects else pairs_suggested(labelled),
        mirrored=tuple(pairs.values()),
        problems=_problems(raw, labelled),
        plans=_plans_facts(planned, configuration, base, ignore) if planned and base else None,
        split=tuple((tuple(fold["train"]), tuple(fold["val"])) for fold in split),
        trained=_trained(raw.name),
        elsewhere=tuple(_elsewhere(raw.name)),
    )


def label_facts(label: npt.NDArray[Any], spacing: tuple[float, ...], ignore: int | None) -> LabelFacts:
    """Of one (Z, Y, X) label map."""
    known = np.ones(label.shape, bool) if ignore is None else label != ignore
    share = float(known.mean())
    others = [tuple(b for b in range(label.ndim) if b != axis) for axis in range(label.ndim)]
    whole = [np.flatnonzero(known.mean(axis=of_slice) >= _WHOLE) for of_slice in others]
    values = tuple(int(value) for value in np.unique(label) if value != ignore)
    pattern: Pattern = "scattered"
    if not values:
        pattern = "none"
    elif share >= _WHOLE:
        pattern = "dense"
    elif share <= _FEW:
        on_slices = np.zeros(label.shape, bool)
        for axis, indices in enumerate(whole):
            on_slices[(slice(None),) * axis + (indices,)] = True
        pattern = "slices" if (known & on_slices).sum() >= _ON_SLICES * known.sum() else "scattered"
    return LabelFacts(label.shape, spacing, values, share, tuple(map(len, whole)), pattern)


def _labels(raw: RawDataset) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Name to values without the ignore label, and the ignore label.

    Raises:
        ValueError: dataset.json's labels are not names with integers.
    """
    try:
        labels = {name: tuple(int(v) for v in np.atleast_1d(value)) for name, value in raw.json["labels"].items()}
        return {name: values for name, values in labels.items() if name != "ignore"}, raw.ignore
    except (TypeError, ValueError, AttributeError):
        cause = f"the labels of {raw.name} are not names with integers"
        raise ValueError(f"{cause}: correct 'labels' in dataset.json") from None


def _spread(cases: Sequence[str], number: int) -> list[str]:
    """At most `number` cases, spread evenly."""
    return [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, min(number, len(cases))).round().astype(int))]


def _number_of_images(folder: Path, ending: str) -> int:
    return len(get_identifiers_from_splitted_dataset_folder(str(folder), ending)) if folder.is_dir() else 0


def _problems(raw: RawDataset, labelled: Sequence[str]) -> tuple[str, ...]:
    """What stops nnU-Net besides images without labels; of many, the first ones and how many there are."""
    files = {case: raw.files[case] for case in labelled}
    found = list(problems(replace(raw, files=files)))
    stated = raw.json.get("numTraining")
    if stated != len(raw.files):
        found.append(
            f"dataset.json of {raw.name} says numTraining {stated}, but imagesTr has {len(raw.files)} cases: correct "
            "it, or nnU-Net's --verify_dataset_integrity stops"
        )
    more = [f"and {len(found) - _SHOWN} more of this kind"] if len(found) > _SHOWN else []
    return (*found[:_SHOWN], *more)


def _read_plans(dataset: str, plans: str | None) -> PlansManager | None:
    """The plans of this name; None if the dataset was not planned.

    Raises:
        ValueError: plans that were asked for do not exist, or the file is damaged.
    """
    base = dataset_if_there(dataset, PREPROCESSED)
    remedy = f"run nnUNetv2_plan_experiment -d {int(dataset[7:10])}"
    there = [file.stem for file in plans_files_in(base)] if base else []
    if plans is None and not there:
        return None
    if base is None:
        raise ValueError(f"{dataset} has no plans {plans}, because it was not planned: {remedy}")
    return PlansManager(read_plans(base, plans or (_PLAIN if _PLAIN in there else there[0]), remedy))


def _plans_facts(plans: PlansManager, configuration: str, base: Path, ignore: int | None) -> PlansFacts:
    """Of a configuration that the plans have; ValueError if the plans are damaged."""
    try:
        of = plans.get_configuration(configuration)
        return PlansFacts(
            plans.plans_name,
            tuple(plans.available_configurations),
            tuple(map(int, of.patch_size)),
            tuple(map(float, of.median_image_size_in_voxels)),
            tuple(map(float, of.spacing)),
            int(of.batch_size),
            (base / of.data_identifier).is_dir(),
            ignore is not None and needs_fix(plans.plans, base),
            0 if (pool := read_pool(pools_folder(base) / of.data_identifier)) is None else len(pool.cases),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"plans of {base.name}, {configuration}: {type(error).__name__} {error}; the file is damaged: run "
            f"nnUNetv2_plan_experiment -d {int(base.name[7:10])}"
        ) from error


def _trained(name: str) -> tuple[Trained, ...]:
    folder = dataset_if_there(name, RESULTS)
    found = []
    for model in models_of(folder) if folder else ():
        done = {f: (model.folder / f"fold_{f}" / "checkpoint_final.pth").is_file() for f in model.folds()}
        finished, unfinished = (tuple(f for f in done if done[f] is wanted) for wanted in (True, False))
        found.append(Trained(model.trainer, model.plans, model.configuration, finished, unfinished))
    return tuple(found)


def _elsewhere(name: str) -> Iterator[Elsewhere]:
    """Those of other datasets in nnUNet_results; a folder without a readable dataset.json says nothing."""
    results = os.environ.get(RESULTS)
    for folder in sorted(Path(results).glob("Dataset*")) if results else ():
        for model in models_of(folder) if folder.name != name else ():
            folds = [f for f in model.folds() if (model.folder / f"fold_{f}" / "checkpoint_final.pth").is_file()]
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                content = read_json(model.folder / "dataset.json")
                labels = {
                    str(label): tuple(int(v) for v in np.atleast_1d(value))
                    for label, value in content["labels"].items()
                    if label != "ignore"
                }
                if folds:
                    yield Elsewhere(
                        str(model.folder), folds[0], model.configuration, tuple(channel_names(content)), labels
                    )
