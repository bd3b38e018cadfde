"""What RADA asks of a dataset, its configuration and its settings: each refusal is worded once, here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def require_volumes(patch_size: Sequence[int], configuration: str = "of these plans") -> None:
    """Raise ValueError for a 2-D configuration."""
    if len(patch_size) != 3:
        raise ValueError(
            f"the configuration {configuration} is 2-D, but RADA learns from planes along the three axes of a volume: "
            "use 3d_fullres or 3d_lowres"
        )


def require_single_stage(previous_stage: str | None, configuration: str) -> None:
    """Raise ValueError for a cascade."""
    if previous_stage is not None:
        raise ValueError(
            f"the configuration {configuration} is a cascade, and RADA's networks have no input for the segmentation "
            f"of {previous_stage}: use 3d_fullres or 3d_lowres"
        )


def require_plain_labels(labels: Mapping[str, Any], dataset: str = "this dataset") -> None:
    """Raise ValueError for region-based labels.

    Args:
        labels: dataset.json's ``labels``.
        dataset: its name.
    """
    regions = [name for name, value in labels.items() if isinstance(value, (list, tuple))]
    if regions:
        raise ValueError(
            f"dataset.json of {dataset} declares regions ({', '.join(regions)}), but RADA needs classes that exclude "
            "each other: declare one integer per class instead of lists"
        )


def require_ignore_label(ignore: int | None, dataset: str = "this dataset") -> int:
    """The ignore label (https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/ignore_label.md).

    Raises:
        ValueError: there is none.
    """
    if ignore is None:
        raise ValueError(
            f'{dataset} has no ignore label, so every voxel counts as annotated: declare "ignore" as the highest '
            "label in dataset.json, give it to the voxels of labelsTr that nobody annotated, and plan and preprocess "
            "again; or make dense labels sparse with nnUNetv2_ext sparsify --labelled"
        )
    return ignore


def require_alpha(region: str, reads_masks: bool) -> None:
    """Raise ValueError if `region` is ``alpha`` and CLIP cannot see masks."""
    if region == "alpha" and not reads_masks:
        raise ValueError(
            "rada.region=alpha needs Alpha-CLIP's weights, without which the mask is invisible: "
            "give rada.alpha_weights=/path/to/file, or use rada.region=crop or pool"
        )
