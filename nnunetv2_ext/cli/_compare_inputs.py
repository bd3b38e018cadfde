"""What ``nnUNetv2_ext compare`` was asked to compare: its folders found, and checked before anything is scored."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from nnunetv2_ext.compare import runs
from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.data import find
from nnunetv2_ext.evaluate import structures
from nnunetv2_ext.evaluate.datasets import read_object
from nnunetv2_ext.evaluate.folder import Source
from nnunetv2_ext.evaluate.metrics import Rules

ArmModels = list[tuple[str, list[tuple[find.Model, str | None]]]]


def gather(args: argparse.Namespace) -> tuple[str, list[runs.Arm], Source, dict[str, list[str]] | None]:
    """Dataset name, arms, what to score, and the validation cases by fold if they are known.

    Raises:
        ValueError: contradicting arguments, missing or unfinished results, different label sets.
    """
    if bool(args.tr) + bool(args.runs) + bool(args.predictions) != 1:
        raise ValueError(
            "say what to compare in one way: -tr TRAINER TRAINER, or --run NAME DIR, or --predictions NAME DIR"
        )
    for given in (*args.runs, *args.predictions):
        if len(given) < 2:
            raise ValueError(f"{given[0]!r} is a name without a folder: give NAME DIR [DIR ...]")
    return _of_predictions(args) if args.predictions else _of_trainings(args)


def _of_predictions(args: argparse.Namespace) -> tuple[str, list[runs.Arm], Source, None]:
    if args.truth is None:
        raise ValueError("--predictions needs --truth, the folder with the true segmentations of these cases")
    given = [(name, [Path(f) for f in folders]) for name, *folders in args.predictions]
    # nnUNetv2_predict leaves the dataset.json of the training beside its predictions
    files = [f / "dataset.json" for _, folders in given for f in folders if (f / "dataset.json").is_file()]
    file = files[0] if files else find.find_dataset_json(args.d)
    _require_same_labels(file, files)
    source = _source(args, file)
    arms = [runs.predictions_arm(name, folders, source.ending) for name, folders in given]
    return _known_dataset(args) or f"dataset {args.d}", arms, source, None


def _of_trainings(args: argparse.Namespace) -> tuple[str, list[runs.Arm], Source, dict[str, list[str]] | None]:
    models = _models_of_runs(args) if args.runs else _models_of_trainers(args)
    first = models[0][1][0][0]
    datasets = sorted({m.dataset for _, parts in models for m, _ in parts})
    if len(datasets) > 1:
        raise ValueError(f"the results are of different datasets: {', '.join(datasets)}; compare those of one")
    files = [m.folder / "dataset.json" for _, parts in models for m, _ in parts]
    files = [f for f in files if f.is_file()]
    file = files[0] if files else find.find_dataset_json(args.d)
    _require_same_labels(file, files)
    source = _source(args, file)
    folds = args.f or first.folds()
    if not folds:
        raise ValueError(f"{first.folder} has no fold; train one")
    arms = []
    for name, parts in models:
        arms.append(runs.make_arm(name, [(m, [fold] if fold else folds) for m, fold in parts], source.ending))
    return first.dataset, arms, source, _split(first.dataset)


def _models_of_runs(args: argparse.Namespace) -> ArmModels:
    dataset = _known_dataset(args)
    return [
        (name, [find.find_in(Path(folder), dataset, args.p, args.c) for folder in folders])
        for name, *folders in args.runs
    ]


def _models_of_trainers(args: argparse.Namespace) -> ArmModels:
    stock = os.environ.get("nnUNet_results")
    roots = args.results or ([Path(stock)] if stock else [])
    if not roots:
        raise ValueError("nnUNet_results is not set; export it as for nnUNetv2_train, or give --results DIR")
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"the results folder {root} does not exist")
    dataset = find.dataset_name(args.d, roots)
    return [
        (trainer, [(find.find_trainer(root, dataset, trainer, args.p, args.c), None) for root in roots])
        for trainer in args.tr
    ]


def _known_dataset(args: argparse.Namespace) -> str | None:
    """The dataset's folder name if one of nnU-Net's folders knows it; results can be compared without them."""
    try:
        return find.dataset_name(args.d, [])
    except ValueError:
        return None if args.d.isdigit() else args.d


def _source(args: argparse.Namespace, dataset_json: Path) -> Source:
    """What is scored, by the dataset.json of the trainings."""
    content = read_object(dataset_json)
    labels = structures.from_dataset_json(content, str(dataset_json))
    tolerance = structures.tolerances(args.tolerance, labels.structures)
    rules = Rules(tuple(dict.fromkeys(args.metrics)), tolerance, args.empty)
    ending = content.get("file_ending", ".nii.gz")
    return Source(labels, rules, ending, content.get("overwrite_image_reader_writer"), not args.ignore_origin)


def _require_same_labels(first: Path, files: list[Path]) -> None:
    labels = read_object(first).get("labels")
    for file in files:
        others = read_object(file).get("labels")
        if others != labels:
            raise ValueError(
                f"the label sets differ: {first} has {json.dumps(labels)}, {file} has {json.dumps(others)}; compare "
                "trainings of the same labels"
            )


def _split(dataset: str) -> dict[str, list[str]] | None:
    """Validation cases by fold from splits_final.json, None if it is not at hand."""
    base = os.environ.get("nnUNet_preprocessed")
    file = Path(base) / dataset / "splits_final.json" if base else None
    if file is None or not file.is_file():
        return None
    return {str(i): list(fold["val"]) for i, fold in enumerate(read_json(file))}


def truth_folder(args: argparse.Namespace, dataset: str) -> tuple[Path, bool]:
    """The truth, and whether it is the one that nnU-Net validated with."""
    if args.truth is not None:
        if not args.truth.is_dir():
            raise ValueError(f"--truth {args.truth} does not exist")
        return args.truth, False
    base = os.environ.get("nnUNet_preprocessed")
    folder = Path(base or ".") / dataset / "gt_segmentations"
    if not base or not folder.is_dir():
        where = f"in {folder}" if base else "because nnUNet_preprocessed is not set"
        raise ValueError(f"the true segmentations were not found {where}; give their folder with --truth")
    return folder, True


def images_folder(args: argparse.Namespace, dataset: str) -> Path | None:
    """Where the images for the pictures are, None if nowhere."""
    if args.images is not None:
        if not args.images.is_dir():
            raise ValueError(f"--images {args.images} does not exist")
        return args.images
    base = os.environ.get("nnUNet_raw")
    folder = Path(base) / dataset / "imagesTr" if base and not args.predictions else None
    return folder if folder is not None and folder.is_dir() else None
