"""One finished and validated fold of one training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nnunetv2_ext.data.find import Model
from nnunetv2_ext.evaluate.pairs import case_files, listed

SETTINGS_FILE = "nnunetv2_ext_settings.yaml"
TRAINING_FACTS = (
    "num_epochs",
    "num_iterations_per_epoch",
    "batch_size",
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
)


@dataclass(frozen=True)
class FoldRun:
    """A finished and validated fold, or one folder of test predictions (``fold`` is then ``test``).

    Attributes:
        folder: ``fold_N``.
        fold: ``0``.
        predictions: folder of predictions.
        cases: the cases that it predicted.
        settings: of our trainers, by dotted key; empty for others.
        facts: what nnU-Net's debug.json tells of the training, as text.
    """

    folder: Path
    fold: str
    predictions: Path
    cases: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """The seed setting of our trainers."""
        return self.settings.get("seed")

    @property
    def train_cases(self) -> str:
        """How many of the fold's training cases our setting asked for, or their names; ``all`` without it."""
        wanted = self.settings.get("train_cases")
        return ", ".join(sorted(map(str, wanted))) if isinstance(wanted, list) else str(wanted or "all")

    @property
    def training_set(self) -> str:
        """``all``, ``5 of draw 0``, or the names: two trainings of the same fold with the same text learned from the
        same cases."""
        wanted = self.settings.get("train_cases")
        is_number = isinstance(wanted, int)
        return f"{wanted} of draw {self.settings.get('train_cases_seed', 0)}" if is_number else self.train_cases

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the whole training, None if unknown."""
        epochs = self.facts.get("num_epochs", "")
        return int(epochs) * self.steps_per_epoch if epochs.isdigit() and self.steps_per_epoch else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of an epoch, None if unknown."""
        text = self.facts.get("num_iterations_per_epoch", "")
        return int(text) if text.isdigit() else None


def read_fold(model: Model, fold: str, ending: str) -> FoldRun:
    """A fold's validation.

    Raises:
        ValueError: the fold is missing, its training has not ended, its validation has not been run or was stopped.
    """
    folder = model.folder / f"fold_{fold}"
    if not folder.is_dir():
        there = ", ".join(model.folds()) or "none"
        raise ValueError(f"{model.folder} has no fold {fold} (it has {there}); train it, or compare others with -f")
    summary = folder / "validation" / "summary.json"
    if not (folder / "checkpoint_final.pth").is_file() and (
        any(folder.glob("checkpoint_*.pth")) or not summary.is_file()
    ):
        raise ValueError(
            f"{folder} is not finished (no checkpoint_final.pth; {_progress(folder)}): "
            f"nnUNetv2_train {model.dataset} {model.configuration} {fold} -tr {model.trainer} -p {model.plans} --c"
        )
    validate = f"nnUNetv2_train {model.dataset} {model.configuration} {fold} -tr {model.trainer} -p {model.plans} --val"
    if not summary.is_file():
        raise ValueError(f"{folder} is trained but not validated (no validation/summary.json): {validate}")
    try:
        cases = tuple(case_files(folder / "validation", ending, "validation predictions"))
    except ValueError as error:
        raise ValueError(f"{error}: {validate}") from error
    expected = {_case_name(row, ending) for row in _summary_cases(summary)}
    if set(cases) != expected:
        changed = sorted(expected.symmetric_difference(cases))
        raise ValueError(f"{folder / 'validation'}: {listed(changed)} and summary.json do not agree: {validate}")
    return FoldRun(folder, fold, folder / "validation", cases, _settings(folder), _facts(folder))


def nnunet_dice(run: FoldRun, ending: str) -> dict[str, dict[str, float]]:
    """nnU-Net's own Dice by case and structure key, from validation/summary.json; empty for test predictions."""
    file = run.predictions / "summary.json"
    if run.fold == "test" or not file.is_file():
        return {}
    return {
        _case_name(row, ending): {key: values["Dice"] for key, values in row["metrics"].items()}
        for row in _summary_cases(file)
    }


def _case_name(row: Mapping[str, Any], ending: str) -> str:
    """Of a row of summary.json, whose paths have backslashes where the training ran on Windows."""
    return re.split(r"[\\/]", row["prediction_file"])[-1].removesuffix(ending)


def _summary_cases(summary: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{summary} cannot be read ({error}); run the validation again with --val") from error


def _progress(folder: Path) -> str:
    """How far a training came, from its log."""
    logs = sorted(folder.glob("training_log_*.txt"))
    epochs = re.findall(r"Epoch (\d+)\s*$", logs[-1].read_text(errors="replace"), re.MULTILINE) if logs else []
    planned = _facts(folder).get("num_epochs", "?")
    return f"the log ends in epoch {int(epochs[-1]) + 1} of {planned}" if epochs else "its log has no epoch"


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as YAML ({' '.join(str(error).split())})") from error


def _facts(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / "debug.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: str(content[key]) for key in TRAINING_FACTS if key in content}
