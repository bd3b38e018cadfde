"""Scores of every case in every repeat of every arm, on the same cases and structures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from nnunetv2_ext.compare.arms import Arm
from nnunetv2_ext.compare.runs import FoldRun
from nnunetv2_ext.evaluate.folder import Evaluation, Source, evaluate_folder, require_one_unit, with_mean
from nnunetv2_ext.evaluate.metrics import ABSENT, METRICS

_AGREE = 1e-6


@dataclass
class Scores(Evaluation):
    """What was measured: an evaluation whose ``table`` and ``files`` begin with the columns ``arm, repeat, fold``.

    Where subjects are known both have a column ``subject`` as well, and ``group`` where cases are grouped.
    """

    arms: Sequence[Arm] = ()  # the first is what the others are compared with; repeats are independent trainings
    notes: Sequence[str] = ()  # for the reader, on what was left out

    @property
    def first(self) -> str:
        return self.arms[0].name

    @cached_property
    def per_case(self) -> pd.DataFrame:
        """By case: its fold, its group and subject where known, and the remarks on its files in all arms."""
        remarks = self.files.groupby("case")["remark"].agg(lambda some: "; ".join(filter(None, dict.fromkeys(some))))
        about = self.files.drop_duplicates("case").set_index("case")
        return about[[c for c in ("fold", "group", "subject") if c in about]].assign(remark=remarks)

    @cached_property
    def compared(self) -> pd.DataFrame:
        """``table`` with values by ``COMMON_RULE`` and rows for the mean over structures."""
        return with_mean(self.table.assign(value=common_values(self.table)))

    @cached_property
    def averaged(self) -> pd.DataFrame:
        """``compared`` averaged over an arm's repeats, so that every case, the paired unit, counts once."""
        keys = ["arm", "metric", "structure", "case"]
        return self.compared.groupby(keys, sort=False, as_index=False)["value"].mean()

    def only(self, cases: Sequence[str]) -> "Scores":
        """The same of some cases."""
        table, files = (frame[frame["case"].isin(cases)].reset_index(drop=True) for frame in (self.table, self.files))
        return replace(self, table=table, files=files)

    def trainings(self, metric: str, structure: str) -> pd.DataFrame:
        """(cases, trainings) of a metric and structure; columns are (arm, repeat), in the order of the arms."""
        order = [(arm.name, repeat.label) for arm in self.arms for repeat in arm.repeats]
        chosen = self.compared[(self.compared["metric"] == metric) & (self.compared["structure"] == structure)]
        cells = chosen.pivot(index="case", columns=["arm", "repeat"], values="value")
        return cells.reindex(index=self.cases, columns=pd.MultiIndex.from_tuples(order))

    def case_scores(self, metric: str, structure: str) -> pd.DataFrame:
        """(cases, arms), averaged over repeats; NaN where a case does not count."""
        cells = self.trainings(metric, structure)
        return pd.DataFrame({arm.name: cells[arm.name].mean(axis=1) for arm in self.arms})


