"""The things that are compared: arms, each of repeated trainings, each of finished folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_ext.compare.runs import TRAINING_FACTS, FoldRun, read_fold
from nnunetv2_ext.data.find import Model
from nnunetv2_ext.evaluate.pairs import case_files, listed

# settings that change nothing of the result
_SILENT = ("panel_every", "tensorboard", "save_every", "num_val_iterations_per_epoch", "seed", "train_cases_seed")
ALLOW_TRAINING_CASES = "--allow-different-training-cases"


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


def make_arm(name: str, parts: Sequence[tuple[Model, Sequence[str]]], ending: str) -> Arm:
    """An arm from its models; those of the same results folder, however it is spelled, are one repeat.

    Args:
        name: shown everywhere.
        parts: models and the folds wanted of each.
        ending: of prediction files.

    Raises:
        ValueError: a fold is missing or unfinished, one is given twice, or two repeats have the same seed.
    """
    by_folder: dict[Path, tuple[Path, dict[str, FoldRun]]] = {}
    for model, folds in parts:
        _, repeat = by_folder.setdefault(model.folder.resolve(), (model.folder.absolute(), {}))
        for fold in folds:
            if fold in repeat:
                raise ValueError(f"{name}: fold {fold} of {model.folder} was given twice")
            repeat[fold] = read_fold(model, fold, ending)
    return Arm(name, _labelled(name, list(by_folder.values())), parts[0][0].trainer)


def predictions_arm(name: str, folders: Sequence[Path], ending: str) -> Arm:
    """An arm from folders of test predictions, one per repeat.

    Raises:
        ValueError: a folder is missing, has no prediction, or is given twice, however it is spelled.
    """
    by_folder = {}
    for folder in folders:
        cases = tuple(case_files(folder, ending, f"predictions of {name}"))
        by_folder[folder.resolve()] = (folder.absolute(), {"test": FoldRun(folder, "test", folder, cases)})
    if len(by_folder) < len(folders):
        raise ValueError(f"--predictions {name}: a folder was given twice")
    return Arm(name, _labelled(name, list(by_folder.values())))


def _labelled(name: str, trainings: Sequence[tuple[Path, dict[str, FoldRun]]]) -> list[Repeat]:
    """Repeats named by their seed where all seeds are known and differ, else by what differs in their paths."""
    seeds = [{run.seed for run in folds.values()} for _, folds in trainings]
    known = [next(iter(s)) for s in seeds if len(s) == 1]
    if len(known) == len(seeds) and None not in known and len(set(known)) == len(known):
        labels = [f"seed {seed}" for seed in known]
    else:
        labels = ["repeat 1"] if len(trainings) == 1 else _distinct_parts([folder for folder, _ in trainings])
    seen: dict[tuple[str, int, str], str] = {}
    for label, (_, folds) in zip(labels, trainings, strict=True):
        for fold, run in folds.items():
            key = (fold, run.seed or 0, run.training_set)
            if run.seed is not None and seen.setdefault(key, label) != label:
                raise ValueError(
                    f"{name}: {seen[key]} and {label} were both trained with seed={run.seed} (fold {fold}), so they "
                    "are one training and not two: give one of them, or train the other with another seed"
                )
    return [Repeat(label, folds) for label, (_, folds) in zip(labels, trainings, strict=True)]


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
            raise ValueError(
                f"{listed(twice)} of fold {fold} were also validated in fold {seen[twice[0]]}, so the two cannot be "
                f"compared together: add -f {fold}, or -f with folds of one split"
            )
        seen.update(dict.fromkeys(run.cases, fold))
    notes: list[str] = []
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


def require_same_training_cases(arms: Sequence[Arm], allowed: bool = False) -> list[str]:
    """Make sure that all arms learned from the same training cases of their folds.

    A training without our setting ``train_cases`` (plain nnUNetTrainer, say) learned from all of its fold's. What the
    models of test predictions learned from is not known.

    Args:
        arms: checked by ``require_comparable``.
        allowed: differences become a note.

    Returns:
        Notes for the reader.

    Raises:
        ValueError: they differ and are not allowed to.
    """
    if any(run.fold == "test" for arm in arms for run in arm.runs()):
        return ["folders of predictions do not tell which training cases their models learned from"]
    sets = [{(run.fold, run.training_set) for run in arm.runs()} for arm in arms]
    if all(some == sets[0] for some in sets):
        return []
    described = "; ".join(f"{arm.name}: {_described(some)}" for arm, some in zip(arms, sets, strict=True))
    if allowed:
        return [
            f"the training cases differ ({described}), so that differences need not come from the trainers "
            f"({ALLOW_TRAINING_CASES})"
        ]
    raise ValueError(
        f"the training cases differ ({described}), so that a difference need not come from the trainers: train on the "
        f"same ones (train_cases, train_cases_seed), or add {ALLOW_TRAINING_CASES}"
    )


def _described(sets: set[tuple[str, str]]) -> str:
    found = sorted({some for _, some in sets})
    return " / ".join(listed(some.split(", ")) if ", " in some else some for some in found)
