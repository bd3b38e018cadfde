"""What the channel names of a dataset make of colour images."""

from collections.abc import Iterable, Mapping
from typing import Any

# nnU-Net's classes of normalisation
SCALED_BY_255, OF_CT = "RGBTo01Normalization", "CTNormalization"

_COLOURS = (("r", "g", "b"), ("red", "green", "blue"))
SCALED = "rgb_to_0_1"  # nnU-Net's name for channels that are divided by 255


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """In their order; datasets of nnU-Net v1 call them ``modality``."""
    names = dataset_json.get("channel_names") or dataset_json.get("modality") or {}
    if not isinstance(names, Mapping):
        return []
    # numbers as text: 10 comes behind 2
    return [str(name) for _, name in sorted(names.items(), key=lambda item: (len(str(item[0])), str(item[0])))]


def are_colours(names: Iterable[str]) -> bool:
    """Whether channels of these names are the colours of a photograph."""
    plain = tuple(str(name).casefold() for name in names)
    return plain in _COLOURS or (len(plain) == 3 and all(name.startswith("rgb") for name in plain))


def hint_on_rgb(dataset_json: Mapping[str, Any]) -> str | None:
    """A sentence if the channels are red, green and blue and nnU-Net will not scale them by 255; else None.

    nnU-Net chooses the normalisation by a channel's name: any but a few means that each image is z-scored.
    """
    names = channel_names(dataset_json)
    if not are_colours(names) or all(name == SCALED for name in names):
        return None
    return (
        f"the channels {', '.join(names)} look like an RGB image, but nnU-Net z-scores each image by itself; to scale "
        f'them by 255 instead, name all three channels "{SCALED}" in dataset.json, then plan and preprocess again'
    )
