"""How well region vectors tell the classes apart: mean cosines within and between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

SMALL_GAP = 0.02


@dataclass(frozen=True)
class Spread:
    """Mean cosines over pairs of vectors; nan where there is no such pair.

    Attributes:
        within: two regions of one class.
        between: regions of two classes.
        background: a region and the background of any case.
    """

    within: float
    between: float
    background: float

    @property
    def gap(self) -> float:
        """`within` less the larger of the other two; nan if there is nothing to compare."""
        others = [value for value in (self.between, self.background) if not math.isnan(value)]
        return self.within - max(others) if others else math.nan

    def describe(self) -> str:
        """One line."""
        return (
            f"mean cosine within a class {self.within:.3f}, between classes {self.between:.3f}, "
            f"against background {self.background:.3f}"
        )


def spread(vectors: Tensor, present: Tensor, background: Tensor, has_background: Tensor) -> Spread:
    """Mean cosines of unit `vectors` ``(N, 3, C, D)`` where `present`, and `background` ``(N, D)``.

    Sums of cosines over all pairs are products of sums of vectors: the sum over i, j of v_i . v_j is |sum v|^2.
    """
    masked = (vectors * present[..., None]).double()
    sums = masked.sum((0, 1))  # (C, D)
    counts = present.sum((0, 1)).double()  # (C,)
    squares = masked.square().sum()
    own = sums.square().sum()
    everything = sums.sum(0)
    pairs_within = (counts * (counts - 1)).sum()
    pairs_between = counts.sum() ** 2 - counts.square().sum()
    others = (background * has_background[:, None]).double().sum(0)
    return Spread(
        within=_mean(own - squares, pairs_within),
        between=_mean(everything.square().sum() - own, pairs_between),
        background=_mean(everything @ others, counts.sum() * has_background.sum()),
    )


def _mean(total: Tensor, number: Tensor) -> float:
    return float(total / number) if number > 0 else math.nan
