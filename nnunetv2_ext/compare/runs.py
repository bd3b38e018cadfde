"""One finished and validated fold of one training."""

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
TRAINING_FACTS = ("num_epochs", "num_iterations_per_epoch", "batch_size", "initial_lr", "weight_decay",
                  "oversample_foreground_percent")  # fmt: skip


@dataclass(frozen=True)
class FoldRun:
    """A finished and validated fold, or one folder of test predictions (``fold`` is then ``test``)."""

    folder: Path  # fold_N
    fold: str
    predictions: Path
    cases: tuple[str, ...]  # that it predicted
    settings: Mapping[str, Any] = field(default_factory=dict)  # of our trainers, by dotted key; empty for others
    facts: Mapping[str, str] = field(default_factory=dict)  # what nnU-Net's debug.json tells of the training
    # nnU-Net's own by case and structure key, from validation/summary.json; empty for test predictions
    dice: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")

    @property
    def train_cases(self) -> str:
        """How many of the fold's training cases our setting asked for, or their names; ``all`` without it."""
        wanted = self.settings.get("train_cases")
        return ", ".join(sorted(map(str, wanted))) if isinstance(wanted, list) else str(wanted or "all")

    @property
    def training_set(self) -> str:
        """``all``, ``5 of draw 0``, or the names; folds of the same text learned from the same cases."""
        is_number = isinstance(self.settings.get("train_cases"), int)
        return self.train_cases + (f" of draw {self.settings.get('train_cases_seed', 0)}" if is_number else "")

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of an epoch, None if unknown."""
        text = self.facts.get("num_iterations_per_epoch", "")
        return int(text) if text.isdigit() else None

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the whole training, None if unknown."""
        epochs = self.facts.get("num_epochs", "")
        return int(epochs) * self.steps_per_epoch if epochs.isdigit() and self.steps_per_epoch else None


def read_fold(model: Model, fold: str, ending: str) -> FoldRun:
    """A fold's validation.

    ValueError: the fold is missing, its training has not ended, its validation has not been run or was stopped.
    """
    folder = model.folder / f"fold_{fold}"
    if not folder.is_dir():
        there = ", ".join(model.folds()) or "none"
        raise ValueError(f"{model.folder} has no fold {fold} (it has {there}); train it, or compare others with -f")
    validation = folder / "validation"
    summary, facts = validation / "summary.json", _facts(folder)
    train = f"nnUNetv2_train {model.dataset} {model.configuration} {fold} -tr {model.trainer} -p {model.plans}"
    ended = (folder / "checkpoint_final.pth").is_file()
    if not ended and (any(folder.glob("checkpoint_*.pth")) or not summary.is_file()):
        came = _progress(folder, facts.get("num_epochs", "?"))
        raise ValueError(f"{folder} is not finished (no checkpoint_final.pth; {came}): {train} --c")
    if not summary.is_file():
        raise ValueError(f"{folder} is trained but not validated (no validation/summary.json): {train} --val")
    try:
        cases = tuple(case_files(validation, ending, "validation predictions"))
        dice = _read_dice(summary, ending)
        if changed := sorted(set(dice).symmetric_difference(cases)):
            raise ValueError(f"{validation}: {listed(changed)} and summary.json do not agree")
    except ValueError as error:
        raise ValueError(f"{error}: {train} --val") from error
    return FoldRun(folder, fold, validation, cases, _settings(folder), facts, dice)


def _read_dice(summary: Path, ending: str) -> dict[str, dict[str, float]]:
    try:
        rows = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
        # paths have backslashes where the training ran on Windows
        names = [re.split(r"[\\/]", row["prediction_file"])[-1].removesuffix(ending) for row in rows]
        dice = [{key: values["Dice"] for key, values in row["metrics"].items()} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{summary} cannot be read ({error})") from error
    return dict(zip(names, dice, strict=True))


def _progress(folder: Path, planned: str) -> str:
    """How far a training came, from its log."""
    logs = sorted(folder.glob("training_log_*.txt"))
    epochs = re.findall(r"Epoch (\d+)\s*$", logs[-1].read_text(errors="replace"), re.MULTILINE) if logs else []
    return f"the log ends in epoch {int(epochs[-1]) + 1} of {planned}" if epochs else "its log has no epoch"


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as YAML ({' '.join(str(error).split())})") from error


def _facts(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / "debug.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: str(content[key]) for key in TRAINING_FACTS if key in content}
