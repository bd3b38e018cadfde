"""Choosing what a simulated annotator labels: cases (whole subjects), and planes within a case."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from nnunetv2_ext.data.subjects import members_of
from nnunetv2_ext.rada.annotation.planes import Array, Planes

RULES = ("largest", "middle")


def choose_planes(label: Array, axes: Sequence[int], rule: str) -> Planes:
    """Planes to annotate in a dense (X, Y, Z) label with foreground > 0.

    Several planes on one axis are spread: the foreground's extent is cut into as many equal parts and each gives one.

    Args:
        label: dense.
        axes: array axis of each plane; (0, 1, 2) is one on each, (2, 2, 2) three parallel ones.
        rule: ``largest``: most classes, then most foreground voxels. ``middle`` of the extent.

    Raises:
        ValueError: more planes than slices on an axis, or a label without foreground.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be {' or '.join(RULES)}, got {rule!r}")
    foreground = label > 0
    if not foreground.any():
        raise ValueError("a label without foreground has no plane to choose")
    chosen: list[list[int]] = [[], [], []]
    for axis, number in sorted(Counter(axes).items()):
        size = label.shape[axis]
        if number > size:
            raise ValueError(f"{number} planes are asked for on axis {axis}, which has {size} slices; ask for fewer")
        extent = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        first, stop = int(extent[0]), int(extent[-1]) + 1
        if stop - first < number:  # an object thinner than the number of planes: take neighbours too
            first = max(0, min(first - (number - (stop - first)) // 2, size - number))
            stop = first + number
        bounds = [first + (stop - first) * part // number for part in range(number + 1)]
        parts = list(pairwise(bounds))
        if rule == "largest":
            chosen[axis] = [_largest(label, axis, a, b) for a, b in parts]
        else:
            chosen[axis] = [(a + b - 1) // 2 for a, b in parts]
    return Planes.of(chosen)


def draw_cases(
    cases: Sequence[str],
    number: int,
    seed: int,
    subjects: Mapping[str, str] | None = None,
    usable: Callable[[str], bool] = lambda case: True,
    why: str = "",
) -> list[str]:
    """Exactly `number` cases by a seeded draw of whole subjects; draws of one seed are nested if cases are subjects.

    Args:
        cases: to draw from.
        number: how many.
        seed: of the draw.
        subjects: case to subject; None makes every case its own.
        usable: whether a case has foreground; a subject with a case that has none is passed over.
        why: what the cases are drawn for, for the error.

    Raises:
        ValueError: there are too few, or whole subjects do not add up to `number`.
    """
    members = members_of(cases, subjects)
    names = list(members)
    drawn: list[str] = []
    for index in np.random.RandomState(seed).permutation(len(names)):
        group = members[names[index]]
        if len(drawn) + len(group) <= number and all(map(usable, group)):
            drawn += group
        if len(drawn) == number:
            return sorted(drawn)
    if not any(map(usable, cases)):
        raise ValueError(f"none of the {len(cases)} cases has foreground, so none can be drawn {why}: check the labels")
    unit = "cases" if subjects is None else "cases of whole subjects"
    raise ValueError(
        f"{number} {unit} are asked for {why}, but only {len(drawn)} of {len(cases)} could be drawn; "
        "ask for fewer" + ("" if subjects is None else f" (e.g. {len(drawn)}) or group otherwise")
    )


def _largest(label: Array, axis: int, start: int, stop: int) -> int:
    """Index in start..stop-1 of the slice with most classes, then most foreground; the first of equals."""
    planes = [np.take(label, i, axis) for i in range(start, stop)]
    scores = [(np.unique(p[p > 0]).size, int((p > 0).sum())) for p in planes]
    return start + max(range(len(scores)), key=lambda i: scores[i])
