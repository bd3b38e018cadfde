"""What to compare: folders found and checked before anything is scored. Usable from Python as from the command line."""

import datetime
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_ext.compare.arms import Arm, make_arm, predictions_arm, require_comparable, require_same_training_cases
from nnunetv2_ext.compare.groups import compare_groups
from nnunetv2_ext.compare.report import Report, write
from nnunetv2_ext.compare.scores import collect
from nnunetv2_ext.compare.statistics import all_differences
from nnunetv2_ext.data import find
from nnunetv2_ext.data.split import SPLIT, read_split
from nnunetv2_ext.evaluate.folder import Source, make_source
from nnunetv2_ext.evaluate.groups import find_groups, find_subjects
from nnunetv2_ext.evaluate.metrics import METRICS, WORST
from nnunetv2_ext.evaluate.pairs import listed, require_output, require_roles
from nnunetv2_ext.evaluate.structures import read_labels


@dataclass
class Request:
    """The options of ``nnUNetv2_ext compare``; one of ``trainers``, ``runs`` and ``predictions`` says what to compare.

    An entry of ``runs`` or ``predictions`` is a name and its folders, each of them a repeat.
    """

    dataset: str  # id or name
    configuration: str = "3d_fullres"
    plans: str = "nnUNetPlans"
    trainers: Sequence[str] = ()  # the first is the reference
    folds: Sequence[str] | None = None  # None: all that the first has, without "all" where it has numbered ones
    results: Sequence[Path] = ()  # results folders, one per repeat; empty: nnUNet_results
    runs: Sequence[Sequence[str]] = ()  # of results folders, model folders or folds
    predictions: Sequence[Sequence[str]] = ()  # of test predictions; needs truth
    truth: Path | None = None  # None: the dataset's own
    images: Path | None = None  # for pictures; None: imagesTr
    group_regex: str | None = None  # subjects of cases, see data.subjects; None: as dataset.json records them
    groups: Path | None = None
    by: str | None = None  # groups of cases: FILE:COLUMN, or what dataset.json records
    allow_different_training_cases: bool = False  # a note instead of an error
    metrics: Sequence[str] = tuple(METRICS)  # this and the next three: see evaluate.folder.make_source
    tolerance: Sequence[str] = ("1",)
    empty: str = WORST
    ignore_origin: bool = False
    processes: int = 1
    worst: int = 3  # cases drawn of either kind
    output: Path | None = None  # None: comparison_DATASET_CONFIGURATION

    def __post_init__(self) -> None:
        if self.processes < 1 or self.worst < 0:
            given = f"{self.processes} and {self.worst}"
            raise ValueError(f"-np must be 1 or more and --worst 0 or more, but they are {given}")
        if bool(self.trainers) + bool(self.runs) + bool(self.predictions) != 1:
            raise ValueError(
                "say what to compare in one way: -tr TRAINER TRAINER, or --run NAME DIR, or --predictions NAME DIR"
            )
        for named in (*self.runs, *self.predictions):
            if len(named) < 2:
                raise ValueError(f"{named[0]!r} is a name without a folder: give NAME DIR [DIR ...]")
        if self.results and not self.trainers:
            raise ValueError("--results goes with -tr; name these folders after --run NAME instead")
        if self.predictions and self.truth is None:
            raise ValueError("--predictions needs --truth, the folder with the true segmentations of these cases")
        if self.predictions and self.folds:
            raise ValueError("-f goes with trainings; --predictions have no folds")


def compare(request: Request) -> tuple[Report, Path]:
    """Check, score and write everything: the report, with the long table of all measurements, and the output folder.

    ValueError: missing or unfinished results, results without common cases, different label sets; one line.
    """
    find_arms = _of_predictions if request.predictions else _of_trainings
    dataset, dataset_json, arms, source, notes = find_arms(request)
    split = None if request.predictions else _stock(find.PREPROCESSED, dataset, SPLIT)
    folds = read_split(split) if split else []
    notes += require_comparable(arms, {str(i): fold["val"] for i, fold in enumerate(folds)})
    notes += require_same_training_cases(arms, request.allow_different_training_cases)
    cases = [case for run in arms[0].repeats[0].folds.values() for case in run.cases]
    contents = known_contents(request, dataset_json)
    subjects, remarks = find_subjects(cases, contents, request.group_regex, request.groups)
    groups = None if request.by is None else find_groups(request.by, contents, cases, subjects)
    truth = truth_folder(request, dataset)
    images = images_folder(request, dataset, source.ending, cases)
    folders = [run.predictions for arm in arms for run in arm.runs()]
    for folder in folders:
        require_roles(folder, truth)
    folder = request.output or Path(f"comparison_{dataset}_{request.configuration}")
    output = require_output(folder, [*folders, truth, *([images] if images else [])])
    scores = collect(arms, truth, source, request.processes, request.truth is None, subjects,
                     groups and groups.of)  # fmt: skip
    what = "test set" if request.predictions else f"{request.configuration}, plans {request.plans}"
    differences = all_differences(scores)
    report = Report(
        title=f"{dataset}, {what}: {', '.join(a.name for a in arms[1:])} against {arms[0].name}",
        scores=scores,
        differences=differences,
        groups=None if groups is None else compare_groups(scores, groups, differences),
        notes=[*scores.notes, *notes, *remarks],
        command=shlex.join(["nnUNetv2_ext", *sys.argv[1:]]),
        date=datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    )
    write(report, output, images, request.worst)
    return report, output


