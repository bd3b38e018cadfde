"""Which cases the compared trainings learned from: a difference in them is no difference between trainers."""

from __future__ import annotations

from collections.abc import Sequence

from nnunetv2_ext.compare.runs import Arm, FoldRun
from nnunetv2_ext.evaluate.pairs import listed

OPTION = "--allow-different-training-cases"


def require_same_training_cases(arms: Sequence[Arm], allowed: bool = False) -> list[str]:
    """Make sure that all arms learned from the same training cases of their folds.

    A training without our setting ``train_cases`` (plain nnUNetTrainer, say) learned from all of its fold's. What the
    models of test predictions learned from is not known.

    Args:
        arms: checked by ``runs.require_comparable``.
        allowed: differences become a note.

    Returns:
        Notes for the reader.

    Raises:
        ValueError: they differ and are not allowed to.
    """
    if any(run.fold == "test" for arm in arms for run in arm.runs()):
        return ["folders of predictions do not tell which training cases their models learned from"]
    sets = [{(run.fold, training_set(run)) for run in arm.runs()} for arm in arms]
    if all(some == sets[0] for some in sets):
        return []
    described = "; ".join(f"{arm.name}: {_described(some)}" for arm, some in zip(arms, sets, strict=True))
    if allowed:
        return [f"the training cases differ ({described}), so that differences need not come from the trainers"]
    raise ValueError(
        f"the training cases differ ({described}), so that a difference need not come from the trainers: train on the "
        f"same ones (train_cases, train_cases_seed), or add {OPTION}"
    )


def training_set(run: FoldRun) -> str:
    """``all``, ``5 of draw 0``, or the names."""
    wanted = run.settings.get("train_cases")
    if isinstance(wanted, int):
        return f"{wanted} of draw {run.settings.get('train_cases_seed', 0)}"
    return run.train_cases


def _described(sets: set[tuple[str, str]]) -> str:
    found = sorted({some for _, some in sets})
    return " / ".join(listed(some.split(", ")) if ", " in some else some for some in found)
