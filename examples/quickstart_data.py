"""The data of quickstart.py: linking a user's dataset, and holding cases out of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

# what dataset.json must hold, with examples (nnU-Net, documentation/dataset_format.md); adopt_dataset sets numTraining
REQUIRED_KEYS = {
    "channel_names": '{"0": "T1"}',
    "labels": '{"background": 0, "liver": 1}',
    "file_ending": '".nii.gz"',
}


class QuickstartError(Exception):
    """A step failed; the text says which and what to do."""


def read_splits(path: Path) -> list[dict[str, list[str]]]:
    """nnU-Net's splits_final.json; an empty list if there is none.

    Raises:
        QuickstartError: the file holds something else or cannot be read.
    """
    if not path.is_file():
        return []
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        return [{part: [str(case) for case in split[part]] for part in ("train", "val")} for split in splits]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise QuickstartError(
            f"{path} is not a split file of nnU-Net ({type(error).__name__}: {error}): fix it, or unset "
            "nnUNet_preprocessed to hold out cases by name"
        ) from error


def inner_splits(splits: list[dict[str, list[str]]], training: Collection[str]) -> list[dict[str, list[str]]]:
    """The folds of `splits` within the cases `training`, so that cases that were kept together stay together.

    Folds without a case to validate, such as the one whose validation cases are held out, are dropped.
    """
    within = [{part: [case for case in cases if case in training] for part, cases in fold.items()} for fold in splits]
    return [fold for fold in within if fold["train"] and fold["val"] and not set(fold["train"]) & set(fold["val"])]


def hold_out(
    training: dict[str, list[Path]], splits: list[dict[str, list[str]]], splits_path: Path | None
) -> dict[str, list[Path]]:
    """Move unseen cases out of `training`, which keeps what may be trained on; says how they were chosen.

    They are the validation cases of fold 0 (what is in neither of its lists is left out: whose it is, is not known),
    or, without a split that fits, the last fifth by name.
    """
    first = splits[0] if splits else {"train": [], "val": []}
    validation = [case for case in first["val"] if case in training]
    train = [case for case in first["train"] if case in training and case not in validation]
    if validation and train:
        unseen = {case: training[case] for case in validation}
        kept = {case: training[case] for case in train}
        training.clear()
        training.update(kept)
        print(
            f"    no labelled test cases: the {len(unseen)} validation cases of fold 0 in {splits_path} are held out "
            f"as unseen, its {len(training)} training cases are trained on\n"
            "    (a split that nnU-Net drew itself knows no patients: then the Dice below may be too high)"
        )
        return unseen
    if splits:
        print(f"    {splits_path} is of other cases: not used")
    names = sorted(training)[-max(1, len(training) // 5) :]
    print(
        f"    no labelled test cases: the last {len(names)} training case(s) are held out as unseen\n"
        "    held out by name, not by patient: if several cases come from one patient the Dice below is too high"
    )
    return {case: training.pop(case) for case in names}


def adopt_dataset(
    source: Path, raw: Path, splits: list[dict[str, list[str]]] | None = None, splits_path: Path | None = None
) -> Path:
    """Link a user's raw dataset into `raw` with unseen cases set apart; `source` is only read.

    Unseen are the cases with both an image in imagesTs and a label in labelsTs; if there are none, `hold_out` chooses.

    Args:
        source: the dataset's folder.
        raw: where to link it.
        splits: nnU-Net's folds of this dataset, if they are known.
        splits_path: where they were read, for messages.

    Raises:
        QuickstartError: `source` is not a raw dataset, has no labelled case to train on or none to hold out, or lists
            a file that is not there.
    """
    description = read_description(source)
    ending = description["file_ending"]
    training, unseen = (labelled_cases(source, split, description) for split in ("Tr", "Ts"))
    needed = 1 if unseen else 2  # one to train on, one to hold out
    if len(training) < needed:
        raise QuickstartError(
            f"--dataset {source} has {len(training)} labelled training case(s): it needs at least {needed}, "
            f"each with imagesTr/CASE_0000{ending} and labelsTr/CASE{ending}"
        )
    if not unseen:
        unseen = hold_out(training, splits or [], splits_path)

    folder = raw / source.name
    for split, cases in (("Tr", training), ("Ts", unseen)):
        for case, files in cases.items():
            *images, label = files
            for channel, image in enumerate(images):
                link(image, folder / f"images{split}" / f"{case}_{channel:04d}{ending}")
            link(label, folder / f"labels{split}" / f"{case}{ending}")
            for kind, file in (("images", images[0]), ("labels", label)):
                sidecar = file.with_name(f"{case}.json")  # spacing of TIFF files
                if sidecar.is_file():
                    link(sidecar, folder / f"{kind}{split}" / sidecar.name)
    description.pop("dataset", None)  # an explicit file list: the links follow the standard layout
    description["numTraining"] = len(training)
    (folder / "dataset.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    return folder


def labelled_cases(dataset: Path, split: str, description: dict[str, Any]) -> dict[str, list[Path]]:
    """Case -> its images in the order of the channels, then its label; cases without one of both are left out.

    Raises:
        QuickstartError: dataset.json lists its files in another form than nnU-Net's.
    """
    if split == "Tr" and "dataset" in description:  # an explicit list, relative to the dataset's folder
        try:
            return {
                case: [dataset / os.path.expandvars(file) for file in (*files["images"], files["label"])]
                for case, files in description["dataset"].items()
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise QuickstartError(
                f'the "dataset" of {dataset / "dataset.json"} is no list of files ({type(error).__name__}: {error}): '
                'give each case its files as {"CASE": {"images": [...], "label": "..."}}, or remove "dataset"'
            ) from error
    ending, cases = description["file_ending"], {}
    images = sorted((dataset / f"images{split}").glob(f"*{ending}"))
    for label in sorted((dataset / f"labels{split}").glob(f"*{ending}")):
        case = label.name[: -len(ending)]
        pattern = re.compile(re.escape(case) + r"_\d{4}" + re.escape(ending))
        channels = [image for image in images if pattern.fullmatch(image.name)]
        if channels:
            cases[case] = [*channels, label]
    return cases


def link(source: Path, target: Path) -> None:
    """Symbolic link, or a copy where the system refuses links (Windows without developer mode).

    Raises:
        QuickstartError: there is no file `source`, to which a link could be made all the same.
    """
    if not source.is_file():
        raise QuickstartError(f"{source} is not there: put it back, or take its case out of the dataset")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copy2(source, target)


def read_description(dataset: Path) -> dict[str, Any]:
    """The contents of a dataset's dataset.json.

    Raises:
        QuickstartError: `dataset` is not a raw dataset, or its dataset.json cannot be read or lacks what nnU-Net needs.
    """
    path = dataset / "dataset.json"
    if not re.fullmatch(r"Dataset\d{3}_.+", dataset.name) or not path.is_file():
        raise QuickstartError(
            f"--dataset {dataset} is no nnU-Net raw dataset: expected DatasetXXX_Name with a dataset.json"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QuickstartError(f"{path} cannot be read as JSON ({error}): fix it") from error
    if not isinstance(description, dict):
        raise QuickstartError(f"{path} holds a {type(description).__name__} instead of a JSON object: fix it")
    channels = description.get("channel_names", description.get("modality"))  # nnU-Net still reads the old name
    labels, ending = description.get("labels"), description.get("file_ending")
    fits = {
        "channel_names": isinstance(channels, dict) and channels,
        "labels": isinstance(labels, dict) and "background" in labels,  # nnU-Net v1 had them the other way round
        "file_ending": isinstance(ending, str) and ending.startswith("."),
    }
    wrong = [f'"{key}" (such as {example})' for key, example in REQUIRED_KEYS.items() if not fits[key]]
    if wrong:
        raise QuickstartError(
            f"{path} has no valid {', '.join(wrong)}: add what nnU-Net's documentation/dataset_format.md asks for"
        )
    return description
