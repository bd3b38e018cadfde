"""One finished fold of one training, and the arms of a comparison that are made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
# settings that change nothing of the result
_SILENT = ("panel_every", "tensorboard", "save_every", "num_val_iterations_per_epoch", "seed", "train_cases_seed")


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
    def steps(self) -> int | None:
        """Optimiser steps of the whole training, None if unknown."""
        epochs = self.facts.get("num_epochs", "")
        return int(epochs) * self.steps_per_epoch if epochs.isdigit() and self.steps_per_epoch else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of an epoch, None if unknown."""
        text = self.facts.get("num_iterations_per_epoch", "")
        return int(text) if text.isdigit() else None


@dataclass
class Repeat:
    """One training of every fold: the unit over which luck of the training (weights, batches) is averaged.

    Attributes:
        label: ``seed 0``, or the name of its results folder.
        folds: by fold.
    """

    label: str
    folds: dict[str, FoldRun]


@dataclass
class Arm:
    """One of the things compared.

    Attributes:
        name: the trainer, or the name given with ``--run``.
        repeats: trainings of it.
        trainer: None for folders of predictions.
    """

    name: str
    repeats: list[Repeat]
    trainer: str | None = None

    def runs(self) -> list[FoldRun]:
        """Every fold of every repeat."""
        return [run for repeat in self.repeats for run in repeat.folds.values()]


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
    expected = {Path(c["prediction_file"]).name.removesuffix(ending) for c in _summary_cases(summary)}
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
        Path(c["prediction_file"]).name.removesuffix(ending): {k: m["Dice"] for k, m in c["metrics"].items()}
        for c in _summary_cases(file)
    }


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


def make_arm(name: str, parts: Sequence[tuple[Model, Sequence[str]]], ending: str, prefix: str = "") -> Arm:
    """An arm from its models; those of the same results folder are one repeat.

    Args:
        name: shown everywhere.
        parts: models and the folds wanted of each.
        ending: of prediction files.
        prefix: of the label of a repeat without a seed.

    Raises:
        ValueError: a fold is missing or unfinished, or one is given twice.
    """
    by_root: dict[Path, dict[str, FoldRun]] = {}
    for model, folds in parts:
        repeat = by_root.setdefault(model.folder, {})
        for fold in folds:
            if fold in repeat:
                raise ValueError(f"{name}: fold {fold} of {model.folder} was given twice")
            repeat[fold] = read_fold(model, fold, ending)
    return Arm(name, _labelled(by_root), parts[0][0].trainer)


def predictions_arm(name: str, folders: Sequence[Path], ending: str) -> Arm:
    """An arm from folders of test predictions, one per repeat.

    Raises:
        ValueError: a folder is missing or has no prediction.
    """
    by_folder = {}
    for folder in folders:
        cases = tuple(case_files(folder, ending, f"predictions of {name}"))
        by_folder[folder.absolute()] = {"test": FoldRun(folder, "test", folder, cases)}
    if len(by_folder) < len(folders):
        raise ValueError(f"--predictions {name}: a folder was given twice")
    return Arm(name, _labelled(by_folder))


def _labelled(by_folder: Mapping[Path, dict[str, FoldRun]]) -> list[Repeat]:
    """Repeats named by their seed where all seeds are known and differ, else by what differs in their paths."""
    seeds = [{run.seed for run in folds.values()} for folds in by_folder.values()]
    known = [next(iter(s)) for s in seeds if len(s) == 1]
    if len(known) == len(seeds) and None not in known and len(set(known)) == len(known):
        return [Repeat(f"seed {seed}", folds) for seed, folds in zip(known, by_folder.values(), strict=True)]
    if len(by_folder) == 1:
        return [Repeat("repeat 1", folds) for folds in by_folder.values()]
    return [Repeat(label, f) for label, f in zip(_distinct_parts(list(by_folder)), by_folder.values(), strict=True)]


def _distinct_parts(folders: Sequence[Path]) -> list[str]:
    """The last part of each path at which they all differ, or the whole path."""
    for depth in range(1, 1 + min(len(f.parts) for f in folders)):
        names = [f.parts[-depth] for f in folders]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in folders]


