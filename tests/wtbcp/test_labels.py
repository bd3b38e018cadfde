"""One channel a head: annotators' targets, the teacher's labels, and which structures are one piece."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from nnunetv2_ext.wtbcp.labels import annotated, largest_component, single_structures, taught


def labels(regions: bool, ignore: int | None) -> Any:
    return SimpleNamespace(
        has_regions=regions,
        ignore_label=ignore,
        num_segmentation_heads=2 if regions else 3,
        foreground_labels=[1, 2],
        foreground_regions=[(1, 2), (2,)],
    )


def test_classes_with_an_ignore_label() -> None:
    target, known = annotated(torch.tensor([[[0, 1, 2, 3]]]), labels(False, 3))
    assert target.tolist() == [[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]]
    assert known.tolist() == [[[True, True, True, False]]]
    assert bool(annotated(torch.tensor([[[0, 1, 2]]]), labels(False, None))[1].all())


def test_regions_with_an_ignore_map() -> None:
    target, known = annotated(torch.tensor([[[1, 1, 0], [0, 1, 0], [0, 0, 1]]]), labels(True, 3))
    assert target.tolist() == [[[1, 1, 0], [0, 1, 0]]] and known.tolist() == [[[True, True, False]]]


@pytest.mark.parametrize("shape", [(12, 13), (7, 8, 9)])
def test_the_largest_component_is_scipys(shape) -> None:
    mask = np.random.RandomState(len(shape)).rand(*shape) < (0.25 if len(shape) == 2 else 0.08)
    parts, number = ndimage.label(mask, np.ones((3,) * len(shape)))
    sizes = ndimage.sum_labels(mask, parts, range(1, number + 1))
    assert number > 3 and (sizes == sizes.max()).sum() == 1
    assert np.array_equal(largest_component(mask), parts == 1 + sizes.argmax())
    assert not largest_component(np.zeros(shape, dtype=bool)).any()


def test_what_the_teacher_says_becomes_background_where_a_component_falls() -> None:
    classes = torch.tensor([[1, 1, 0, 1, 2, 0, 2]])
    logits = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1)[..., None].float()
    seen = taught(logits, False, [False, True, False])[0, :, :, 0]
    assert seen.argmax(0).tolist() == [1, 1, 0, 0, 2, 0, 2] and seen.sum(0).tolist() == [1] * 7
    assert taught(logits, False, [False] * 3)[0, :, :, 0].argmax(0).tolist() == classes[0].tolist()


def test_each_region_is_decided_by_itself() -> None:
    logits = torch.tensor([[[1.0, 1, -1, 1], [1, -1, 1, -1]]])[..., None]
    assert taught(logits, True, [True, False])[0, :, :, 0].tolist() == [[1, 1, 0, 0], [1, 0, 1, 0]]


class Cases:
    """Class 1 is one piece, or in slice 1 two; of class 2 there are two pieces, one of them a speck."""

    identifiers = ("a",)

    def load_case(self, case: str) -> Any:
        seg = np.zeros((1, 2, 20, 20), dtype=np.int16)
        seg[0, :, 0:4, 0:3] = 1
        seg[0, 0, 3, 0:9] = seg[0, 1, 0:3, 6:9] = 1
        seg[0, 0, 10:16, 10:16] = 2
        seg[0, 0, 19, 19] = 2
        return None, seg, None, {}


def test_structures_of_one_piece_are_told_from_others() -> None:
    assert single_structures(Cases(), labels(False, None), 3) == [False, True, True]
    assert single_structures(Cases(), labels(False, None), 2) == [False, False, True]
    assert single_structures(Cases(), labels(True, None), 2) == [False, True]
