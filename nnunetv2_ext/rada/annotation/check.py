"""What of a sparse dataset's annotation reaches training: the report behind ``nnUNetv2_ext check-planes``."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext import __version__
from nnunetv2_ext.core.files import require_writable
from nnunetv2_ext.core.labelmaps import class_names
from nnunetv2_ext.core.orientation import directions_of
from nnunetv2_ext.data.split import clean_fold, read_split
from nnunetv2_ext.rada.annotation.annotations import Annotation, log_lines
from nnunetv2_ext.rada.annotation.lost import erased_annotations, lost_planes, raw_planes, thicken_remedy
from nnunetv2_ext.rada.annotation.picture import CaseView, draw_planes
from nnunetv2_ext.rada.annotation.preprocessed import SparsePreprocessed

Say = Callable[[str], None]


def check(data: SparsePreprocessed, picture: Path | None, cases_in_picture: int = 4, say: Say = print) -> bool:
    """Report planes, shares, survival and warnings, and draw some cases; whether training can start.

    Of `cases_in_picture` cases at most, labelled ones first; `picture` is the PNG to write, or None.

    Raises:
        ValueError: no annotation anywhere, or labels that dataset.json does not declare.
    """
    annotations = data.survey()
    for line in log_lines(annotations):
        say(line)
    survived = _report_survival(data, annotations, say)
    for line in data.warnings(annotations) + erased_annotations(data, annotations):
        say(line)
    _report_split(data.splits_file, annotations, say)
    if picture is not None:
        shown = sorted(annotations, key=lambda case: (-annotations[case].planes.count, case))[:cases_in_picture]
        try:
            require_writable(picture.absolute().parent)
        except ValueError as error:  # a shared folder: the report is what counts
            say(f"no picture, which -o FOLDER puts elsewhere: {str(error).partition(';')[0]}")
        else:
            views = []
            for case in shown:
                image, label, properties = data.read_case(case)
                directions = directions_of(properties, data.plans.transpose_forward)
                planes = annotations[case].planes
                views.append(CaseView(case, np.asarray(image[0]), np.asarray(label[0]), planes, directions))
            classes = class_names(data.dataset_json, data.plans.get_label_manager(data.dataset_json))
            title = f"{data.base.name}, {data.configuration.data_identifier}: annotated planes"
            draw_planes(views, picture, classes, data.configuration.spacing, data.ignore, title)
            say(f"picture: {picture}")
    return survived


def as_dict(data: SparsePreprocessed) -> dict[str, Any]:
    """The report for ``--json``: planes by case, what was lost, and the warnings.

    Raises:
        ValueError: as `check`.
    """
    annotations = data.survey()
    return {
        "nnunetv2_ext": __version__,
        "dataset": data.base.name,
        "plans": data.plans.plans_name,
        "configuration": data.configuration_name,
        "cases": {
            case: {"labelled": a.labelled, "planes": a.planes.indices, "share": a.share, "loose_voxels": a.loose}
            for case, a in annotations.items()
        },
        "lost": [asdict(plane) for plane in lost_planes(data, annotations)],
        "warnings": data.warnings(annotations) + erased_annotations(data, annotations),
    }


def _report_survival(data: SparsePreprocessed, annotations: Mapping[str, Annotation], say: Say) -> bool:
    lost = lost_planes(data, annotations)
    total = sum(a.planes.count for a in raw_planes(data, annotations).values())
    if not lost:
        say(f"all {total} planes of the raw labels are found in the preprocessed ones")
        return True
    for plane in lost:
        say(f"LOST {plane}")
    say(f"preprocessing erased {len(lost)} of {total} annotated planes: {thicken_remedy(data)}")
    return False


def _report_split(file: Path, annotations: Mapping[str, Annotation], say: Say) -> None:
    if not file.is_file():
        say("no splits_final.json yet: nnUNetTrainerRADA writes one that validates on labelled cases only")
        return
    labelled = [case for case, a in annotations.items() if a.labelled]
    for fold, split in enumerate(read_split(file)):
        try:
            train, val = clean_fold(split["train"], split["val"], labelled, say)
        except ValueError as error:
            say(f"WARNING: fold {fold} cannot be trained: {error}")
            continue
        taught = len(set(train) & set(labelled))
        say(f"fold {fold}: {taught} labelled and {len(train) - taught} unlabelled cases train, {len(val)} validate")
