"""Scores of every case in every repeat of every arm, on the same cases and structures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.compare.runs import Arm, FoldRun, nnunet_dice
from nnunetv2_ext.evaluate.folder import Evaluation, Source, evaluate_folder, mean_of_defined
from nnunetv2_ext.evaluate.metrics import ABSENT, METRICS
from nnunetv2_ext.evaluate.structures import Structure
from nnunetv2_ext.evaluate.table import MEAN

Values = npt.NDArray[np.float64]
_AGREE = 1e-6


@dataclass
class Scores:
    """What was measured.

    Attributes:
        arms: the first is what the others are compared with.
        cases: the paired units, all folds one after the other.
        folds: the fold of each case.
        source: structures, rules.
        states: by arm, (repeats, cases, structures) of ``metrics.FOUND`` and so on.
        values: by metric and arm, (repeats, cases, structures); NaN where a case does not count for a structure,
            which is then so for all arms.
        pairs: by arm, the evaluations of each repeat's folds, for the files.
    """

    arms: list[Arm]
    cases: list[str]
    folds: list[str]
    source: Source
    states: list[npt.NDArray[np.str_]]
    values: dict[str, list[Values]]
    evaluations: list[list[list[Evaluation]]]

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The classes or regions."""
        return self.source.labels.structures

    @property
    def columns(self) -> list[str]:
        """Names of the structures and, with several, of their mean."""
        names = [s.name for s in self.structures]
        return [*names, MEAN] if len(names) > 1 else names

    def table(self, metric: str, arm: int) -> Values:
        """(repeats, cases, columns)."""
        values = self.values[metric][arm]
        if len(self.structures) == 1:
            return values
        return np.concatenate([values, mean_of_defined(values, axis=2)[..., None]], axis=2)

    def case_scores(self, metric: str, arm: int) -> Values:
        """(cases, columns), averaged over repeats: one number per case, the paired unit."""
        return self.table(metric, arm).mean(axis=0)


def collect(arms: Sequence[Arm], truth: Path, source: Source, processes: int = 1, own_truth: bool = True) -> Scores:
    """Score everything.

    Args:
        arms: checked by ``runs.require_comparable``.
        truth: folder of the true segmentations.
        source: what to score and how.
        processes: at a time.
        own_truth: the truth is nnU-Net's gt_segmentations, so that Dice must agree with validation/summary.json.

    Raises:
        ValueError: files on other grids, strange labels, or predictions that are not those of summary.json.
    """
    folds = list(arms[0].repeats[0].folds)
    evaluations: list[list[list[Evaluation]]] = []
    for arm in arms:
        evaluations.append([])
        for repeat in arm.repeats:
            done = []
            for fold in folds:
                run = repeat.folds[fold]
                title = f"{arm.name}, {repeat.label}, fold {fold}"
                done.append(
                    evaluate_folder(
                        run.predictions, truth, source, cases=sorted(run.cases), processes=processes, title=title
                    )
                )
                if own_truth:
                    _require_same_dice(run, done[-1])
            evaluations[-1].append(done)
    first = evaluations[0][0]
    states = [_stack(repeats, lambda score: score.state).astype(str) for repeats in evaluations]
    values = {
        metric: common_cases(
            [_stack(repeats, lambda score, m=metric: score.values[m]).astype(float) for repeats in evaluations],
            states,
            METRICS[metric].higher_is_better,
        )
        for metric in source.rules.metrics
    }
    cases = [case for evaluation in first for case in evaluation.cases]
    case_folds = [fold for fold, evaluation in zip(folds, first, strict=True) for _ in evaluation.cases]
    return Scores(list(arms), cases, case_folds, source, states, values, evaluations)


def _stack(repeats, get) -> npt.NDArray:
    """(repeats, cases, structures) of an attribute of the scores."""
    return np.array([[[get(score) for score in row] for e in folds for row in e.scores] for folds in repeats])


def common_cases(values: Sequence[Values], states: Sequence[npt.NDArray[np.str_]], higher: bool) -> list[Values]:
    """The same values for all arms: see ``COMMON_RULE``.

    Args:
        values: by arm, (repeats, cases, structures), NaN where undefined.
        states: by arm, same shapes.
        higher: whether higher is better.
    """
    all_absent = np.logical_and.reduce([(state == ABSENT).all(axis=0) for state in states])
    perfect = 1.0 if higher else 0.0
    filled = [np.where((state == ABSENT) & ~all_absent, perfect, value) for value, state in zip(values, states)]
    counts = np.logical_and.reduce([np.isfinite(value).all(axis=0) for value in filled])
    return [np.where(counts, value, np.nan) for value in filled]


COMMON_RULE = (
    "Every figure is taken on the same cases for all compared. Where the truth has no such structure and at least one "
    "run invented it, a run that rightly left it out scores 1 (HD95: 0 mm); where all left it out, and where a score "
    "is undefined in any run, the case does not count for that structure"
)


def _require_same_dice(run: FoldRun, evaluation: Evaluation) -> None:
    """Predictions or truth changed after nnU-Net's validation would otherwise be compared with those of other days."""
    if "dice" not in evaluation.metrics:
        return
    theirs = nnunet_dice(run, evaluation.source.ending)
    for case, row in zip(evaluation.cases, evaluation.scores, strict=True):
        for structure, score in zip(evaluation.structures, row, strict=True):
            there = theirs.get(case, {}).get(structure.key)
            here = score.values["dice"]
            if there is None or (math.isnan(there) and math.isnan(here)) or abs(there - here) <= _AGREE:
                continue
            raise ValueError(
                f"{run.predictions}: Dice of {case}, {structure.name}, is {here:.4f} by its files but {there:.4f} in "
                "summary.json: predictions or truth have changed since the validation; run it again with --val"
            )
