"""The metrics by hand, against nnU-Net, and for empty structures."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn

from nnunetv2_ext.evaluate import metrics
from nnunetv2_ext.evaluate.metrics import Rules, score_case
from nnunetv2_ext.evaluate.structures import Structure

ALL = ("dice", "hd95", "nsd")
A, B = Structure("a", (1,)), Structure("b", (2,))
BOTH = Structure("both", (1, 2))
RULES = Rules(ALL, {"a": 1.0, "b": 1.0, "both": 1.0})
LABELS = some.arrays(np.int32, (4, 4, 3), elements=st.integers(0, 3))


def test_a_box_moved_by_one_voxel_by_hand() -> None:
    truth = np.zeros((6, 10, 10), dtype=np.int32)
    truth[1:5, 2:6, 2:6] = 1
    moved = np.roll(truth, 1, axis=0)

    def scored(tolerance: float) -> metrics.Score:
        return score_case(moved, truth, (3.0, 1.0, 1.0), [A], Rules(ALL, {"a": tolerance}))[0]

    result = scored(2.9)
    assert result.values["dice"] == pytest.approx(2 * 48 / 128)
    # the side walls lie on each other but for the layer at the end, 16 of the 56 surface voxels, which is 3 mm away
    # from the other's end (inner 4 of the layer) and, at its rim, from the wall's last layer
    assert result.values["hd95"] == pytest.approx(3.0)
    assert result.values["nsd"] < 1 and scored(3.0).values["nsd"] == 1
    assert result.truth_ml == pytest.approx(64 * 3 / 1000) and result.state == "found"


def test_hd95_is_the_larger_directed_percentile_and_not_the_pooled_one() -> None:
    there, back = np.full(1000, 1.0), np.full(20, 9.0)
    assert metrics.hd95(there, back) == 9.0
    assert np.percentile(np.concatenate([there, back]), 95) == 1.0
    assert metrics.hd95(np.arange(101.0), np.zeros(3)) == 95.0


def test_a_distance_equal_to_the_tolerance_is_within_it() -> None:
    assert metrics.nsd(np.array([3 * 0.3]), np.array([0.9]), 0.9) == 1
    assert metrics.nsd(np.array([0.0, 1.0, 2.0]), np.array([5.0]), 1.0) == 0.5


@given(LABELS, LABELS)
@settings(max_examples=50, deadline=None)
def test_dice_equals_nnunets_with_regions_and_ignored_voxels(prediction: np.ndarray, truth: np.ndarray) -> None:
    prediction = np.where(prediction == 3, 0, prediction)
    scores = score_case(prediction, truth, (1, 1, 1), [A, B, BOTH], RULES, ignore_label=3)
    for structure, found in zip([A, B, BOTH], scores, strict=True):
        tp, fp, fn, _ = compute_tp_fp_fn_tn(structure.mask(truth), structure.mask(prediction), truth == 3)
        expected = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan
        assert found.values["dice"] == pytest.approx(expected, nan_ok=True)


@given(LABELS, LABELS, st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_what_is_predicted_under_ignore_changes_nothing(prediction, truth, seed: int) -> None:
    other = prediction.copy()
    other[truth == 3] = np.random.default_rng(seed).integers(0, 3, int((truth == 3).sum()))
    first, second = (score_case(p, truth, (1, 2, 1), [A, BOTH], RULES, 3) for p in (prediction, other))
    assert repr(first) == repr(second)


@given(LABELS, st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_prediction_equal_to_the_truth_is_perfect(truth: np.ndarray, tolerance: float) -> None:
    for found in score_case(truth, truth, (1, 2, 3), [A, BOTH], Rules(ALL, {"a": tolerance, "both": tolerance})):
        if found.state == "found":
            assert found.values == {"dice": 1, "hd95": 0, "nsd": 1}
        else:
            assert found.state == "absent" and all(math.isnan(v) for v in found.values.values())


@pytest.mark.parametrize(
    ("policy", "state", "expected"),
    [
        ("worst", "missed", {"dice": 0, "hd95": math.sqrt(9 + 16 + 36), "nsd": 0}),
        ("worst", "invented", {"dice": 0, "hd95": math.sqrt(9 + 16 + 36), "nsd": 0}),
        ("leave-out", "missed", {"dice": 0, "hd95": math.nan, "nsd": 0}),
        ("leave-out", "invented", {"dice": 0, "hd95": math.nan, "nsd": 0}),
        ("worst", "absent", dict.fromkeys(ALL, math.nan)),
        ("leave-out", "absent", dict.fromkeys(ALL, math.nan)),
    ],
)
def test_empty_structures(policy: str, state: str, expected: dict) -> None:
    full, empty = np.zeros((4, 5, 4), dtype=np.int32), np.zeros((4, 5, 4), dtype=np.int32)
    full[1, 1, 1] = 1
    prediction, truth = {"missed": (empty, full), "invented": (full, empty), "absent": (empty, empty)}[state]
    (found,) = score_case(prediction, truth, (1.0, 1.0, 2.0), [A], Rules(ALL, {"a": 1.0}, policy))
    assert found.state == state and found.values == pytest.approx(expected, nan_ok=True)


@given(LABELS, LABELS)
@settings(max_examples=30, deadline=None)
def test_no_hd95_exceeds_the_value_of_a_missed_structure(prediction, truth) -> None:
    for found in score_case(prediction, truth, (0.5, 1, 4), [A, BOTH], RULES):
        assert not found.values["hd95"] > math.hypot(3 * 0.5, 3 * 1, 2 * 4) + 1e-9


def test_a_single_slice_is_scored_within_itself_and_has_the_volume_of_its_thickness() -> None:
    truth = np.zeros((1, 6, 6), dtype=np.int32)
    truth[0, 1:5, 1:5] = 1
    prediction = np.zeros_like(truth)
    prediction[0, 1:5, 2:6] = 1
    (found,) = score_case(prediction, truth, (5.0, 1.0, 2.0), [A], RULES)
    assert found.values["hd95"] == 2.0
    (missed,) = score_case(np.zeros_like(truth), truth, (5.0, 1.0, 2.0), [A], RULES)
    assert missed.values["hd95"] == pytest.approx(math.hypot(5, 10)) and missed.truth_ml == pytest.approx(0.16)
    (flat,) = score_case(prediction[0], truth[0], (1.0, 2.0), [A], RULES)
    assert flat.values == found.values and flat.truth_ml == pytest.approx(0.32)  # square centimetres
    (row,) = score_case(truth[:, 1:2], truth[:, 1:2], (5.0, 1.0, 2.0), [A], RULES)
    assert row.truth_ml == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("dise",), {}), "unknown metric dise; there are dice, hd95, nsd"),
        (((), {}), "none given"),
        ((ALL, {"a": -1.0}), "tolerance of a must be 0 mm or more"),
        ((ALL, {"a": math.nan}), "tolerance of a must be 0 mm or more"),
        ((ALL, {}, "zero"), "worst or leave-out"),
    ],
)
def test_impossible_rules(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules(*arguments)
