"""Scoring a folder of predictions into one long table, in several processes if asked to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import find_reader
from nnunetv2_ext.evaluate.metrics import ABSENT, METRICS, WORST, Metric, Rules, Score, score_case
from nnunetv2_ext.evaluate.pairs import Pair, case_files, find_pairs, listed, read, require_roles
from nnunetv2_ext.evaluate.structures import Labels, tolerances

MEAN = "mean of structures"


@dataclass(frozen=True)
class Source:
    """What is scored and how its files are read.

    Attributes:
        labels: structures, ignore label, allowed values.
        rules: metrics, tolerance, empty policy.
        ending: of the files, ``.nii.gz``.
        reader: dataset.json's ``overwrite_image_reader_writer``.
        compare_origin: whether origin and direction of the two files have to agree.
    """

    labels: Labels
    rules: Rules
    ending: str = ".nii.gz"
    reader: str | None = None
    compare_origin: bool = True


def make_source(
    labels: Labels,
    ending: str,
    reader: str | None = None,
    *,
    metrics: Sequence[str] = tuple(METRICS),
    tolerance: Sequence[str] = ("1",),
    empty: str = WORST,
    ignore_origin: bool = False,
) -> Source:
    """A ``Source`` from options as they are typed; ``tolerance`` as for ``structures.tolerances``.

    Raises:
        ValueError: an unknown metric, policy or structure.
    """
    rules = Rules(tuple(dict.fromkeys(metrics)), tolerances(tolerance, labels.structures), empty)
    return Source(labels, rules, ending, reader, not ignore_origin)


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        source: what was asked.
        table: a row per case, structure and metric: ``case, structure, state, truth_ml, prediction_ml, metric, value``,
            in this order of cases, structures and metrics. ``metric`` is a key of ``METRICS``, ``value`` NaN where a
            score is undefined, ``state`` one of ``metrics.FOUND`` and so on. Volumes are NaN without a known spacing.
        files: a row per case: ``case, prediction, truth`` (paths), ``spacing`` (mm), ``spacing_known``, ``remark``
            (what was let pass) and ``ignored`` (whether the truth has the ignore label).
        left_out: cases of the truth without a prediction.
    """

    source: Source
    table: pd.DataFrame
    files: pd.DataFrame
    left_out: Sequence[str] = ()

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics by key; in voxels instead of mm where the files do not tell the size of a voxel."""
        known = bool(self.files["spacing_known"].all())
        chosen = {key: METRICS[key] for key in self.source.rules.metrics}
        return {k: replace(m, unit="voxels") if m.unit == "mm" and not known else m for k, m in chosen.items()}

    @property
    def cases(self) -> list[str]:
        """Names of the cases."""
        return list(self.files["case"].unique())

    @property
    def columns(self) -> list[str]:
        """Names of the structures and, with several, of their mean."""
        names = [s.name for s in self.source.labels.structures]
        return [*names, MEAN] if len(names) > 1 else names


def with_mean(table: pd.DataFrame) -> pd.DataFrame:
    """The table and, with several structures, further rows: the mean over the structures that have a value."""
    if table["structure"].nunique() < 2:
        return table
    keys = [key for key in ("arm", "repeat", "fold", "case", "subject", "metric") if key in table]
    mean = table.groupby(keys, sort=False, as_index=False)["value"].mean()
    return pd.concat([table, mean.assign(structure=MEAN)], ignore_index=True)


def evaluate_folder(
    predictions: Path,
    truth: Path,
    source: Source,
    *,
    chill: bool = False,
    cases: Sequence[str] | None = None,
    processes: int = 1,
    title: str = "evaluate",
) -> Evaluation:
    """Score every case of a folder of predictions.

    Args:
        predictions: files ``CASE.nii.gz``.
        truth: files of the same names.
        source: what to score.
        chill: cases of the truth without a prediction are left out instead of being an error.
        cases: score exactly these; None: those of the truth.
        processes: 1 works in this process.
        title: of the progress bar.

    Raises:
        ValueError: missing or extra cases (listed), files on different grids, unknown labels; names the case. The
            folders are the same or look swapped, or some files tell the size of a voxel and others do not.
    """
    require_roles(predictions, truth)
    pairs = find_pairs(predictions, truth, source.ending, chill, cases)
    rows, files = [], []
    with closing(_scores(pairs, source, processes)) as scores, progress_bar(len(pairs), title) as bar:
        for pair, (case_scores, file) in zip(pairs, scores, strict=True):
            for structure, score in zip(source.labels.structures, case_scores, strict=True):
                head = {"case": pair.case, "structure": structure.name, "state": score.state}
                head |= {"truth_ml": score.truth_ml, "prediction_ml": score.prediction_ml}
                rows += [{**head, "metric": metric, "value": value} for metric, value in score.values.items()]
            files.append({"case": pair.case, "prediction": pair.prediction, "truth": pair.truth, **file})
            bar.update()
    left_out = () if cases is not None else sorted({*case_files(truth, source.ending)} - {p.case for p in pairs})
    result = Evaluation(source, pd.DataFrame(rows), pd.DataFrame(files), left_out)
    require_one_unit(result.files)
    if source.labels.allowed is None:  # label values given by hand
        _require_present(result)
    return result


def _require_present(evaluation: Evaluation) -> None:
    labels, table = evaluation.source.labels, evaluation.table
    absent = [s.name for s in labels.structures if (table.loc[table["structure"] == s.name, "state"] == ABSENT).all()]
    if labels.ignore is not None and not evaluation.files["ignored"].any():
        absent.append(f"label {labels.ignore}, which is to be ignored")
    if absent:
        raise ValueError(f"no case has {', '.join(absent)}: give values that the files hold")


def require_one_unit(files: pd.DataFrame) -> None:
    """Raise ValueError if some rows of ``Evaluation.files`` have distances in mm and others in voxels."""
    unknown = files[~files["spacing_known"]]
    if len(unknown) not in (0, len(files)):
        first = unknown.iloc[0]
        raise ValueError(
            f"{listed(list(unknown['case'].unique()))}: neither {first['prediction']} nor the truth tells the size of "
            'a voxel, while others do: write {"spacing": [...]} into a .json of the same name beside the file, as '
            "nnU-Net does for 3-D TIFF"
        )


def _scores(pairs: list[Pair], source: Source, processes: int) -> Generator[Any, None, None]:
    tasks = [(pair, source, pairs[0].truth) for pair in pairs]
    if min(processes, len(pairs)) <= 1:
        yield from map(score_pair, tasks)
        return
    # spawn: the caller may have threads (torch, SimpleITK), which do not survive a fork
    pool = ProcessPoolExecutor(min(processes, len(pairs)), multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(score_pair, tasks)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, most likely because memory ran out: use a smaller -np"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def score_pair(task: tuple[Pair, Source, Path]) -> tuple[list[Score], dict[str, Any]]:
    """Read and score one case: its files, what to score, and a file that decides on nnU-Net's reader.

    Returns:
        The scores of the structures, and the case's row of ``Evaluation.files`` without names.
    """
    pair, source, example = task
    case = read(pair, find_reader(source.ending, source.reader, example), source.compare_origin)
    labels = source.labels
    labels.check(f"case {pair.case}: the prediction {pair.prediction}", np.unique(case.prediction).tolist(), False)
    labels.check(f"case {pair.case}: the truth {pair.truth}", np.unique(case.truth).tolist(), True)
    scores = score_case(case.prediction, case.truth, case.spacing, labels.structures, source.rules, labels.ignore)
    if not case.spacing_known:
        scores = [replace(score, truth_ml=np.nan, prediction_ml=np.nan) for score in scores]
    ignored = labels.ignore is not None and bool((case.truth == labels.ignore).any())
    row = {"spacing": case.spacing, "spacing_known": case.spacing_known, "remark": case.remark, "ignored": ignored}
    return scores, row
