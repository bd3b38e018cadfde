"""What of a sparse dataset's annotation reaches training: the report behind ``nnUNetv2_ext check``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_ext.core.files import require_writable
from nnunetv2_ext.core.labelmaps import class_names
from nnunetv2_ext.rada.draw import CaseView, draw_planes
from nnunetv2_ext.rada.fingerprint import needs_fix
from nnunetv2_ext.rada.split import clean_fold
from nnunetv2_ext.rada.survey import (
    Annotation,
    cache_path,
    log_lines,
    require_annotations,
    require_ignore_label,
    survey_cases,
    warnings,
)
from nnunetv2_ext.rada.survival import lost_planes, raw_planes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Preprocessed:
    """A preprocessed 3-D configuration with an ignore label."""

    base: Path  # nnUNet_preprocessed/<Dataset>
    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]
    ignore: int

    @property
    def folder(self) -> Path:
        return self.base / self.configuration.data_identifier


def open_preprocessed(dataset: int | str, configuration: str, plans_name: str = "nnUNetPlans") -> Preprocessed:
    """Open what ``nnUNetv2_plan_and_preprocess`` made.

    Raises:
        ValueError: it is missing, 2-D, a cascade, has regions or no ignore label.
    """
    if not nnUNet_preprocessed.is_set():
        raise ValueError("nnUNet_preprocessed is not set; export it as for nnUNetv2_train")
    try:
        base = Path(nnUNet_preprocessed) / maybe_convert_to_dataset_name(dataset)
    except RuntimeError as error:
        raise ValueError(f"there is no (or more than one) dataset {dataset} in nnU-Net's folders") from error
    remedy = f"run nnUNetv2_plan_and_preprocess -d {dataset} -c {configuration}"
    try:
        plans = PlansManager(json.loads((base / f"{plans_name}.json").read_text(encoding="utf-8")))
        dataset_json = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{error.filename} is missing: {remedy}") from error
    if configuration not in plans.available_configurations:
        raise ValueError(f"{plans_name} has {', '.join(plans.available_configurations)}, not {configuration!r}")
    manager = plans.get_configuration(configuration)
    if len(manager.patch_size) != 3 or manager.previous_stage_name is not None:
        raise ValueError(f"{configuration} is 2-D or a cascade, which RADA does not train: use 3d_fullres or 3d_lowres")
    labels = plans.get_label_manager(dataset_json)
    if labels.has_regions:
        raise ValueError(f"{base.name} is trained on regions, which RADA does not support; declare plain labels")
    ignore = require_ignore_label(labels.ignore_label)
    found = Preprocessed(base, plans, manager, dataset_json, ignore)
    if not found.folder.is_dir():
        raise ValueError(f"{found.folder} is missing: {remedy}")
    return found


def check(data: Preprocessed, picture: Path | None, cases_in_picture: int = 4, say: Say = print) -> bool:
    """Report planes, shares, survival and warnings, and draw some cases; whether training can start.

    Args:
        data: What to look at.
        picture: PNG to write, or None.
        cases_in_picture: At most so many, labelled ones first.
        say: Gets each line.

    Raises:
        ValueError: no annotation anywhere, or labels that dataset.json does not declare.
    """
    cases = infer_dataset_class(str(data.folder)).get_identifiers(str(data.folder))
    cache = cache_path(data.base, data.configuration.data_identifier)
    annotations = survey_cases(data.folder, cases, data.ignore, cache)
    labels = data.plans.get_label_manager(data.dataset_json)
    require_annotations(annotations, set(labels.all_labels))
    for line in log_lines(annotations):
        say(line)
    survived = _report_survival(data, annotations, say)
    for line in warnings(annotations, data.dataset_json["labels"]):
        say(line)
    if needs_fix(data.plans.plans, data.base):
        say(
            "WARNING: CT intensities in the plans were measured with ignored voxels as foreground: run "
            f"nnUNetv2_ext fix-fingerprint -d {data.base.name} and preprocess again"
        )
    _report_split(data.base / "splits_final.json", annotations, say)
    if picture is not None:
        shown = sorted(annotations, key=lambda case: (-annotations[case].planes.count, case))[:cases_in_picture]
        _draw(data, {case: annotations[case] for case in shown}, picture)
        say(f"picture: {picture}")
    return survived


def _draw(data: Preprocessed, annotations: Mapping[str, Annotation], picture: Path) -> None:
    dataset = infer_dataset_class(str(data.folder))(str(data.folder), list(annotations))
    views = []
    for case, annotation in annotations.items():
        image, label, _, _ = dataset.load_case(case)
        views.append(CaseView(case, np.asarray(image[0]), np.asarray(label[0]), annotation.planes))
    require_writable(picture.absolute().parent)
    classes = class_names(data.dataset_json, data.plans.get_label_manager(data.dataset_json))
    title = f"{data.base.name}, {data.configuration.data_identifier}: annotated planes"
    draw_planes(views, picture, classes, data.configuration.spacing, data.ignore, title)


def _report_survival(data: Preprocessed, annotations: Mapping[str, Annotation], say: Say) -> bool:
    where = (data.base, annotations, data.plans, data.configuration, data.dataset_json, data.ignore)
    lost = lost_planes(*where)
    total = sum(a.planes.count for a in raw_planes(*where).values())
    if not lost:
        say(f"all {total} planes of the raw labels are found in the preprocessed ones")
        return True
    for plane in lost:
        say(f"LOST {plane}")
    say(
        f"preprocessing erased {len(lost)} of {total} annotated planes: run nnUNetv2_ext sparsify -d "
        f"{data.base.name[7:10].lstrip('0')} -o NEW_ID --thicken-only, then plan and preprocess NEW_ID"
    )
    return False


def _report_split(file: Path, annotations: Mapping[str, Annotation], say: Say) -> None:
    if not file.is_file():
        say("no splits_final.json yet: nnUNetTrainerRADA writes one that validates on labelled cases only")
        return
    labelled = [case for case, a in annotations.items() if a.labelled]
    for fold, split in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        try:
            train, val = clean_fold(split["train"], split["val"], labelled, say)
        except ValueError as error:
            say(f"WARNING: fold {fold} cannot be trained: {error}")
            continue
        taught = len(set(train) & set(labelled))
        say(f"fold {fold}: {taught} labelled and {len(train) - taught} unlabelled cases train, {len(val)} validate")
