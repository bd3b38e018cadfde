"""Replacing the guides of a trained model by other cases: its weights stay as they are."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.core.checkpoint import read
from nnunetv2_ext.core.export import export_model
from nnunetv2_ext.core.files import atomic_torch_save, read_json, require_writable
from nnunetv2_ext.core.labelmaps import names_of_values
from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.core.trainer_settings import method_settings_in
from nnunetv2_ext.data.find import require_model
from nnunetv2_ext.data.folders import cases_of_images, find_pairs, preprocess_case
from nnunetv2_ext.data.subjects import members_of, subjects_by_regex
from nnunetv2_ext.jras.bank import stored
from nnunetv2_ext.jras.build import draw_bank, group_ids
from nnunetv2_ext.jras.labels import mask_lut
from nnunetv2_ext.jras.settings import FIRST_DESIGN, JRASSettings, is_of_first_design


class Cases(NamedTuple):
    """Preprocessed cases in memory, as `build.draw_bank` reads nnU-Net's datasets."""

    content: Mapping[str, tuple[Any, Any, dict[str, Any]]]  # image, label, properties

    def load_case(self, case: str) -> tuple[Any, Any, None, dict[str, Any]]:
        image, label, properties = self.content[case]
        return image, label, None, properties


def require_guides(model: Path) -> None:
    """Raises ValueError unless `model` is a model folder that a J-RAS trainer wrote."""
    require_model(model)
    if "jras" not in read_json(model / "plans.json").get(PLANS_KEY, {}):
        raise ValueError(f"{model} was not trained with J-RAS, so it has no guides to replace or to take out")


def replace_bank(
    model: Path,
    images: Path,
    labels: Path,
    output: Path,
    queries: Path | None = None,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> list[Path]:
    """Write `model` to `output` with the guides of other labelled cases; every other tensor is the same bit for bit.

    The source is only read. A training cannot be continued from the result, which has no optimiser's state.

    Args:
        model: TRAINER__PLANS__CONFIGURATION, of a J-RAS trainer.
        images, labels: folders, named as nnU-Net names them (CASE_0000.nii.gz and CASE.nii.gz).
        output: must not exist; nothing is left there if something goes wrong.
        queries: a folder of images that are to be predicted: none of them may be of a subject that guides.
        seed: of the draw of patches.
        tell: gets a line for each thing worth knowing.

    Returns:
        The checkpoints written.

    Raises:
        ValueError: not a J-RAS model with guides, a cascade's second stage excepted; no cases, files that are missing
            or do not fit the model (channels, label values), labels without foreground, or a case among the queries.
    """
    require_guides(model)
    plans_json, dataset_json = (read_json(model / name) for name in ("plans.json", "dataset.json"))
    if is_of_first_design(plans_json.get(PLANS_KEY, {}).get("jras") or {}):
        raise ValueError(FIRST_DESIGN)
    if output.exists():
        raise ValueError(f"{output} exists; name a folder that does not, or remove it")
    settings = method_settings_in(plans_json, "jras", JRASSettings)
    plans, name = PlansManager(plans_json), model.resolve().name.split("__")[-1]
    if name not in plans.available_configurations:
        raise ValueError(f"{model} is not named TRAINER__PLANS__CONFIGURATION: no configuration {name!r} in its plans")
    manager, configuration = plans.get_label_manager(dataset_json), plans.get_configuration(name)
    files = find_pairs(images, labels, dataset_json)
    subjects = _subjects(list(files), queries, dataset_json, plans_json[PLANS_KEY].get("group_regex"))
    dataset = Cases({n: preprocess_case(n, *own, plans, configuration, dataset_json) for n, own in files.items()})
    if not any(np.isin(label, manager.foreground_labels).any() for _, label, _ in dataset.content.values()):
        raise ValueError(
            f"no label of {', '.join(files)} has a foreground voxel, so such guides would say that nothing is there; "
            "give labelled cases, or take all guides out with --strip"
        )
    for value in manager.foreground_labels:
        if not any((label == value).any() for _, label, _ in dataset.content.values()):
            absent = names_of_values(dataset_json).get(value, f"the label value {value}")
            tell(
                f"WARNING: no label has {absent}: no guide shows it, and guides that have it speak against it where "
                "it is. Add a case that has it, or keep the model's own guides"
            )
    patch = configuration.patch_size
    size = settings.bank_size_for(len(patch))
    content = draw_bank(dataset, list(files), patch, size, settings.fg_share, manager, seed)
    groups = group_ids(content.cases, secrets.token_bytes(16), subjects)
    bank = stored(content.images, content.labels, groups, mask_lut(manager))
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=require_writable(output.absolute().parent)))
    try:
        # a model without guides, in which everything else is as it was
        written = export_model(model, partial / output.name, edits=("strip-bank",), tell=lambda text: None)
        for file in written:
            checkpoint = read(file)
            weights = checkpoint["network_weights"] | {f"bank.{name}": value for name, value in bank.items()}
            atomic_torch_save({**checkpoint, "network_weights": weights}, file)
        (partial / output.name).rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size_in_mb = sum(value.nbytes for value in bank.values()) / 1e6
    tell(f"{len(content.cases)} guides of {len(files)} cases: {', '.join(files)}")
    tell(f"PRIVACY: these checkpoints hold {size_in_mb:.1f} MB of image patches of those cases")
    return [output / file.relative_to(partial / output.name) for file in written]


def _subjects(
    cases: Sequence[str], queries: Path | None, dataset_json: Mapping[str, Any], regex: str | None
) -> dict[str, str]:
    """Of the bank's cases; refuses those that are also among the queries'."""
    asked = [] if queries is None else sorted(cases_of_images(queries, dataset_json["file_ending"]))
    if queries is not None and not asked:
        raise ValueError(f"{queries} has no images named CASE_0000{dataset_json['file_ending']}: give those to predict")
    subjects = {case: case for case in (*cases, *asked)}
    if regex is not None:
        for case in subjects:  # names of another site may follow another rule: such a case is its own subject
            try:
                subjects[case] = subjects_by_regex([case], regex)[case]
            except ValueError:
                continue
    members = members_of(cases, subjects)
    for case in asked:
        if subjects[case] in members:
            guide = members[subjects[case]][0]
            raise ValueError(
                f"case {guide} would guide and is of the same subject as {case}, which is to be predicted: its own "
                "mask would be read; take one of the two out"
            )
    return {case: subjects[case] for case in cases}
