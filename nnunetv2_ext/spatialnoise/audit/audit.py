"""Auditing the labels of a dataset, case by case; an interrupted audit goes on."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext.core.files import atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.labelmaps import names_of_values, structures_of
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import read_image, spacing_of
from nnunetv2_ext.data.channels import are_colours, channel_names
from nnunetv2_ext.data.find import RAW, nnunet_folder
from nnunetv2_ext.data.preprocessed import file_stamp
from nnunetv2_ext.data.raw import RawDataset, declared_values, open_raw
from nnunetv2_ext.spatialnoise.audit.error_map import write_map
from nnunetv2_ext.spatialnoise.audit.panel import draw_case
from nnunetv2_ext.spatialnoise.audit.predictions import Predictions, open_predictions
from nnunetv2_ext.spatialnoise.audit.verdict import judge

MAPS, PANELS = "error_probability", "panels"
_CASES, _REQUEST = ".cases", "request.json"  # of an audit under way, and what it was asked
SPATIAL_RHO = 0.5  # between neighbours along the finest axis, where errors are allowed to hang together


@dataclass(frozen=True)
class Audited:
    """What an audit found.

    Attributes:
        dataset: the raw dataset whose labels were judged.
        title: whose predictions judged them.
        records: worst first; each has ``case``, ``summary``, ``classes`` and ``regions`` (`verdict.Verdict`).
        seen: cases that nobody judged, because every model had trained on them.
        without: cases of the dataset without prediction for another reason.
        rho: 0: every voxel was judged by itself.
        output: the folder.
    """

    dataset: RawDataset
    title: str
    records: list[dict[str, Any]]
    seen: list[str]
    without: list[str]
    rho: float
    output: Path


def audit(
    sources: Sequence[Path],
    output: Path,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    spatial: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Audited:
    """Judge every label by a model that has not trained on it, and write a map and a picture a case.

    A folder that an audit with the same arguments left is gone on with; a case whose label or prediction has
    changed since is judged again. Nothing is written but below `output`.

    Args:
        sources: a model folder, or folders with saved probabilities.
        output: new, empty, or of the same audit.
        folds, checkpoint: of the model; default: all finished folds.
        spatial: let the errors of neighbours support one another (rho 0.5).
        device: of torch.
        say: for warnings.

    Raises:
        ValueError: as `predictions.open_predictions`; raw labels that are gone, damaged or of other classes than the
            model's; an output that is of something else or lies below nnUNet_raw.
    """
    predictions = open_predictions(sources, folds, checkpoint, device)
    dataset = _labels_of(predictions)
    if unknown := sorted(set(predictions.cases) - set(dataset.cases)):
        raise ValueError(
            f"case {unknown[0]} has a prediction and no label in {dataset.folder}: move the prediction away, or "
            "restore the label"
        )
    rho = SPATIAL_RHO if spatial else 0.0
    key = json.loads(json.dumps({**predictions.key, "dataset": dataset.name, "rho": rho}))
    work = _open_output(output, key)
    if predictions.seen:
        say(
            f"WARNING: every finished fold has trained on {len(predictions.seen)} of {len(dataset.cases)} cases, which "
            "are not judged: train the other folds"
        )
    records = []
    for case in progress_bar(predictions.cases, "audit"):
        file = work / f"{case}.json"
        stamp = [file_stamp(Path(dataset.files[case]["label"])), predictions.stamp(case)]
        record = read_json(file) if file.is_file() else None
        if record is None or record["files"] != stamp:
            record = {"case": case, "files": stamp, **_judge_case(case, predictions, dataset, rho, output, work)}
            atomic_write_text(file, json.dumps(record) + "\n")
        records.append(record)
    # NaN (nothing labelled, nothing predicted) was written by json as NaN and is read as such
    records.sort(key=lambda record: (-record["summary"]["score"], record["case"]))
    _rank_panels(records, work, output / PANELS)
    without = sorted(set(dataset.cases) - set(predictions.cases) - set(predictions.seen))
    return Audited(dataset, predictions.title, records, predictions.seen, without, rho, output)


def panel_name(rank: int, case: str) -> str:
    """File of a case's picture in the folder of the panels."""
    return f"{rank:04d}_{case}.png"


