"""Targets as one channel a head: those of annotators, and those that a teacher says."""

from collections.abc import Iterator, Sequence
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunetv2_ext.parts.consistency import valid_mask

_CASES = 20  # that are looked at for structures of several pieces
_PIECE = 0.05  # of a structure; smaller ones do not count
_SHARE = 0.2  # of the images with a structure


def annotated(target: Tensor, labels: LabelManager) -> tuple[Tensor, Tensor]:
    """A training target as float (B, heads, *S) of 0 and 1, and where it is known, bool (B, 1, *S).

    Args:
        target: (B, 1, *S) or with regions (B, R, *S), nnU-Net's ignore map behind them; of the highest resolution.
        labels: of the trainer.
    """
    valid = valid_mask(target, labels.ignore_label, labels.has_regions)
    known = torch.ones_like(target[:, :1], dtype=torch.bool) if valid is None else valid
    if labels.has_regions:
        return target[:, : labels.num_segmentation_heads].float(), known
    classes = torch.where(known, target, 0)[:, 0]
    return _one_hot(classes, labels.num_segmentation_heads).float(), known


def taught(logits: Tensor, regions: bool, single: Sequence[bool]) -> Tensor:
    """The teacher's hard labels, float (B, heads, *S) of 0 and 1.

    Args:
        logits: (B, heads, *S).
        regions: heads are regions, and each is decided by itself.
        single: for each head whether all but its largest component become background.
    """
    # torch's argmax takes ten times as long on a CPU
    hot = logits > 0 if regions else _one_hot(logits.max(1).indices, logits.shape[1])
    if any(single):
        heads = [head for head, one in enumerate(single) if one]
        host = hot[:, heads].cpu().numpy()
        for sample in host:
            for mask in sample:
                mask &= largest_component(mask)
        kept = torch.from_numpy(host).to(hot.device)
        if not regions:
            hot[:, 0] |= (hot[:, heads] & ~kept).any(1)
        hot[:, heads] = kept
    return hot.float()


def _one_hot(classes: Tensor, heads: int) -> Tensor:
    """(B, *S) to bool (B, heads, *S); several times as fast as torch's one_hot."""
    return torch.stack([classes == head for head in range(heads)], 1)


def largest_component(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest part of ``mask`` (*S) that is connected, by corners too; all of an empty one."""
    sizes, parts = _components(mask)
    return mask if len(sizes) < 2 else parts == 1 + int(np.argmax(sizes))


def _components(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Sizes of the components, and the mask with their numbers from 1 on."""
    parts = cc3d.connected_components(np.ascontiguousarray(mask), connectivity=8 if mask.ndim == 2 else 26)
    return np.bincount(parts.ravel())[1:], parts


def single_structures(dataset: Any, labels: LabelManager, dim: int) -> list[bool]:
    """For each head whether its structure is one piece in most of the labelled images; False for the background.

    An image is a case, or a slice for a network of ``dim`` 2. Of a dataset of nnU-Net the first 20 cases are read.
    """
    structures = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    images, several = np.zeros(len(structures)), np.zeros(len(structures))
    for case in list(dataset.identifiers)[:_CASES]:
        for image in _images(np.asarray(dataset.load_case(case)[1][0]), dim):
            for number, structure in enumerate(structures):
                sizes, _ = _components(np.isin(image, structure))
                images[number] += bool(len(sizes))
                several[number] += int((sizes >= _PIECE * sizes.sum()).sum()) > 1
    single = [bool(n) and bool(s <= _SHARE * n) for n, s in zip(images, several, strict=True)]
    return single if labels.has_regions else [False, *single]


def _images(label: npt.NDArray[Any], dim: int) -> Iterator[npt.NDArray[Any]]:
    return iter(label) if dim == 2 else iter([label])
