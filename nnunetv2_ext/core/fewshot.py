"""Few-shot training sets: a part of a fold's training cases, by number or by name."""

from collections.abc import Sequence

import numpy as np


def select_train_cases(available: Sequence[str], wanted: int | Sequence[str] | None, seed: int = 0) -> list[str]:
    """Choose training cases; draws of one seed are nested (5 cases are part of 10 cases).

    `wanted` says how many, or which; None keeps all, in nnU-Net's order.

    Raises:
        ValueError: more cases than there are, none, or a case that is not in the fold's training list.
    """
    if wanted is None:
        return list(available)
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(available):
            raise ValueError(
                f"train_cases={wanted}, but this fold has {len(available)} training cases; choose 1 to {len(available)}"
            )
        order = np.random.RandomState(seed).permutation(len(available))
        names = sorted(available)
        return sorted(names[i] for i in order[:wanted])
    unknown = [case for case in wanted if case not in set(available)]
    if unknown or not wanted:
        what = f"names {', '.join(unknown)}, not among" if unknown else "is empty; name some of"
        raise ValueError(
            f"train_cases {what} the {len(available)} training cases of this fold "
            f"(e.g. {', '.join(sorted(available)[:3])})"
        )
    return sorted(set(wanted))
