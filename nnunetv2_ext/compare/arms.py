"""The things that are compared: arms, each of repeated trainings, each of finished folds."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.compare.runs import TRAINING_FACTS, FoldRun, read_fold
from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.data.find import Model
from nnunetv2_ext.evaluate.pairs import case_files, listed

# settings that change nothing of the result
_SILENT = ("panel_every", "tensorboard", "save_every", "num_val_iterations_per_epoch", "seed", "train_cases_seed")
ALLOW_TRAINING_CASES = "--allow-different-training-cases"


@dataclass
class Repeat:
    """One training of every fold: the unit over which luck of the training (weights, batches) is averaged."""

    label: str  # "seed 0", or the name of its results folder
    folds: dict[str, FoldRun]


@dataclass
class Arm:
    """One of the things compared."""

    name: str  # the trainer, or the name given with --run
    repeats: list[Repeat]
    trainer: str | None = None  # None for folders of predictions

    def runs(self) -> list[FoldRun]:
        return [run for repeat in self.repeats for run in repeat.folds.values()]


def make_arm(name: str, parts: Sequence[tuple[Model, Sequence[str]]], ending: str) -> Arm:
    """An arm from models and the folds wanted of each; those of one results folder, however spelled, are one repeat.

    ValueError: a fold is missing or unfinished, one is given twice, or two repeats have the same seed.
    """
    spelled: dict[Path, Path] = {}
    trainings: dict[Path, dict[str, FoldRun]] = {}
    for model, folds in parts:
        folder = spelled.setdefault(model.folder.resolve(), model.folder.absolute())
        repeat = trainings.setdefault(folder, {})
        for fold in folds:
            if fold in repeat:
                raise ValueError(f"{name}: fold {fold} of {model.folder} was given twice")
            repeat[fold] = read_fold(model, fold, ending)
    return Arm(name, _labelled(name, trainings), parts[0][0].trainer)


def predictions_arm(name: str, folders: Sequence[Path], ending: str) -> Arm:
    """An arm from folders of test predictions, one per repeat.

    ValueError: a folder is missing, has no prediction, or is given twice, however it is spelled.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"--predictions {name}: a folder was given twice")
    cases = {folder: tuple(case_files(folder, ending, f"predictions of {name}")) for folder in folders}
    trainings = {f.absolute(): {"test": FoldRun(f, "test", f, some)} for f, some in cases.items()}
    return Arm(name, _labelled(name, trainings))


def _labelled(name: str, trainings: Mapping[Path, dict[str, FoldRun]]) -> list[Repeat]:
    """Repeats named by their seed where all seeds are known and differ, else by what differs in their paths."""
    seeds = [{run.seed for run in folds.values()} for folds in trainings.values()]
    if all(len(some) == 1 and None not in some for some in seeds) and len(set().union(*seeds)) == len(seeds):
        labels = [f"seed {some.pop()}" for some in seeds]
    elif len(trainings) == 1:
        labels = ["repeat 1"]
    else:  # the last part of each path at which they all differ, or the whole path
        parts = [list(names) for names in zip(*(reversed(folder.parts) for folder in trainings))]
        labels = next((names for names in parts if len(set(names)) == len(names)), list(map(str, trainings)))
    repeats = [Repeat(label, folds) for label, folds in zip(labels, trainings.values(), strict=True)]
    seen: dict[tuple[str, int, str], str] = {}
    for label, run in [(repeat.label, run) for repeat in repeats for run in repeat.folds.values()]:
        other = label if run.seed is None else seen.setdefault((run.fold, run.seed, run.training_set), label)
        if other != label:
            raise ValueError(
                f"{name}: {other} and {label} were both trained with seed={run.seed} (fold {run.fold}), so they are "
                "one training and not two: give one of them, or train the other with another seed"
            )
    return repeats


