"""Batches of two streams, labelled samples first, with the view map as further target channel."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_ext.data.unlabelled import UnlabelledStream
from nnunetv2_ext.rada.annotation.planes import Planes
from nnunetv2_ext.rada.propagation.propagate import NONE, read_propagated
from nnunetv2_ext.rada.views import INSIDE, NOTHING, LazyTarget


class ViewDataset:
    """An nnU-Net dataset whose labels carry their view map and, if wanted, propagated planes as further channels.

    Args:
        dataset: nnU-Net's, of a configuration that is not a cascade.
        planes: per case; cases without an entry have none.
        labelled: cases with any annotated voxel.
        ignore: the ignore label.
        propagated: per case the file of its propagated planes; None: no such channels.
    """

    def __init__(
        self,
        dataset: Any,
        planes: Mapping[str, Planes],
        labelled: Collection[str],
        ignore: int,
        propagated: Mapping[str, Path] | None = None,
    ) -> None:
        self._dataset, self._ignore = dataset, ignore
        self.identifiers: list[str] = dataset.identifiers
        self.labelled = [case for case in self.identifiers if case in labelled]
        self.unlabelled = [case for case in self.identifiers if case not in labelled]
        self._planes = {case: planes[case] for case in self.labelled if case in planes}
        self._propagated = propagated

    def load_case(self, identifier: str) -> tuple[Any, LazyTarget, None, dict[str, Any]]:
        """Data (C, X, Y, Z), target (channels, X, Y, Z), no previous stage, properties; read when cropped."""
        data, label, _, properties = self._dataset.load_case(identifier)
        propagated: Any = None
        if self._propagated is not None:
            file = self._propagated.get(identifier)
            propagated = NOTHING if file is None else read_propagated(file)
        target = LazyTarget(label, self._ignore, self._planes.get(identifier, Planes()), propagated)
        return data, target, None, properties


def number_labelled(batch_size: int, labelled_share: float, min_labelled: int, has_unlabelled: bool) -> int:
    """Labelled samples in a batch: the share, rounded up, and no less than ``min_labelled``.

    A batch that is no larger than ``min_labelled`` is all labelled; in a larger one, below a share of 1, at least one
    unlabelled sample stays.

    Raises:
        ValueError: a batch of one sample cannot hold both streams.
    """
    if not has_unlabelled or labelled_share == 1 or batch_size <= min_labelled > 1:
        return batch_size
    if batch_size < 2:
        raise ValueError(
            "RADA draws labelled and unlabelled samples into each batch, which needs a batch size of at least 2, and "
            "the plans say 1: set batch_size=2, or rada.labelled_share=1 to leave the unlabelled cases out"
        )
    # 0.1 * 10 must not become 2
    return min(max(min_labelled, math.ceil(batch_size * labelled_share - 1e-9)), batch_size - 1)


class TwoStreamLoader(nnUNetDataLoader):
    """nnU-Net's loader: the first samples of a batch are of labelled cases, the others of unlabelled ones.

    Labelled patches are centred (where the border allows) on an annotated voxel, with probability
    ``oversample_foreground_percent`` for each sample on a foreground voxel: nnU-Net forces the last third of a batch,
    which would be unlabelled samples here. Patches of unlabelled cases lie anywhere.

    `others` are arguments of `nnUNetDataLoader`; for `labelled_share` and `min_labelled` see `number_labelled`.
    """

    _data: ViewDataset
    has_ignore: bool

    def __init__(self, data: ViewDataset, labelled_share: float, min_labelled: int, **others: Any) -> None:
        super().__init__(data, probabilistic_oversampling=True, **others)
        self.number_labelled = number_labelled(self.batch_size, labelled_share, min_labelled, bool(data.unlabelled))

    def get_indices(self) -> np.ndarray:
        """Case ids of a batch, each stream drawn with replacement."""
        labelled = np.random.choice(self._data.labelled, self.number_labelled)
        rest = self.batch_size - self.number_labelled
        return np.concatenate((labelled, np.random.choice(self._data.unlabelled, rest))) if rest else labelled

    def get_bbox(self, data_shape: Any, force_fg: bool, class_locations: Any, *args: Any, **kwargs: Any) -> Any:
        """nnU-Net's; a case without annotated voxels is cropped anywhere, without a warning for each sample."""
        if len(class_locations[self.annotated_classes_key]) > 0:
            return super().get_bbox(data_shape, force_fg, class_locations, *args, **kwargs)
        has_ignore, self.has_ignore = self.has_ignore, False
        try:
            return super().get_bbox(data_shape, False, class_locations, *args, **kwargs)
        finally:
            self.has_ignore = has_ignore


class JoinedStream(UnlabelledStream):
    """Batches of a `TwoStreamLoader`, with further samples of other cases; their label is ``ignore`` throughout."""

    def __init__(self, stream: UnlabelledStream, ignore: int) -> None:
        super().__init__(stream.labelled, stream.unlabelled)
        self._ignore = ignore

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        other, target = batch.pop("unlabelled"), batch["target"]
        more = target.new_full((len(other["data"]), *target.shape[1:]), self._ignore)
        more[:, 1:2] = INSIDE * other["inside"]
        more[:, 5:] = NONE  # nothing was propagated
        both = {name: torch.cat((batch[name], new)) for name, new in (("data", other["data"]), ("target", more))}
        return batch | both | {"keys": np.concatenate((batch["keys"], other["keys"]))}
