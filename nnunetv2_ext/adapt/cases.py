"""The given cases: found, compared with what the model knows, and preprocessed with the model's plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_ext.adapt.model import FinishedModel
from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import Volume, read_image, read_label_map, require_same_grid, short, spacing_of
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.data.folders import find_pairs
from nnunetv2_ext.data.raw import declared_values

FAR = 2.0  # spacing and the plans' differ by more than this factor: ours


@dataclass(frozen=True)
class Given:
    """A labelled case of the new site."""

    case: str
    images: tuple[Path, ...]  # one a channel
    label: Path
    previous: Path | None = None  # segmentation by the previous stage of a cascade


def find_cases(images: Path, labels: Path, model: FinishedModel, previous: Path | None = None) -> list[Given]:
    """The cases of two folders, named as in a raw nnU-Net dataset: CASE_0000.nii.gz and CASE.nii.gz.

    Raises:
        ValueError: a folder, an image, a label or a channel is missing, or a dataset.json beside them names other
            channels or labels than the model.
    """
    if images.resolve().parent == labels.resolve().parent and (images.parent / "dataset.json").is_file():
        _compare_site(images.parent / "dataset.json", model)
    ending, given = str(model.dataset_json["file_ending"]), []
    for case, (files, label) in find_pairs(images, labels, model.dataset_json).items():
        stage = None if previous is None else previous / f"{case}{ending}"
        if stage is not None and not stage.is_file():
            raise ValueError(f"case {case} has no segmentation {stage} by the previous stage: predict it with that "
                             "stage's model (nnUNetv2_predict)")  # fmt: skip
        given.append(Given(case, tuple(files), label, stage))
    return given


def _compare_site(file: Path, model: FinishedModel) -> None:
    site = read_json(file)
    theirs = channel_names(site)
    if theirs and theirs != model.channels:
        raise ValueError(
            f"{file} declares the channels {', '.join(theirs)}, the model was trained on {', '.join(model.channels)}: "
            "adapt a model of these channels, or correct the file if only the names differ"
        )
    known = model.dataset_json["labels"]
    for name, value in (site.get("labels") or {}).items():
        if name == "ignore":
            continue
        if name not in known:
            raise ValueError(f"{file} declares the label {name}, which the model does not know (it has "
                             f"{', '.join(known)}): train a new model for another label set")  # fmt: skip
        if not np.array_equal(np.atleast_1d(value), np.atleast_1d(known[name])):
            raise ValueError(f"{file} gives {name} the label {value}, the model {known[name]}: renumber the labels as "
                             "the model has them")  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """What reading all given cases told: which structures each case has drawn, and lines for the user."""

    drawn: dict[str, set[str]]
    warnings: list[str]


def check_cases(cases: Sequence[Given], model: FinishedModel, not_drawn: Sequence[str], ignore: int | None) -> Checked:
    """Read every case and compare it with what the model knows.

    Args:
        cases: from `find_cases`.
        model: what they are compared with.
        not_drawn: structures that the labels leave in the background.
        ignore: value in the label files that marks what nobody looked at, besides the model's own.

    Raises:
        ValueError: `ignore` is a label, a file is damaged, image and label do not fit, a value is unknown, a case has
            no annotated voxel, or a structure is absent from all labels and not named as not drawn, or the reverse.
    """
    known = declared_values(model.dataset_json["labels"])
    if ignore in known and ignore != model.labels.ignore_label:
        name = next(n for n, v in model.dataset_json["labels"].items() if ignore in np.atleast_1d(v))
        raise ValueError(f"--ignore {ignore} is the label of {name}: give unknown voxels a value of their own")
    reader = model.plans.image_reader_writer_class()
    ignored = {ignore, model.labels.ignore_label} - {None}
    values: dict[str, set[int]] = {}
    warnings = []
    median = np.array(model.plans.plans["original_median_spacing_after_transp"], dtype=float)
    for given in progress_bar(cases, "reading the cases"):
        image, of_image = read_image(given.case, given.images, reader)
        label, of_label = read_label_map(given.case, given.label, reader)
        require_same_grid(given.case, Volume("label", label.shape, of_label),
                          Volume("image", image.shape[1:], of_image), "draw the label on this image")  # fmt: skip
        values[given.case] = {int(value) for value in np.unique(label)}
        if unknown := sorted(values[given.case] - known - ignored):
            remedy = f", or say --ignore {unknown[0]} if it marks what nobody looked at" if len(unknown) == 1 else ""
            raise ValueError(
                f"case {given.case}: {given.label} holds the label {', '.join(map(str, unknown[:5]))}, which the model "
                f"does not know (it has {_told(model.dataset_json['labels'])}): correct the file{remedy}"
            )
        if values[given.case] <= ignored:
            raise ValueError(f"case {given.case}: {given.label} has no annotated voxel: annotate it, or leave it out")
        spacing = spacing_of(of_image)[model.plans.transpose_forward]
        first = 1 if len(model.configuration.patch_size) == 2 else 0  # of a 2-D model slices may lie anywhere
        ratio = np.maximum(spacing / median, median / spacing)[first:]
        if ratio.max() > FAR:
            warnings.append(
                f"case {given.case} has a spacing of {short(spacing)} mm, the model's cases {short(median)} mm: "
                f"{ratio.max():.1f} times apart"
            )
    drawn = {
        case: {name for name, value in model.structures.items() if found & {int(v) for v in np.atleast_1d(value)}}
        for case, found in values.items()
    }
    present = set().union(*drawn.values())
    if both := [name for name in not_drawn if name in present and not model.labels.has_regions]:
        case = next(case for case, names in drawn.items() if both[0] in names)
        raise ValueError(f"{both[0]} is drawn, in case {case}: leave it out of --not-drawn")
    if absent := [name for name in model.structures if name not in present and name not in not_drawn]:
        raise ValueError(
            f"no given label has {', '.join(absent)}, which the model knows and would forget: if the new site does "
            f"not draw it, say --not-drawn {' '.join(absent)}; else add a case that has it"
        )
    return Checked(drawn, warnings)


def _told(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in labels.items())


def dataset_json_with_ignore(model: FinishedModel, ignore: int | None) -> dict[str, Any]:
    """The model's dataset.json; where the labels have an ignore value and it has none, with one."""
    content = dict(model.dataset_json)
    if ignore is not None and model.labels.ignore_label is None:
        content["labels"] = {**content["labels"], "ignore": max(declared_values(content["labels"])) + 1}
    return content


