"""Cross-validation on sparsely labelled data: only labelled cases validate, unlabelled ones always train."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_ext.core.files import atomic_write_text, read_json, require_writable
from nnunetv2_ext.data.find import PREPROCESSED, nnunet_folder
from nnunetv2_ext.data.subjects import members_of, pairs_suggested

Split = dict[str, list[str]]
SPLIT = "splits_final.json"  # nnU-Net's, in the folder of the preprocessed dataset

_FOLDS = 5  # that nnU-Net's own split has
_SEED = 12345  # nnU-Net's, so that a fully labelled dataset is split as nnU-Net would


def labelled_splits(
    labelled: Collection[str], unlabelled: Collection[str] = (), subjects: Mapping[str, str] | None = None
) -> list[Split]:
    """Folds over min(5, number of labelled subjects) parts of the labelled cases (those with any annotation).

    Args:
        labelled, unlabelled: Cases. Unlabelled ones are in every fold's training part, except that with `subjects`
            those of a subject that validates stay out of that fold.
        subjects: Case to subject; None makes every case its own.

    Returns:
        ``[{"train": [...], "val": [...]}, ...]``, sorted. With all cases labelled and no `subjects` it is nnU-Net's.

    Raises:
        ValueError: fewer than two labelled subjects.
    """
    group = subjects or {}
    names = list(members_of(labelled, subjects))
    if len(names) < 2:
        unit = "subject has" if subjects else "case has"
        raise ValueError(
            f"only {len(names)} {unit} annotations, which cannot be split into training and validation: "
            + ("train with fold 'all'" if names else "annotate some planes first")
        )
    return [
        {
            "train": sorted(case for case in (*labelled, *unlabelled) if group.get(case, case) not in held_out),
            "val": sorted(case for case in labelled if group.get(case, case) in held_out),
        }
        for held_out in (set(part["val"]) for part in generate_crossval_split(names, _SEED, min(_FOLDS, len(names))))
    ]


def write_split_if_absent(
    file: Path, labelled: Collection[str], unlabelled: Collection[str], subjects: Mapping[str, str] | None = None
) -> bool:
    """Write nnU-Net's ``splits_final.json`` by `labelled_splits` unless it exists; True if it was written.

    Raises:
        ValueError: as `labelled_splits`.
    """
    if file.is_file():
        return False
    atomic_write_text(file, json.dumps(labelled_splits(labelled, unlabelled, subjects), indent=4) + "\n")
    return True


def write_split_for(
    dataset_name: str,
    labelled: Collection[str],
    unlabelled: Collection[str],
    subjects: Mapping[str, str] | None,
    say: Callable[[str], None],
) -> None:
    """Put the split of a new dataset where nnU-Net will look for it, so that every trainer uses the same one."""
    if subjects is None and (suggested := pairs_suggested({*labelled, *unlabelled})):
        say(f"WARNING: {suggested}. Nothing says so, and folds may divide them: give it as --group-regex")
    if len(members_of(labelled, subjects)) < 2:
        say("WARNING: one labelled case (or subject) cannot be split: train with fold 'all'")
        return
    if not os.environ.get(PREPROCESSED):
        say("nnUNet_preprocessed is not set, so no split was written: the trainer writes one")
        return
    folder = require_writable(nnunet_folder(PREPROCESSED) / dataset_name)
    write_split_if_absent(folder / SPLIT, labelled, unlabelled, subjects)
    say(f"split: {folder / 'splits_final.json'} (unlabelled cases train in every fold and validate in none)")


def read_split(file: Path) -> list[Split]:
    """The folds of a ``splits_final.json``.

    Raises:
        ValueError: it cannot be read, or does not list folds with 'train' and 'val'.
    """
    content = read_json(file)
    try:
        return [{part: [str(case) for case in fold[part]] for part in ("train", "val")} for fold in content]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a list of folds with 'train' and 'val': correct it, or delete it") from error


def require_fold(base: Path, fold: str) -> None:
    """Raise ValueError if the split of a preprocessed dataset has no such fold; ``all`` is always there.

    Without splits_final.json nnU-Net writes five folds. For any other number it draws a random split, and only its log
    says so.
    """
    file = base / SPLIT
    number = len(read_split(file)) if file.is_file() else _FOLDS
    if fold != "all" and int(fold) >= number:
        where = file if file.is_file() else f"nnU-Net's split of {base.name}"
        raise ValueError(f"{where} has no fold {fold}: -f takes 0 to {number - 1}, or all")


def clean_fold(
    train: Sequence[str], val: Sequence[str], labelled: Collection[str], warn: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """A fold of a sparsely labelled dataset: unlabelled cases leave its validation part, with one line to `warn`.

    Raises:
        ValueError: no labelled case is left to train on, or none to validate on.
    """
    remedy = "delete splits_final.json, and a split that keeps unlabelled cases out of validation is written"
    if not set(labelled).intersection(train):
        raise ValueError(f"none of the {len(train)} training cases of this fold has annotations: {remedy}")
    kept = [case for case in val if case in labelled]
    if val and not kept:
        raise ValueError(f"none of the {len(val)} validation cases of this fold has annotations: {remedy}")
    if len(kept) < len(val):
        warn(
            f"WARNING: {len(val) - len(kept)} of {len(val)} validation cases have no annotation and are left out of "
            f"validation; {remedy}"
        )
    return list(train), kept
