"""Scoring a folder of predictions, in several processes if asked to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import find_reader
from nnunetv2_ext.evaluate.metrics import Rules, Score, score_case
from nnunetv2_ext.evaluate.pairs import Pair, find_pairs, read
from nnunetv2_ext.evaluate.structures import Labels, Structure


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


@dataclass
class Evaluation:
    """The scores of a folder.

    Attributes:
        source: what was asked.
        pairs: the files of each case.
        scores: by case and structure, in the order of ``pairs`` and ``structures``.
    """

    source: Source
    pairs: list[Pair]
    scores: list[list[Score]] = field(default_factory=list)

    @property
    def cases(self) -> list[str]:
        """Names of the cases."""
        return [pair.case for pair in self.pairs]

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The scored classes or regions."""
        return self.source.labels.structures

    @property
    def metrics(self) -> tuple[str, ...]:
        """Keys of ``METRICS``."""
        return self.source.rules.metrics

    def values(self, metric: str) -> npt.NDArray[np.float64]:
        """(cases, structures), NaN where a score is undefined."""
        return np.array([[s.values[metric] for s in row] for row in self.scores], dtype=float)

    def case_means(self, metric: str) -> npt.NDArray[np.float64]:
        """(cases,): mean over the structures that have a value, NaN if none has."""
        return mean_of_defined(self.values(metric), axis=1)

    def count(self, state: str, structure: int | None = None) -> int:
        """How often a structure (None: any) is found, absent, missed or invented."""
        columns = range(len(self.structures)) if structure is None else (structure,)
        return sum(row[column].state == state for row in self.scores for column in columns)


def mean_of_defined(values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    """numpy's nanmean without its warning for rows of NaN alone."""
    defined = np.isfinite(values)
    number = defined.sum(axis=axis)
    total = np.where(defined, values, 0.0).sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


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
        ValueError: missing or extra cases (listed), files on different grids, unknown labels; names the case.
    """
    pairs = find_pairs(predictions, truth, source.ending, chill, cases)
    result = Evaluation(source, pairs)
    with closing(_scores(pairs, source, processes)) as scores, progress_bar(len(pairs), title) as bar:
        for row in scores:
            result.scores.append(row)
            bar.update()
    return result


def _scores(pairs: list[Pair], source: Source, processes: int) -> Generator[list[Score], None, None]:
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


def score_pair(task: tuple[Pair, Source, Path]) -> list[Score]:
    """Read and score one case: its files, what to score, and a file that decides on nnU-Net's reader."""
    pair, source, example = task
    from_file = find_reader(source.ending, source.reader, example)
    prediction, truth, spacing = read(pair, from_file, source.compare_origin)
    labels = source.labels
    labels.check(f"case {pair.case}: the prediction {pair.prediction}", np.unique(prediction).tolist(), False)
    labels.check(f"case {pair.case}: the truth {pair.truth}", np.unique(truth).tolist(), True)
    return score_case(prediction, truth, spacing, labels.structures, source.rules, labels.ignore)