def require_comparable(arms: Sequence[Arm], split: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Make sure that all arms predicted the same cases in the same folds.

    Args:
        arms: at least two.
        split: validation cases by fold, of the dataset's splits_final.json.

    Returns:
        Notes for the reader, e.g. that splits_final.json has changed since.

    Raises:
        ValueError: fewer than two arms, equal names, different folds, different cases, or a case in two folds.
    """
    names = [arm.name for arm in arms]
    if len(arms) < 2:
        raise ValueError(f"a comparison needs two or more, but there is only {', '.join(names) or 'none'}")
    if len(set(names)) < len(names):
        raise ValueError(f"two of the compared have the same name: {', '.join(names)}")
    first = arms[0].repeats[0]
    for arm in arms:
        for repeat in arm.repeats:
            if set(repeat.folds) != set(first.folds):
                raise ValueError(
                    f"{arm.name} ({repeat.label}) has the folds {_names(repeat.folds)}, but {arms[0].name} "
                    f"({first.label}) has {_names(first.folds)}; train the missing ones, or compare fewer with -f"
                )
            for fold, run in repeat.folds.items():
                _require_same_cases(run, first.folds[fold], f"{arm.name} ({repeat.label})", f"{arms[0].name}")
    seen: dict[str, str] = {}
    for fold, run in first.folds.items():
        twice = [case for case in run.cases if case in seen]
        if twice:
            raise ValueError(f"{listed(twice)} of fold {fold} were also validated in fold {seen[twice[0]]}: split anew")
        seen.update(dict.fromkeys(run.cases, fold))
    notes = []
    for fold, run in first.folds.items():
        if split is not None and fold in split and set(split[fold]) != set(run.cases):
            notes.append(
                f"fold {fold}: splits_final.json has changed since the trainings; all of them validated the same "
                f"{len(run.cases)} cases, which the file no longer lists as such"
            )
        if fold == "all":
            notes.append("fold all validates on the cases it was trained on: its scores say nothing about new patients")
    steps = {arm.name: sorted({run.steps for run in arm.runs() if run.steps is not None}) for arm in arms}
    if all(steps.values()) and len(set().union(*steps.values())) > 1:
        lengths = ", ".join(f"{name} {' / '.join(map(str, some))}" for name, some in steps.items())
        notes.append(f"the trainings are not equally long (optimiser steps: {lengths})")
    return notes


def _require_same_cases(run: FoldRun, first: FoldRun, name: str, first_name: str) -> None:
    lost, more = sorted(set(first.cases) - set(run.cases)), sorted(set(run.cases) - set(first.cases))
    if lost or more:
        where = "test cases" if run.fold == "test" else f"validation cases of fold {run.fold}"
        parts = [f"{name} has not {listed(lost)}"] if lost else []
        parts += [f"{first_name} has not {listed(more)}"] if more else []
        raise ValueError(
            f"the {where} differ, so that there are no pairs to compare ({'; '.join(parts)}): different splits; train "
            "with the same splits_final.json"
        )


def _names(folds: Mapping[str, FoldRun]) -> str:
    return ", ".join(folds)


def differing_facts(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """What differs between the arms' trainings: setting to its value(s) in each arm that has it, ``-`` elsewhere.

    Seeds and what only concerns logging are left out, and so are settings that a single kind of trainer has and all
    arms of that kind agree on.
    """
    tables = [_facts_of(arm) for arm in arms]
    keys = dict.fromkeys(key for table in tables for key in table)
    having = {key: [table[key] for table in tables if key in table] for key in keys}
    return {key: [t.get(key, "-") for t in tables] for key, values in having.items() if len(set(values)) > 1}


def _facts_of(arm: Arm) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for run in arm.runs():
        values = {"trainer": arm.trainer or "?", **run.facts}
        values |= {k: str(v) for k, v in run.settings.items() if k not in (*_SILENT, *TRAINING_FACTS)}
        values |= {} if run.fold == "test" else {"train_cases": run.train_cases}
        for key, value in values.items():
            found.setdefault(key, set()).add(value)
    return {key: " / ".join(sorted(values)) for key, values in found.items()}
