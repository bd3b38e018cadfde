"""What RADA asks of a dataset, its configuration and its settings: each refusal is worded once, here."""

from collections.abc import Mapping, Sequence
from typing import Any


def require_volumes(patch_size: Sequence[int], configuration: str = "of these plans") -> None:
    """Raise ValueError for a 2-D configuration."""
    if len(patch_size) != 3:
        raise ValueError(
            f"the configuration {configuration} is 2-D, but RADA learns from planes along the three axes of a volume: "
            "use 3d_fullres or 3d_lowres"
        )


def require_plain_labels(labels: Mapping[str, Any], dataset: str) -> None:
    """Raise ValueError for region-based `labels` (dataset.json's)."""
    regions = [name for name, value in labels.items() if isinstance(value, (list, tuple))]
    if regions:
        raise ValueError(
            f"dataset.json of {dataset} declares regions ({', '.join(regions)}), but RADA needs classes that exclude "
            "each other: declare one integer per class instead of lists"
        )


def require_ignore_label(ignore: int | None, dataset: str) -> int:
    """The ignore label, see nnU-Net's documentation/ignore_label.md; ValueError if there is none."""
    if ignore is None:
        raise ValueError(
            f'{dataset} has no ignore label, so every voxel counts as annotated: declare "ignore" as the highest '
            "label in dataset.json, give it to the voxels of labelsTr that nobody annotated, and plan and preprocess "
            "again; or make dense labels sparse with nnUNetv2_ext sparsify --labelled"
        )
    return ignore
