"""nnU-Net's loader, whose batches also say where in its case each patch was taken."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader


class PlacedDataLoader(nnUNetDataLoader):
    """nnUNetDataLoader with further keys in its batches; data, target and keys are nnU-Net's bit for bit.

    A case has the axes (X, Y, Z); the patch of a 2-D configuration is (1, Y, Z) here.

    * ``boxes``: int64 ``(B, 3, 2)``, first voxel and one past the last of the crop that the augmentation got, in voxels
      of the preprocessed case; negative, or beyond its shape, where the crop was padded. It is the larger, initial
      patch in training.
    * ``to_case`` (if asked for): float32 ``(B, 4, 4)``, takes the homogeneous voxel index of the patch to the one in
      the case, not rounded: the inverse of rotation, scaling, cropping and mirroring. NaN where an elastic deformation
      was drawn, which has no such matrix; nnU-Net itself draws none.

    Args:
        arguments: of nnUNetDataLoader.
        with_matrices: whether batches have ``to_case``.

    Raises:
        ValueError: ``to_case`` is asked for, and the augmentation moves voxels in a way that is not known here.
    """

    transforms: Any

    def __init__(self, *arguments: Any, with_matrices: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._boxes: list[list[tuple[int, int]]] = []
        self._tracked = _Tracked(self.transforms) if with_matrices else None
        if self._tracked is not None and self.transforms is not None:
            self.transforms = self._tracked

    def get_bbox(self, *arguments: Any, **named: Any) -> tuple[list[int], list[int]]:
        """nnU-Net's, kept for the batch."""
        first, end = super().get_bbox(*arguments, **named)
        self._boxes.append([(int(a), int(b)) for a, b in zip(first, end, strict=True)])
        return first, end

    def generate_train_batch(self) -> dict[str, Any]:
        """nnU-Net's, with the places."""
        self._boxes = []
        if self._tracked is not None:
            self._tracked.matrices = []
        batch = super().generate_train_batch()
        boxes = np.array(self._boxes, dtype=np.int64)
        batch["boxes"] = torch.from_numpy(boxes)
        if self._tracked is not None:
            corners = np.tile(np.eye(4), (len(boxes), 1, 1))
            corners[:, :3, 3] = boxes[:, :, 0]
            steps = self._tracked.matrices or [np.eye(4)] * len(boxes)
            batch["to_case"] = torch.from_numpy((corners @ np.stack(steps)).astype(np.float32))
        return batch


class _Tracked:
    """The same transforms in the same order; keeps for each call the matrix from the patch to the crop.

    At module level, so that worker processes can unpickle it.
    """

    def __init__(self, transforms: BasicTransform | None) -> None:
        whole = transforms.transforms if isinstance(transforms, ComposeTransforms) else [transforms]
        self.steps: list[BasicTransform] = [step for step in whole if step is not None]
        self.matrices: list[np.ndarray] = []
        others = [step for step in self.steps if not isinstance(step, (SpatialTransform, MirrorTransform))]
        for inner in (t for step in others for t in _inside(step)):
            spatial = type(inner).__module__.startswith("batchgeneratorsv2.transforms.spatial.")
            if spatial and not isinstance(inner, SimulateLowResolutionTransform):  # which moves no voxel
                raise ValueError(
                    f"where a patch comes from cannot be told after {type(inner).__name__}: leave it out of the "
                    "augmentation, or build the loader with with_matrices=False, for the boxes alone"
                )

    def __call__(self, **sample: Any) -> dict[str, Any]:
        matrix = np.eye(4)
        for step in self.steps:
            if not isinstance(step, (SpatialTransform, MirrorTransform)):
                sample = step(**sample)
                continue
            drawn, before = step.get_parameters(**sample), sample["image"].shape[1:]
            sample = step.apply(sample, **drawn)
            after = sample["image"].shape[1:]
            inner = _mirror(drawn, after) if isinstance(step, MirrorTransform) else _spatial(drawn, before, after)
            matrix = matrix @ _among_three_axes(inner)
        self.matrices.append(matrix)
        return sample


def _spatial(drawn: dict[str, Any], before: Sequence[int], after: Sequence[int]) -> np.ndarray:
    """(dim + 1, dim + 1): voxel index after SpatialTransform to the one before, from what it drew."""
    dim, size, source = len(before), np.array(after), np.array(before)
    center = np.array(drawn["center_location_in_pixels"], dtype=float)
    matrix = np.eye(dim + 1)
    if drawn.get("elastic_offsets") is not None:
        matrix[:] = np.nan
    elif drawn["affine"] is None:  # it crops whole voxels
        matrix[:dim, dim] = np.floor(center) - size // 2
    else:  # it turns about the middle of the patch, and the middle between two voxels is half a voxel from either
        matrix[:dim, :dim] = drawn["affine"]
        middle = center - source / 2 + (source - 1) / 2
        matrix[:dim, dim] = middle - drawn["affine"] @ ((size - 1) / 2)
    return matrix


def _mirror(drawn: dict[str, Any], shape: Sequence[int]) -> np.ndarray:
    matrix = np.eye(len(shape) + 1)
    for axis in drawn["axes"]:
        matrix[axis, axis], matrix[axis, -1] = -1, shape[axis] - 1
    return matrix


def _among_three_axes(matrix: np.ndarray) -> np.ndarray:
    """(4, 4); a transform in two dimensions leaves the first axis alone (2-D configurations, dummy 2-D)."""
    whole = np.eye(4)
    whole[-len(matrix) :, -len(matrix) :] = matrix
    return whole


def _inside(transform: Any) -> Iterator[BasicTransform]:
    """The transform and those that it holds (RandomTransform, OneOfTransform and the like)."""
    yield transform
    for value in vars(transform).values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, BasicTransform):
                yield from _inside(item)
