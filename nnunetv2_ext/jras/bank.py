"""The guide bank: image-mask patches as buffers of the network.

In the network's state it travels in every checkpoint and export zip, of whatever size, and nnU-Net's own predictor
loads it. The idea of image-mask guides is that of https://arxiv.org/abs/2510.09953; storage is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = 255  # stored label of voxels without annotation; belongs to no mask channel
TAILS = 1e-3  # share of a patch's intensities that may be clipped at either end before 256 steps are spread over it
STORED_DTYPES = {
    "images": torch.uint8,
    "scale": torch.float32,
    "offset": torch.float32,
    "labels": torch.uint8,
    "lut": torch.uint8,
    "groups": torch.int64,
}
PER_GUIDE = ("images", "scale", "offset", "labels", "groups")  # buffers with one row per guide


class GuideBank(nn.Module):
    """Stores N guides at patch resolution, a byte a voxel for every channel and for the label.

    Args:
        image_channels, num_heads: C, without the one-hot channels of a cascade, and M, classes or regions of a mask.
        patch_size: P.

    Attributes:
        is_empty: a bool for compiled code, which a buffer's shape would cost one compilation per bank size.
        version: changes with every content.
    """

    images: Tensor
    scale: Tensor
    offset: Tensor
    labels: Tensor
    lut: Tensor
    groups: Tensor

    def __init__(self, image_channels: int, num_heads: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        self.patch_size = tuple(int(n) for n in patch_size)
        self.is_empty, self.version = True, 0
        self.register_buffer("images", torch.zeros((0, image_channels, *self.patch_size), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros((0, image_channels)))
        self.register_buffer("offset", torch.zeros((0, image_channels)))
        self.register_buffer("labels", torch.zeros((0, *self.patch_size), dtype=torch.uint8))
        self.register_buffer("lut", torch.zeros((256, num_heads), dtype=torch.uint8))
        self.register_buffer("groups", torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        """N, the number of guides; no wait for the device."""
        return self.groups.shape[0]

    def fill(self, content: dict[str, Tensor]) -> None:
        """Replace the content by that of `stored`."""
        with torch.inference_mode(False), torch.no_grad():
            device = self.groups.device
            for name, dtype in STORED_DTYPES.items():
                setattr(self, name, content[name].to(device, dtype, copy=True))
        self._changed()

    def stored_images(self, ids: Any) -> Tensor:
        """Guide images of rows `ids` as ``(n, C, *P)`` fp32 in the network's intensities."""
        ones = (1,) * len(self.patch_size)
        scale, offset = (part[ids].unflatten(1, (-1, *ones)) for part in (self.scale, self.offset))
        return self.images[ids].float() * scale + offset

    def masks(self, ids: Any) -> tuple[Tensor, Tensor]:
        """Masks of rows `ids` as ``(n, M, *P)`` fp32, 0 or 1, and where they are known, bool ``(n, 1, *P)``."""
        labels = self.labels[ids]
        return self.lut[labels.int()].movedim(-1, 1).float(), (labels != IGNORED)[:, None]

    def _changed(self) -> None:
        self.is_empty = len(self) == 0
        self.version += 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the stored sizes before the values: a bank has as many guides as the file it comes from."""
        for name in STORED_DTYPES:
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is None:
                continue
            rows = 1 if name in PER_GUIDE else 0  # leading axes that may differ
            if stored.ndim != own.ndim or stored.shape[rows:] != own.shape[rows:]:
                raise ValueError(
                    f"the stored guide bank has {name} of shape {tuple(stored.shape)}, this network needs "
                    f"{tuple(own.shape)}: patch size, channels or labels changed since; use the plans the training was "
                    "started with"
                )
            # nnU-Net's predictor loads folds under inference mode; buffers made there could not be written to later
            if stored.shape != own.shape or own.is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, torch.zeros(stored.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GuideBank:
        """Moves to a device, but keeps the stored types: ``network.float()`` must not quadruple the images."""
        for name, dtype in STORED_DTYPES.items():
            buffer = getattr(self, name)
            # flat: ``network.to(memory_format=...)`` means feature maps, and fails on the labels' number of axes
            setattr(self, name, fn(buffer.flatten()).view(buffer.shape).to(dtype))
        return self


def stored(images: Tensor, labels: Tensor, groups: Tensor, lut: Tensor) -> dict[str, Tensor]:
    """The bank's buffers of some guides: intensities in 256 steps between the ends of each patch and channel.

    Args:
        images: ``(N, C, *P)`` float, in the network's intensities.
        labels: ``(N, *P)`` uint8, 255 = not annotated.
        groups: ``(N,)`` int64, see `build.group_ids`.
        lut: ``(256, M)``, label value to mask channels, see `labels.mask_lut`.
    """
    flat = images.flatten(2).float()
    ordered = flat.sort(2).values
    clipped = int(TAILS * flat.shape[2])
    low, high = ordered[..., clipped], ordered[..., flat.shape[2] - 1 - clipped]
    scale = torch.where(high > low, (high - low) / 255, torch.ones_like(low))
    steps = ((flat - low[..., None]) / scale[..., None]).round().clamp(0, 255).to(torch.uint8)
    return {
        "images": steps.view(images.shape),
        "scale": scale,
        "offset": low,
        "labels": labels,
        "lut": lut,
        "groups": groups,
    }
