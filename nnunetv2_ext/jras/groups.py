"""Who belongs together: the numbers of subjects that are stored beside each guide."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def new_group_key() -> bytes:
    """A random key for ``group_ids``. It belongs into the training's own state, never among the weights."""
    return secrets.token_bytes(16)


def group_ids(cases: Sequence[str], key: bytes, subjects: Mapping[str, str] | None = None) -> Tensor:
    """The number of each case's subject, int64 ``(len(cases),)`` on the CPU: 8 bytes of keyed BLAKE2b.

    Without the key, which stays out of the weights, a published model does not tell whether a given case was in it.

    Args:
        cases: nnU-Net's case ids.
        key: from ``new_group_key``.
        subjects: case to subject; cases of one subject never guide each other. None: every case is its own subject.
    """
    numbers = {
        case: int.from_bytes(
            hashlib.blake2b((subjects or {}).get(case, case).encode(), digest_size=8, key=key).digest(),
            "little",
            signed=True,
        )
        for case in dict.fromkeys(cases)
    }
    return torch.tensor([numbers[case] for case in cases], dtype=torch.int64)
