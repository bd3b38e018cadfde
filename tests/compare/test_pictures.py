"""Which cases and which slice are shown."""

import numpy as np
import pandas as pd
import pytest

from nnunetv2_ext.compare import pictures
from nnunetv2_ext.compare.statistics import NO_INTERVAL, Difference, paired_difference
from nnunetv2_ext.evaluate.metrics import METRICS
from tests.compare.test_statistics import scores_of


def difference(values, metric="dice") -> Difference:
    cases = pd.Series(values, index=[f"case{i}" for i in range(len(values))])
    about = ("arm1", "arm0", metric, METRICS[metric], "a")
    return Difference(*about, cases, 0.0, NO_INTERVAL, 0, "cases", 0, 0, 0, {}, True, (1, 1), NO_INTERVAL, {})


def test_the_largest_losses_and_gains_are_chosen_and_undefined_cases_are_not() -> None:
    d = difference([0.1, -0.3, np.nan, 0.0, -0.2, 0.4, -0.1])
    assert pictures.worst_first(d, 2) == (["case1", "case4"], ["case5", "case0"])
    assert pictures.worst_first(difference([3.0, -1.0, 2.0], "hd95"), 2) == (["case0", "case2"], ["case1"])


def test_the_pair_of_trainings_nearest_to_the_average_is_shown() -> None:
    plain, ours = [[0.5, 0.5], [0.1, 0.5], [0.9, 0.5]], [[0.4, 0.5], [0.45, 0.5]]
    free = scores_of(plain, ours, labels=[["r0", "r1", "r2"], ["seed 0", "seed 1"]])
    d = paired_difference(free, "arm1", "dice", "a")  # -0.075 in the first case
    shown = pictures.shown_repeats(free.trainings("dice", "a").loc["case0"], d)
    assert d.per_case.iloc[0] == pytest.approx(-0.075) and shown["arm0"] == "r0"
    common = scores_of(plain, [[0.4, 0.5], [0.1, 0.5], [0.8, 0.5]])
    d = paired_difference(common, "arm1", "dice", "a")  # -0.1, 0, -0.1: -0.067 on average
    shown = pictures.shown_repeats(common.trainings("dice", "a").loc["case0"], d)
    assert shown == {"arm0": "seed 0", "arm1": "seed 0"}


def test_the_slice_in_which_the_errors_differ_most() -> None:
    truth, first, second = (np.zeros((6, 4, 4), dtype=int) for _ in range(3))
    truth[1, :2] = 1
    assert pictures.telling_slice([truth, truth, truth], 0) == 1
    first[4, 0] = 1
    second[5, :3] = 2  # outside the truth in both, more in slice 5
    assert pictures.telling_slice([truth, first, second], 0) == 5
    truth[5] = 9
    assert pictures.telling_slice([truth, first, second], 0, ignore=9) == 4


def test_thick_slices_are_not_cut_through() -> None:
    def axis(spacing, shape=(4, 5, 6)) -> int:
        return pictures.viewing_axis(pictures.Volume(np.zeros(shape), spacing, True))

    assert axis((1, 1, 1)) == 0 and axis((1, 5, 1)) == 1 and axis((1, 1, 1.4)) == 0
    assert axis((1, 1, 5), (4, 1, 6)) == 1
