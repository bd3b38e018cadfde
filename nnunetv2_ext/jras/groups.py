"""Who belongs together: case ids to subjects, and subjects to the numbers that are stored beside each guide."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor


def new_group_key() -> bytes:
    """A random key for ``group_ids``. It belongs into the training's own state, never among the weights."""
    return secrets.token_bytes(16)


def subject_of(case: str, regex: str | None = None) -> str:
    """The subject a case belongs to; cases of one subject never guide each other.

    Args:
        case: nnU-Net's case id.
        regex: searched in the case id; its first group is the subject, or the whole match if it has no group
            (``^(patient\\d+)`` makes two frames of one patient one subject). None: every case is its own subject.

    Raises:
        ValueError: the expression is invalid, does not match the case, or matches nothing of it.
    """
    if regex is None:
        return case
    try:
        found = re.search(regex, case)
    except re.error as error:
        raise ValueError(f"jras.group_regex={regex!r} is no regular expression ({error}); mend or unset it") from None
    subject = found and (found.group(1) if found.re.groups else found.group(0))
    if not subject:
        raise ValueError(
            f"jras.group_regex={regex!r} does not find a subject in the case id {case!r}; it must match every training "
            "and validation case, with the subject as its first group"
        )
    return subject


def group_ids(cases: Sequence[str], key: bytes, regex: str | None = None) -> Tensor:
    """The number of each case's subject, int64 ``(len(cases),)`` on the CPU: 8 bytes of keyed BLAKE2b.

    Without the key, which stays out of the weights, a published model does not tell whether a given case was in it.

    Raises:
        ValueError: as ``subject_of``.
    """
    numbers = {
        case: int.from_bytes(
            hashlib.blake2b(subject_of(case, regex).encode(), digest_size=8, key=key).digest(), "little", signed=True
        )
        for case in dict.fromkeys(cases)
    }
    return torch.tensor([numbers[case] for case in cases], dtype=torch.int64)
