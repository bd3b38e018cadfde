"""Scoring a folder of predictions into one long table, in several processes if asked to."""

import multiprocessing
from collections.abc import Generator, Mapping, Sequence
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
from nnunetv2_ext.evaluate.metrics import ABSENT, METRICS, Metric, Rules, score_case
from nnunetv2_ext.evaluate.pairs import Pair, case_files, find_pairs, listed, read, require_roles
from nnunetv2_ext.evaluate.structures import Labels, tolerances

MEAN = "mean of structures"


@dataclass(frozen=True)
class Source:
    """What is scored and how its files are read."""

    labels: Labels
    rules: Rules
    ending: str = ".nii.gz"
    reader: str | None = None  # dataset.json's overwrite_image_reader_writer
    ignore_origin: bool = False  # origin and direction of the two files may differ


def make_source(options: Any, labels: Labels, dataset_json: Mapping[str, Any], ending: str) -> Source:
    """A ``Source`` as typed: ``options`` has the attributes ``metrics``, ``tolerance``, ``empty``, ``ignore_origin``.

    ``ending`` is that of the files if ``dataset_json`` does not say. ValueError: an unknown metric, policy or
    structure, or an impossible tolerance.
    """
    tolerance = tolerances(options.tolerance, labels.structures)
    rules = Rules(tuple(dict.fromkeys(options.metrics)), tolerance, options.empty)
    reader = dataset_json.get("overwrite_image_reader_writer")
    return Source(labels, rules, dataset_json.get("file_ending") or ending, reader, options.ignore_origin)


@dataclass
class Evaluation:
    """What was measured.

    ``table`` has a row per case, structure and metric, in this order: ``case, structure, state, truth_ml,
    prediction_ml, metric, value``. ``metric`` is a key of ``METRICS``, ``value`` NaN where a score is undefined,
    ``state`` one of ``metrics.FOUND`` and so on. Volumes are NaN without a known spacing. ``files`` has a row per case:
    ``case, prediction, truth`` (paths), ``spacing`` (mm), ``spacing_known``, ``remark`` (what was let pass) and
    ``ignored`` (whether the truth has the ignore label).
    """

    source: Source
    table: pd.DataFrame
    files: pd.DataFrame
    left_out: Sequence[str] = ()  # cases of the truth without a prediction

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics by key; in voxels instead of mm where the files do not tell the size of a voxel."""
        known = bool(self.files["spacing_known"].all())
        chosen = {key: METRICS[key] for key in self.source.rules.metrics}
        return {k: replace(m, unit="voxels") if m.unit == "mm" and not known else m for k, m in chosen.items()}

    @property
    def cases(self) -> list[str]:
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
    keys = [key for key in ("arm", "repeat", "fold", "case", "group", "subject", "metric") if key in table]
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
    """Score every case of a folder of predictions against the files of the same names in ``truth``.

    With ``chill`` cases of the truth without a prediction are left out instead of being an error; ``cases`` are the
    ones to score, None: those of the truth. ``title`` is the progress bar's.

    ValueError: missing or extra cases (listed), files on different grids, unknown labels; names the case. Or the
    folders are the same or look swapped, or some files tell the size of a voxel and others do not.
    """
    require_roles(predictions, truth)
    pairs = find_pairs(predictions, truth, source.ending, chill, cases)
    rows, files = [], []
    with closing(_scored(pairs, source, processes)) as scored, progress_bar(len(pairs), title) as bar:
        for some, file in scored:
            rows += some
            files.append(file)
            bar.update()
    there = case_files(truth, source.ending, "the truth") if cases is None else {}
    left_out = sorted(there.keys() - {pair.case for pair in pairs})
    result = Evaluation(source, pd.DataFrame(rows), pd.DataFrame(files), left_out)
    require_one_unit(result.files)
    absent = result.table["state"].eq(ABSENT).groupby(result.table["structure"], sort=False).all()
    missing = list(absent.index[absent])
    if source.labels.ignore is not None and not result.files["ignored"].any():
        missing.append(f"label {source.labels.ignore}, which is to be ignored")
    if missing and source.labels.allowed is None:  # label values given by hand
        raise ValueError(f"no case has {', '.join(missing)}: give values that the files hold")
    return result


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


Rows = list[dict[str, Any]]


def _scored(pairs: list[Pair], source: Source, processes: int) -> Generator[tuple[Rows, dict[str, Any]], None, None]:
    tasks = [(pair, source, pairs[0].truth) for pair in pairs]
    if min(processes, len(pairs)) <= 1:
        yield from map(score_pair, tasks)
        return
    # spawn: the caller may have threads (torch, SimpleITK), which do not survive a fork
    pool = ProcessPoolExecutor(min(processes, len(pairs)), multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(score_pair, tasks)
    except BrokenProcessPool as error:
        message = "a worker process was killed, most likely because memory ran out: use a smaller -np"
        raise ValueError(message) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def score_pair(task: tuple[Pair, Source, Path]) -> tuple[Rows, dict[str, Any]]:
    """The rows of ``Evaluation.table`` and the row of ``Evaluation.files`` of one case."""
    pair, source, example = task  # the example decides on nnU-Net's reader
    reader, labels = find_reader(source.ending, source.reader, example), source.labels
    prediction, truth, about = read(pair, reader, source.ignore_origin)
    labels.check(f"case {pair.case}: the prediction {pair.prediction}", np.unique(prediction).tolist(), False)
    labels.check(f"case {pair.case}: the truth {pair.truth}", np.unique(truth).tolist(), True)
    scores = score_case(prediction, truth, about["spacing"], labels.structures, source.rules, labels.ignore)
    rows = []
    for structure, score in zip(labels.structures, scores, strict=True):
        ml = (score.truth_ml, score.prediction_ml) if about["spacing_known"] else (np.nan, np.nan)
        head: dict[str, Any] = {"case": pair.case, "structure": structure.name, "state": score.state}
        head |= {"truth_ml": ml[0], "prediction_ml": ml[1]}
        rows += [{**head, "metric": metric, "value": value} for metric, value in score.values.items()]
    return rows, {**pair._asdict(), **about, "ignored": labels.ignore is not None and labels.ignore in truth}