# dataset's name, its dataset.json, arms, what to score, and notes for the reader
Found = tuple[str, dict[str, Any], list[Arm], Source, list[str]]


def _of_predictions(request: Request) -> Found:
    given = [(name, [Path(f) for f in folders]) for name, *folders in request.predictions]
    # nnUNetv2_predict leaves the dataset.json of the training beside its predictions
    content, source, notes = _source(request, [f for _, folders in given for f in folders])
    arms = [predictions_arm(name, folders, source.ending) for name, folders in given]
    dataset = f"dataset {request.dataset}" if request.dataset.isdigit() else request.dataset
    with suppress(ValueError):
        dataset = find.find_dataset(request.dataset, find.PREPROCESSED, find.RAW).name
    return dataset, content, arms, source, notes


def _of_trainings(request: Request) -> Found:
    where = (request.dataset, request.plans, request.configuration)
    if request.runs:
        models = [(name, [find.find_in(Path(f), *where) for f in folders]) for name, *folders in request.runs]
    else:
        roots = request.results or [find.nnunet_folder(find.RESULTS)]
        if missing := [str(root) for root in roots if not root.is_dir()]:
            raise ValueError(f"the results folder {missing[0]} does not exist")
        dataset, *rest = where
        models = [(tr, [(find.find_trainer(root, dataset, tr, *rest), None) for root in roots])
                  for tr in request.trainers]  # fmt: skip
    given = [part for _, parts in models for part in parts]
    first = given[0][0]
    if len(datasets := sorted({m.dataset for m, _ in given})) > 1:
        raise ValueError(f"the results are of different datasets: {', '.join(datasets)}; compare those of one")
    asked = request.dataset
    if not (asked == first.dataset or (asked.isdigit() and first.dataset.startswith(f"Dataset{int(asked):03d}_"))):
        raise ValueError(f"-d {asked}: the results are of {first.dataset}; give its id or name")
    content, source, notes = _source(request, [m.folder for m, _ in given])
    folds = request.folds or [f for f in first.folds() if f != "all"] or first.folds()
    if not folds:
        raise ValueError(f"{first.folder} has no fold; train one")
    if not request.folds and not request.runs and len(folds) < len(first.folds()):
        notes.append("fold all was left out beside the numbered folds: it validates on the cases it was trained on")
    if unused := sorted({fold for _, fold in given if fold and request.folds} - set(folds)):
        raise ValueError(f"--run names fold {', '.join(unused)}, which -f {' '.join(folds)} leaves out")
    arms = [make_arm(name, [(m, [fold] if fold else folds) for m, fold in parts], source.ending)
            for name, parts in models]  # fmt: skip
    return first.dataset, content, arms, source, notes


def _source(request: Request, folders: Sequence[Path]) -> tuple[dict[str, Any], Source, list[str]]:
    """The dataset.json of the trainings, which must have the same labels; what to score; notes."""
    files = [file for folder in dict.fromkeys(folders) if (file := folder / "dataset.json").is_file()]
    notes = []
    try:
        own = find.find_dataset_json(request.dataset)
        files += [own] if request.predictions or not files else []
    except ValueError:
        if not files:
            raise
        if request.predictions:
            notes.append(f"-d {request.dataset} was not found in nnU-Net's folders; the labels are those of {files[0]}")
    first, labels = read_labels(files[0])
    for file in files[1:]:
        if (other := read_labels(file)[0])["labels"] != first["labels"]:
            raise ValueError(
                f"the label sets differ: {files[0]} has {json.dumps(first['labels'])}, {file} has "
                f"{json.dumps(other['labels'])}; compare trainings of the same labels"
            )
    return first, make_source(request, labels, first, ".nii.gz"), notes


def _stock(variable: str, dataset: str, name: str) -> Path | None:
    """A file or folder of the dataset in one of nnU-Net's folders, None if it is not at hand."""
    folder = find.dataset_if_there(dataset, variable)
    return folder / name if folder and (folder / name).exists() else None


def known_contents(request: Request, dataset_json: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where subjects and groups are looked up: the dataset.json of the trainings, then that in nnU-Net's folders."""
    contents = [dataset_json]
    with suppress(ValueError):
        contents.append(read_labels(find.find_dataset_json(request.dataset))[0])
    return contents


def truth_folder(request: Request, dataset: str) -> Path:
    """The truth: the one given, or the one that nnU-Net validated with."""
    if request.truth is not None:
        if not request.truth.is_dir():
            raise ValueError(f"--truth {request.truth} does not exist")
        return request.truth
    if (folder := _stock(find.PREPROCESSED, dataset, "gt_segmentations")) is None:
        base = os.environ.get(find.PREPROCESSED)
        where = f"in {Path(base, dataset)}" if base else "because nnUNet_preprocessed is not set"
        raise ValueError(f"the true segmentations were not found {where}; give their folder with --truth")
    return folder


def images_folder(request: Request, dataset: str, ending: str, cases: Sequence[str]) -> Path | None:
    """Where the images for the pictures are, None if nowhere."""
    if (given := request.images) is not None:
        if not given.is_dir():
            raise ValueError(f"--images {given} does not exist")
        if not any((given / f"{case}_0000{ending}").is_file() for case in cases):
            raise ValueError(f"--images {given} has no image of {listed(cases)} (CASE_0000{ending})")
        return given
    return None if request.predictions else _stock(find.RAW, dataset, "imagesTr")