def preprocess(
    cases: Sequence[Given],
    model: FinishedModel,
    dataset_json: dict[str, Any],
    folder: Path,
    ignore: int | None,
    previous: Path | None = None,
) -> None:
    """Write the cases as nnU-Net preprocesses them for the model's configuration; those that are there stay.

    Args:
        cases: checked by `check_cases`.
        model: whose plans are used.
        dataset_json: with an ignore label if `ignore` is given.
        folder: of the configuration, in a preprocessed dataset.
        ignore: value in the label files.
        previous: where the previous stage's segmentations go, for a cascade.
    """
    preprocessor = model.configuration.preprocessor_class(verbose=False)
    reader = model.plans.image_reader_writer_class()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = model.plans, model.configuration, dataset_json
    for given in progress_bar(cases, "preprocessing"):
        if (folder / f"{given.case}.pkl").is_file():  # written last
            continue
        label = str(given.label)
        if ignore is not None and ignore != dataset_json["labels"]["ignore"]:
            content, properties = reader.read_seg(label)
            content[content == ignore] = dataset_json["labels"]["ignore"]
            label = str(folder.parent / f"{given.case}{dataset_json['file_ending']}")
            reader.write_seg(content[0].astype(np.int16), label, properties)
        images = [str(file) for file in given.images]
        if given.previous is not None and previous is not None:
            previous.mkdir(parents=True, exist_ok=True)
            _, stage, _ = preprocessor.run_case(images, str(given.previous), *arguments)
            nnUNetDatasetBlosc2.save_seg(np.maximum(stage[0], 0).astype(np.uint8), str(previous / given.case))
        preprocessor.run_case_save(str(folder / given.case), images, label, *arguments)


def read_truth(given: Given, model: FinishedModel, ignore: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Label map ``(X, Y, Z)`` in array order, and a mask of what nobody looked at; None where all was."""
    label, _ = read_label_map(given.case, given.label, model.plans.image_reader_writer_class())
    ignored = [value for value in (ignore, model.labels.ignore_label) if value is not None]
    return label, np.isin(label, ignored) if ignored else None