def require_comparable(arms: Sequence[Arm], split: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Make sure that all arms predicted the same cases in the same folds.

    Returns notes for the reader, e.g. that ``split`` (validation cases by fold, of splits_final.json) has changed.
    ValueError: fewer than two arms, equal names, different folds, different cases, or a case in two folds.
    """
    names = [arm.name for arm in arms]
    if len(arms) < 2:
        raise ValueError(f"a comparison needs two or more, but there is only {', '.join(names) or 'none'}")
    if len(set(names)) < len(names):
        raise ValueError(f"two of the compared have the same name: {', '.join(names)}")
    first = arms[0].repeats[0]
    for who, repeat in [(f"{arm.name} ({repeat.label})", repeat) for arm in arms for repeat in arm.repeats]:
        if set(repeat.folds) != set(first.folds):
            raise ValueError(
                f"{who} has the folds {', '.join(repeat.folds)}, but {names[0]} ({first.label}) has "
                f"{', '.join(first.folds)}; train the missing ones, or compare fewer with -f"
            )
        for fold, run in repeat.folds.items():
            lacks = {who: set(first.folds[fold].cases) - set(run.cases)}
            lacks[names[0]] = set(run.cases) - set(first.folds[fold].cases)
            if told := "; ".join(f"{one} has not {listed(sorted(cases))}" for one, cases in lacks.items() if cases):
                where = "test cases" if fold == "test" else f"validation cases of fold {fold}"
                raise ValueError(
                    f"the {where} differ, so that there are no pairs to compare ({told}): different splits; train "
                    "with the same splits_final.json"
                )
    notes: list[str] = []
    seen: dict[str, str] = {}
    for fold, run in first.folds.items():
        if twice := [case for case in run.cases if case in seen]:
            raise ValueError(
                f"{listed(twice)} of fold {fold} were also validated in fold {seen[twice[0]]}, so the two cannot be "
                f"compared together: add -f {fold}, or -f with folds of one split"
            )
        seen |= dict.fromkeys(run.cases, fold)
        if split and fold in split and set(split[fold]) != set(run.cases):
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


def differing_facts(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """What differs between the arms' trainings: setting to its value(s) in each arm that has it, ``-`` elsewhere.

    Without seeds, what only concerns logging, and settings that one kind of trainer has and all its arms agree on. A
    key that was renamed since one of the trainings has its name of today.
    """
    found: dict[str, dict[str, set[str]]] = {}
    # asked for only where trainings of one trainer, or blocks of settings, differ in keys: the trainer is imported
    by_trainer = {(arm.trainer, frozenset(run.settings)) for arm in arms for run in arm.runs()}
    keys = {key for _, some in by_trainer for key in some}
    renames = len(by_trainer) > len({name for name, _ in by_trainer})
    renames |= len({key.rpartition(".")[2] for key in keys}) < len(keys)
    for arm in arms:
        renamed = _renamed_keys(arm.trainer) if renames and arm.trainer else {}
        for run in arm.runs():
            values = {"trainer": arm.trainer or "?", **run.facts}
            today = {renamed.get(k, k): v for k, v in run.settings.items() if renamed.get(k) not in run.settings}
            values |= {k: str(v) for k, v in today.items() if k not in (*_SILENT, *TRAINING_FACTS)}
            values |= {} if run.fold == "test" else {"train_cases": run.train_cases}
            for key, value in values.items():
                found.setdefault(key, {}).setdefault(arm.name, set()).add(value)
    table = {key: {name: " / ".join(sorted(some)) for name, some in by_arm.items()} for key, by_arm in found.items()}
    return {key: [t.get(arm.name, "-") for arm in arms] for key, t in table.items() if len(set(t.values())) > 1}


@cache
def _renamed_keys(trainer: str) -> dict[str, str]:
    """Old key to key of today, as the trainer's settings say; {} of a trainer that is not installed here."""
    from nnunetv2_ext.core.settings import renamed_keys

    with suppress(ImportError):  # what its method needs is not there
        return renamed_keys(load_trainer(trainer).settings_model()) if trainer in installed_trainers() else {}
    return {}


def require_same_training_cases(arms: Sequence[Arm], allowed: bool = False) -> list[str]:
    """Make sure that all arms learned from the same training cases of their folds; returns notes for the reader.

    A training without our setting ``train_cases`` (plain nnUNetTrainer, say) learned from all of its fold's. What the
    models of test predictions learned from is not known. ValueError: they differ and are not allowed to.
    """
    if any(run.fold == "test" for arm in arms for run in arm.runs()):
        return ["folders of predictions do not tell which training cases their models learned from"]
    if len({frozenset((run.fold, run.training_set) for run in arm.runs()) for arm in arms}) == 1:
        return []
    described = []
    for arm in arms:
        texts = sorted({run.training_set for run in arm.runs()})
        described.append(f"{arm.name}: " + " / ".join(listed(t.split(", ")) if ", " in t else t for t in texts))
    differ = f"the training cases differ ({'; '.join(described)}), so that"
    if allowed:
        return [f"{differ} differences need not come from the trainers ({ALLOW_TRAINING_CASES})"]
    raise ValueError(
        f"{differ} a difference need not come from the trainers: train on the same ones (train_cases, "
        f"train_cases_seed), or add {ALLOW_TRAINING_CASES}"
    )
