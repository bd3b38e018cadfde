"""A second stream of patches, without labels, beside nnU-Net's batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class UnlabelledStream:
    """A training loader whose batches also carry patches of other cases.

    A batch of the first loader gets the key ``unlabelled``: ``data`` (B', C, *S), float32, and ``keys``, B' case ids,
    of the second loader's batch. Its labels are left behind. A method reads ``batch.extra("unlabelled")``, on the
    device.

    Args:
        labelled: nnU-Net's loader or one of its kind; its batches are otherwise left as they are.
        unlabelled: the same, over a dataset of cases whose labels nobody may see.
    """

    def __init__(self, labelled: Iterator[dict[str, Any]], unlabelled: Iterator[dict[str, Any]]) -> None:
        self.labelled, self.unlabelled = labelled, unlabelled

    def __iter__(self) -> UnlabelledStream:
        return self

    def __next__(self) -> dict[str, Any]:
        batch, other = next(self.labelled), next(self.unlabelled)
        return batch | {"unlabelled": {"data": other["data"], "keys": [str(key) for key in other["keys"]]}}

    def set_thread_id(self, thread_id: int) -> None:
        """What nnU-Net's worker processes call first."""
        for loader in (self.labelled, self.unlabelled):
            if hasattr(loader, "set_thread_id"):
                loader.set_thread_id(thread_id)
