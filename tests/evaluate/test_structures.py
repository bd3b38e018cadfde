"""Classes, regions and tolerances."""

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_ext.evaluate.structures import Structure, from_dataset_json, from_values, tolerances

CLASSES = {"background": 0, "liver": 1, "tumour": 2, "ignore": 3}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}


@pytest.mark.parametrize(("labels", "order"), [(CLASSES, None), (REGIONS, [1, 2])])
def test_the_structures_are_nnunets(labels: dict, order) -> None:
    ours = from_dataset_json({"labels": labels})
    theirs = LabelManager(labels, order)
    expected = theirs.foreground_regions if theirs.has_regions else theirs.foreground_labels
    assert [s.values for s in ours.structures] == [tuple(np.atleast_1d(r).tolist()) for r in expected]
    assert [s.key for s in ours.structures] == [label_or_region_to_key(r) for r in expected]
    assert ours.ignore == theirs.ignore_label == 3
    assert [s.name for s in ours.structures] == [n for n in labels if n not in ("background", "ignore")]


def test_keys_are_those_of_summary_json() -> None:
    assert Structure("a", (1,)).key == "1" and Structure("b", (1, 2)).key == "(1, 2)"


def test_labels_outside_dataset_json_are_named() -> None:
    labels = from_dataset_json({"labels": CLASSES})
    labels.check("a file", [0, 1, 2, 3], may_ignore=True)
    with pytest.raises(
        ValueError, match=r"case 7 holds the label 4, 9, which dataset.json does not have: it has 0, 1, 2"
    ):
        labels.check("case 7", [0, 4, 9], may_ignore=False)
    with pytest.raises(ValueError, match="the ignore label belongs into the truth only"):
        labels.check("case 7", [3], may_ignore=False)
    from_values([1]).check("a file", [0, 1, 17], may_ignore=False)


@pytest.mark.parametrize(
    "content", [{}, {"labels": ["liver"]}, {"labels": {"0": "background", "1": "liver"}}, {"labels": {"a": 1.5}}]
)
def test_a_dataset_json_that_is_none(content: dict) -> None:
    with pytest.raises(ValueError, match=r"x.json has no labels of the form"):
        from_dataset_json(content, "x.json")


def test_nothing_but_background() -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        from_dataset_json({"labels": {"background": 0, "ignore": 1}})


@pytest.mark.parametrize("values", [[], [0, 1], [2, 2]])
def test_impossible_label_values(values) -> None:
    with pytest.raises(ValueError, match="--labels needs different values of 1 or more"):
        from_values(values)


def test_tolerances() -> None:
    structures = [Structure("liver", (1,)), Structure("tumour=small", (2,))]
    assert tolerances(["1.5"], structures) == {"liver": 1.5, "tumour=small": 1.5}
    assert tolerances(["1", "tumour=small=2"], structures) == {"liver": 1, "tumour=small": 2}
    with pytest.raises(ValueError, match="says nothing of liver"):
        tolerances(["tumour=small=2"], structures)
    with pytest.raises(ValueError, match="no structure 'spleen'; there are liver"):
        tolerances(["spleen=2"], structures)
    with pytest.raises(ValueError, match="neither a number of mm"):
        tolerances(["1mm"], structures)
