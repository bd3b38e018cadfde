"""Export: a model folder that plain nnU-Net, without this package, predicts with."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.core.files import atomic_torch_save, atomic_write_text, require_writable
from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.core.trainer import ExtTrainer

# What nnU-Net's own zip export takes along besides checkpoints, plans.json and dataset.json
_COMPANIONS = ("dataset_fingerprint.json",)
_FOLD_COMPANIONS = ("debug.json", "progress.png", "validation/summary.json")
STOCK_TRAINER = nnUNetTrainer.__name__


def export_model(model_folder: Path, output: Path, weights: str = "student", strip_bank: bool = False) -> list[Path]:
    """Write ``model_folder`` (TRAINER__PLANS__CONFIGURATION) to ``output`` as a model of the stock nnUNetTrainer.

    Every checkpoint of every fold gets the chosen weights under ``network_weights`` and the stock trainer's name, and
    loses this package's key and the optimiser's state. The source is only read.

    Args:
        model_folder: holds plans.json, dataset.json and the fold folders.
        output: must not exist; nothing is left there if something goes wrong.
        weights: which network, see the trainer's ``export_weights``.
        strip_bank: instead of a stock model write one of the same trainer that holds no patients' patches
            (``without_patient_data``); it needs this package to predict.

    Returns:
        The checkpoints written.

    Raises:
        ValueError: no model folder, output exists, not one of our trainers, or no such weights.
    """
    missing = [name for name in ("plans.json", "dataset.json") if not (model_folder / name).is_file()]
    files = sorted(model_folder.glob("fold_*/checkpoint_*.pth"))
    if missing or not files:
        raise ValueError(
            f"{model_folder} is no trained model folder ({', '.join(missing) or 'fold_*/checkpoint_*.pth'} missing); "
            "give the folder named TRAINER__PLANS__CONFIGURATION below nnUNet_results"
        )
    if output.exists():
        raise ValueError(f"{output} exists; name a folder that does not, or remove it")
    # beside the output, so that the rename stays on one disk; a name of our own, so that nobody's folder is touched
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=require_writable(output.parent)))
    try:
        written = [
            _export_checkpoint(file, partial / file.relative_to(model_folder), weights, strip_bank) for file in files
        ]
        plans = json.loads((model_folder / "plans.json").read_text())
        if not strip_bank:
            plans.pop(PLANS_KEY, None)
        atomic_write_text(partial / "plans.json", json.dumps(plans, indent=2))
        folds = sorted({file.parent.relative_to(model_folder) for file in files})
        _copy(
            model_folder,
            partial,
            ["dataset.json", *_COMPANIONS, *(str(fold / name) for fold in folds for name in _FOLD_COMPANIONS)],
        )
        partial.chmod(model_folder.stat().st_mode & 0o777)  # mkdtemp lets nobody else in
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [output / path.relative_to(partial) for path in written]


def _export_checkpoint(source: Path, target: Path, weights: str, strip_bank: bool) -> Path:
    checkpoint = read(source)
    trainer = _trainer_of(checkpoint, source)
    if strip_bank:
        checkpoint = trainer.without_patient_data(checkpoint)
    exported: dict[str, Any] = {
        key: value
        for key, value in checkpoint.items()
        if key not in (EXTENSION_KEY, "optimizer_state", "grad_scaler_state")
    }
    if not strip_bank:
        exported["network_weights"] = trainer.export_weights(checkpoint, weights)
        exported["trainer_name"] = STOCK_TRAINER
        exported["init_args"] = copy.deepcopy(checkpoint["init_args"])
        exported["init_args"]["plans"].pop(PLANS_KEY, None)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_torch_save(exported, target)
    return target


def _trainer_of(checkpoint: dict[str, Any], source: Path) -> type[ExtTrainer]:
    name = checkpoint.get("trainer_name", "an unnamed trainer")
    try:
        trainer = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:  # nnU-Net's for a name it does not find
        raise ValueError(
            f"{source} was trained with {name}, which nnU-Net does not find here: install the package it comes from "
            "(`nnUNetv2_ext doctor` lists our trainers)"
        ) from error
    if not issubclass(trainer, ExtTrainer):
        raise ValueError(f"{source} was trained with {name}, which is none of our trainers; there is nothing to export")
    return trainer


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
