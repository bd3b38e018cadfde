"""Features by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nnunetv2_ext.estimate.features import (
    agreement,
    logit_of_share,
    masks_of,
    of_case,
    of_structure,
    share_of_logit,
    with_agreement,
)


def test_a_map_of_four_by_four_by_hand() -> None:
    p = np.zeros((4, 4))
    p[0, 0], p[0, 1], p[0, 2], p[3, 3], p[2, 0] = 0.9, 0.8, 0.6, 0.7, 0.3
    mask = p > 0.5
    entropy = np.where(mask, 0.5, 0.0)
    entropy[0, 0] = 0.1
    found = of_structure(torch.from_numpy(p), torch.from_numpy(mask), torch.from_numpy(entropy[mask]))
    soft = 2 * (0.9 + 0.8 + 0.6 + 0.7) / ((0.9 + 0.8 + 0.6 + 0.7 + 0.3) + 4)
    assert found["soft"] == pytest.approx(math.log((soft + 0.02) / (1.02 - soft)))
    assert found["ent"] == pytest.approx((0.1 + 3 * 0.5) / 4)
    assert found["band"] == pytest.approx(math.log(1 + 4 / 4))  # 0.8, 0.6, 0.7, 0.3 lie in between
    assert found["frag"] == pytest.approx(1 - 3 / 4)


def test_certainty_is_the_best_there_is() -> None:
    one_hot = np.zeros((3, 5, 5))
    one_hot[0] = 1
    one_hot[:, 1:3, 1:3] = np.array([0, 1, 0])[:, None, None]
    (first, size), (second, none) = of_case(torch.from_numpy(one_hot), has_regions=False)
    assert size == 4 and none == 0
    assert first == pytest.approx({"soft": logit_of_share(1.0), "ent": 0, "band": 0, "frag": 0}, abs=1e-9)
    assert second == {"soft": logit_of_share(0.0), "ent": 1.0, "band": 0.0, "frag": 0.0}


def test_empty_slices_change_nothing() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet((1, 1, 1), (4, 6, 6)).transpose(3, 0, 1, 2)
    empty = np.zeros((3, 2, 6, 6))
    empty[0] = 1
    longer = of_case(torch.from_numpy(np.concatenate((p, empty), 1)), False)
    for (a, n), (b, m) in zip(of_case(torch.from_numpy(p), False), longer, strict=True):
        assert a == pytest.approx(b) and n == m


def test_regions_have_a_threshold_and_an_entropy_of_their_own() -> None:
    p = np.array([[[0.9, 0.5], [0.2, 0.6]], [[0.6, 0.6], [0.6, 0.6]]])
    (first, n), (second, m) = of_case(torch.from_numpy(p), has_regions=True)
    binary = [-(q * math.log2(q) + (1 - q) * math.log2(1 - q)) for q in (0.9, 0.6)]
    assert n == 2 and first["ent"] == pytest.approx(sum(binary) / 2)
    assert m == 4 and second["band"] == pytest.approx(math.log(2))


def test_agreement_of_masks_by_hand() -> None:
    a = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]]]).bool()
    b = torch.tensor([[[1, 0, 0, 0]], [[0, 0, 0, 0]]]).bool()
    assert agreement(a, [b, a]) == pytest.approx([(2 / 3 + 1) / 2, 0])
    p = torch.tensor([[[0.2, 0.6]], [[0.7, 0.1]], [[0.1, 0.3]]])
    assert masks_of(p, False).tolist() == [[[True, False]], [[False, False]]]
    found = with_agreement(of_case(p, False), [0.5, 0.0], [0.9, 0.0])
    assert found[0][0]["ens"] == 0.9 and share_of_logit(found[0][0]["tta"]) == pytest.approx(0.5)
    assert set(with_agreement(of_case(p, False), None, None)[0][0]) == {"soft", "ent", "band", "frag"}