def collect(
    arms: Sequence[Arm],
    truth: Path,
    source: Source,
    processes: int = 1,
    own_truth: bool = True,
    subjects: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Scores:
    """Score arms that ``arms.require_comparable`` checked; ``subjects`` and ``groups`` are by case, None if not known.

    If ``own_truth`` is nnU-Net's gt_segmentations, Dice must agree with validation/summary.json. ValueError: files on
    other grids, strange labels, other predictions than in summary.json, or other sizes of a voxel in another arm.
    """
    found: dict[tuple[str, str, str], Evaluation] = {}
    for name, repeat, fold in [(a.name, r, f) for a in arms for r in a.repeats for f in arms[0].repeats[0].folds]:
        run, where = repeat.folds[fold], (name, repeat.label, fold)
        found[where] = evaluate_folder(run.predictions, truth, source, cases=sorted(run.cases),
                                       processes=processes, title=", ".join(where))  # fmt: skip
        if own_truth:
            _require_same_dice(run, found[where])
    keys = ["arm", "repeat", "fold"]
    table, files = (
        pd.concat({where: getattr(one, name) for where, one in found.items()}, names=keys)
        .reset_index(keys).reset_index(drop=True)
        for name in ("table", "files")
    )  # fmt: skip
    _require_same_spacing(files)
    for column, of in (("subject", subjects), ("group", groups)):
        for frame in (table, files) if of is not None else ():
            frame.insert(4, column, frame["case"].map(of))
    return independent(Scores(source, table, files, arms=list(arms)))


def independent(scores: Scores) -> Scores:
    """The scores without repeats that are another one's copy: equal in every case of a fold is not a new training."""
    measured = ["value", "truth_ml", "prediction_ml"]
    folds = scores.table.groupby(["arm", "repeat", "fold"], sort=False)[measured]
    prints = {where: part.to_numpy(float).tobytes() for where, part in folds}
    arms, notes = [], []
    for arm in scores.arms:
        seen: dict[tuple[str, bytes], str] = {}
        kept = []
        for repeat in arm.repeats:
            own = sorted((where[2], text) for where, text in prints.items() if where[:2] == (arm.name, repeat.label))
            if copied := next((key for key in own if key in seen), None):
                notes.append(
                    f"{arm.name}: {repeat.label} has the scores of {seen[copied]} in every case of fold {copied[0]}; "
                    "that is one training given twice, and it counts once"
                )
            else:
                kept.append(repeat)
                seen |= dict.fromkeys(own, repeat.label)
        arms.append(replace(arm, repeats=kept))
    alive = pd.DataFrame([(arm.name, r.label) for arm in arms for r in arm.repeats], columns=["arm", "repeat"])
    table, files = (frame.merge(alive, on=["arm", "repeat"]) for frame in (scores.table, scores.files))
    return replace(scores, arms=arms, notes=notes, table=table, files=files)


def common_values(table: pd.DataFrame) -> pd.Series:
    """The values of a long table on the same cases for all arms and repeats: see ``COMMON_RULE``."""
    cell, absent = [table["case"], table["structure"]], table["state"] == ABSENT
    perfect = table["metric"].map({key: float(metric.higher_is_better) for key, metric in METRICS.items()})
    filled = table["value"].where(~absent | absent.groupby(cell).transform("all"), perfect)
    return filled.where(filled.notna().groupby([*cell, table["metric"]]).transform("all"))


COMMON_RULE = (
    "Every figure is taken on the same cases for all compared. Where the truth has no such structure and at least one "
    "run invented it, a run that rightly left it out scores 1 (HD95: 0 mm); where all left it out, and where a score "
    "is undefined in any run, the case does not count for that structure"
)


def _require_same_spacing(files: pd.DataFrame) -> None:
    """Where the truth does not tell the size of a voxel, each arm's predictions do; they must agree."""
    require_one_unit(files)
    for case, rows in files.groupby("case", sort=False):
        if np.ptp(np.array(list(rows["spacing"])), axis=0).max() > 1e-3:
            different = rows.drop_duplicates("spacing")
            told = "; ".join(f"{file}: {size}" for file, size in zip(different["prediction"], different["spacing"]))
            raise ValueError(f"case {case}: the predictions tell different sizes of a voxel in mm ({told})")


def _require_same_dice(run: FoldRun, evaluation: Evaluation) -> None:
    """Predictions or truth changed after nnU-Net's validation would otherwise be compared with those of other days."""
    keys = {structure.name: structure.key for structure in evaluation.source.labels.structures}
    for row in evaluation.table[evaluation.table["metric"] == "dice"].itertuples():
        there = run.dice.get(row.case, {}).get(keys[row.structure], row.value)
        if not np.isclose(there, row.value, rtol=0, atol=_AGREE, equal_nan=True):
            raise ValueError(
                f"{run.predictions}: Dice of {row.case}, {row.structure}, is {row.value:.4f} by its files but "
                f"{there:.4f} in summary.json: predictions or truth have changed since the validation; run it again "
                "with --val"
            )
