"""The box lies inside, has the size that the share says, and each half of a batch keeps the other side of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunetv2_ext.wtbcp.copy_paste import both_ways, outside_of_box


@pytest.mark.parametrize(
    ("shape", "share", "side"),
    [((6, 9), 2 / 3, (4, 6)), ((2, 8, 3), 2 / 3, (1, 5, 2)), ((4, 4), 0.99, (3, 3)), ((9, 9), 0.01, (1, 1))],
)
def test_the_box_has_its_size_and_goes_everywhere(shape, share: float, side) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = np.zeros(shape, dtype=bool)
    for _ in range(1000):
        outside = outside_of_box(shape, share, generator).numpy()
        inside = np.argwhere(~outside)
        assert tuple(inside.max(0) - inside.min(0) + 1) == side and len(inside) == np.prod(side)
        seen |= ~outside
    assert seen.all()


def test_half_of_the_batch_keeps_what_is_outside() -> None:
    outside = torch.tensor([[True, False], [True, True]])
    mask = both_ways(outside, 3)
    assert mask.shape == (3, 1, 2, 2)
    assert mask[0, 0].tolist() == outside.tolist() and mask[1, 0].tolist() == mask[2, 0].tolist() == (~outside).tolist()