def _labels_of(predictions: Predictions) -> RawDataset:
    name = predictions.dataset
    try:
        dataset = open_raw(name)
    except ValueError as error:
        raise ValueError(f"the labels that {name}'s model was trained with are not there: {error}") from error
    ours, theirs = predictions.dataset_json["labels"], dataset.json["labels"]
    if ours != theirs:
        odd = sorted(declared_values(theirs) ^ declared_values(ours))
        what = f"value {odd[0]}" if odd else "another name or order"
        raise ValueError(
            f"dataset.json of {dataset.folder} declares other labels than the model knows ({what}): restore the labels "
            "that the model was trained with"
        )
    return dataset


def _open_output(output: Path, key: dict[str, Any]) -> Path:
    """The hidden folder of what is done; ValueError if the folder is not ours, or of another audit."""
    # an unset nnUNet_raw was refused by open_raw
    if nnunet_folder(RAW).resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"-o {output} lies below nnUNet_raw, where an audit writes nothing: name another folder")
    work = output / _CASES
    if output.is_dir() and any(output.iterdir()):
        if not (work / _REQUEST).is_file():
            raise ValueError(f"{output} is not empty and no audit: nothing is overwritten; name another folder")
        if read_json(work / _REQUEST) != key:
            raise ValueError(
                f"{output} is the audit of other predictions or other options: name another folder, or remove it"
            )
    require_writable(output)
    for folder in (work, output / MAPS):
        folder.mkdir(exist_ok=True)
    atomic_write_text(work / _REQUEST, json.dumps(key) + "\n")
    return work


def _judge_case(
    case: str, predictions: Predictions, dataset: RawDataset, rho: float, output: Path, work: Path
) -> dict[str, Any]:
    label, properties = dataset.read_label(case)
    segmentation, probabilities = predictions.predict(case)
    if label.shape != probabilities.shape[1:]:
        raise ValueError(
            f"case {case}: its label has shape {label.shape}, its prediction {probabilities.shape[1:]}: the image was "
            "changed after the prediction; preprocess and predict again"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError(f"case {case}: its prediction holds NaN or infinite values: look at the model's training")
    labels, names = predictions.plans.get_label_manager(dataset.json), names_of_values(dataset.json)
    found = judge(
        probabilities,
        segmentation,
        label,
        dataset.ignore,
        structures_of(dataset.json, labels),
        names,
        labels.has_regions,
        spacing_of(properties),
        rho,
    )
    write_map(found.error, properties, output / MAPS / f"{case}.nii.gz")
    colours = are_colours(channel_names(dataset.json))  # in one file or in three
    image, of_image = read_image(case, dataset.files[case]["images"][: 3 if colours else 1], dataset.reader)
    unit = "voxels" if len(label) > 1 else "pixels"
    wrong = f"about {found.summary['expected_wrong_voxels']:.0f} wrong {unit}"
    subtitle = f"{wrong}, {found.summary['score']:.1%} of its structures"
    classes = names if dataset.ignore is None else {**names, dataset.ignore: "ignore"}
    shown, panel = image[: 3 if colours else 1], work / f"{case}.png"
    draw_case(case, shown, label, segmentation, found.error, of_image, classes, subtitle, panel)
    return {"summary": found.summary, "classes": found.classes, "regions": found.regions}


def _rank_panels(records: Sequence[dict[str, Any]], work: Path, panels: Path) -> None:
    shutil.rmtree(panels, ignore_errors=True)
    panels.mkdir()
    for rank, record in enumerate(records, 1):
        shutil.copy(work / f"{record['case']}.png", panels / panel_name(rank, record["case"]))
