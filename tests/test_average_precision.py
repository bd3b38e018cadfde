"""The example that scores rare classes by average precision, on maps whose values are computed by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

_FILE = Path(__file__).parent.parent / "examples" / "average_precision.py"
_SPEC = importlib.util.spec_from_file_location("average_precision", _FILE)
example = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(example)

# class 1, sorted: .9 right, .8 wrong, .6 right, .1 wrong: (1/1 + 2/3) / 2
TRUTHS = [np.array([[1, 0]]), np.array([[1, 0]])]
SCORES = [np.array([[0.9, 0.8]]), np.array([[0.6, 0.1]])]
SEGMENTATIONS = [np.array([[1, 1]]), np.array([[1, 0]])]


def test_labels_pool_the_cases_and_skip_the_background() -> None:
    labels = LabelManager({"background": 0, "lesion": 1, "other": 2}, None)
    probabilities = [np.stack([1 - scores, scores, 0 * scores]) for scores in SCORES]
    dice, precision = example.score(TRUTHS, SEGMENTATIONS, probabilities, labels)
    assert dice == {"lesion": pytest.approx(0.8), "other": None}  # 2 * 2 / (2 + 3)
    assert precision == {"lesion": pytest.approx(5 / 6, abs=1e-4), "other": None}


def test_regions_have_no_channel_of_background() -> None:
    labels = LabelManager({"background": 0, "whole": [1, 2], "core": [2]}, [1, 2])
    truths = [np.array([[2, 0]]), np.array([[1, 0]])]
    probabilities = [np.stack([scores, 1 - scores]) for scores in SCORES]
    dice, precision = example.score(truths, SEGMENTATIONS, probabilities, labels)
    assert dice == {"whole": pytest.approx(0.8), "core": 0}
    assert precision["whole"] == pytest.approx(5 / 6, abs=1e-4)
    assert precision["core"] == pytest.approx(1 / 4, abs=1e-4)  # the lowest of .1, .2, .4, .9


def test_ignored_voxels_do_not_count() -> None:
    labels = LabelManager({"background": 0, "lesion": 1, "ignore": 2}, None)
    truths = [np.array([[1, 2]]), TRUTHS[1]]
    probabilities = [np.stack([1 - scores, scores]) for scores in SCORES]
    dice, precision = example.score(truths, SEGMENTATIONS, probabilities, labels)
    assert (dice, precision) == ({"lesion": 1.0}, {"lesion": 1.0})
