"""The guide bank: low-resolution image-mask patches of the training cases, as buffers of the network.

In the network's state it travels in every checkpoint and export zip, of whatever size, and nnU-Net's own predictor
loads it. The idea of image-mask guides is that of https://arxiv.org/abs/2510.09953; storage, exclusion and search are
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_ext.jras.search import require_main_process, select

OUTSIDE = 255  # stored label of cells that are ignored or lie outside the image; belongs to no mask channel
HALF_LIMIT = 6e4  # largest magnitude stored unscaled; fp16 ends at 65504
STORED_DTYPES = {
    "images": torch.float16,
    "scale": torch.float32,
    "labels": torch.uint8,
    "lut": torch.uint8,
    "keys": torch.float32,
    "groups": torch.int64,
}
PER_GUIDE = ("images", "labels", "keys", "groups")  # buffers with one row per guide


class Guides(NamedTuple):
    """What a query gets: K guides per sample, the valid ones first, nearest first; others have id 0 and zeros.

    Ids ``(B, K)`` int64 are rows of the bank, valid ``(B, K)`` is bool. Images ``(B, K, C, *L)`` in the network's
    intensities, masks ``(B, K, M, *L)``, 0 or 1, and the stored keys ``(B, K, D)`` are fp32.
    """

    ids: Tensor
    valid: Tensor
    images: Tensor
    masks: Tensor
    keys: Tensor


class GuideBank(nn.Module):
    """Stores the guides and finds those of a query.

    Args:
        image_channels, num_heads: C, without the one-hot channels of a cascade, and M, classes or regions of a mask.
        low_shape, key_dim: L, cells per axis of a stored patch, and D.
        dedup_cosine: guides whose inner product with the query exceeds this are not returned: a partial guard for
            predicting training cases. None: off.

    Attributes:
        is_empty: a plain bool that compiled code may branch on; reading a buffer's shape there would cost one
            compilation per bank size.
    """

    images: Tensor
    scale: Tensor
    labels: Tensor
    lut: Tensor
    keys: Tensor
    groups: Tensor

    def __init__(
        self,
        image_channels: int,
        num_heads: int,
        low_shape: Sequence[int],
        key_dim: int = 128,
        dedup_cosine: float | None = None,
    ) -> None:
        super().__init__()
        self.low_shape = tuple(int(n) for n in low_shape)
        self.key_dim, self.dedup_cosine = key_dim, dedup_cosine
        self.is_empty = True
        self._counted: tuple[Tensor, int | None, int] | None = None  # groups, their version, size of the largest
        self.register_buffer("images", torch.zeros((0, image_channels, *self.low_shape), dtype=torch.float16))
        self.register_buffer("scale", torch.ones(image_channels))
        self.register_buffer("labels", torch.zeros((0, *self.low_shape), dtype=torch.uint8))
        self.register_buffer("lut", torch.zeros((256, num_heads), dtype=torch.uint8))
        self.register_buffer("keys", torch.zeros((0, key_dim)))
        self.register_buffer("groups", torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        """N, the number of guides; no wait for the device."""
        return self.keys.shape[0]

    def fill(self, images: Tensor, labels: Tensor, groups: Tensor, lut: Tensor) -> None:
        """Replace the content; keys are zero until ``set_keys``.

        Args:
            images: ``(N, C, *L)`` float, in the network's intensities.
            labels: ``(N, *L)`` uint8, 255 = ignored or outside the image.
            groups: ``(N,)`` int64, see ``group_ids``.
            lut: ``(256, M)``, label value to mask channels, see ``mask_lut``.
        """
        largest = images.abs().amax(dim=(0, *range(2, images.ndim))).float()
        with torch.inference_mode(False), torch.no_grad():
            device = self.keys.device
            scale = torch.where(largest > HALF_LIMIT, largest / HALF_LIMIT, 1.0).to(device)
            per_channel = scale.view(-1, *[1] * len(self.low_shape))
            self.images = (images.to(device) / per_channel).half()
            self.scale = scale
            self.labels = labels.to(device, torch.uint8, copy=True)
            self.groups = groups.to(device, torch.int64, copy=True)
            self.lut = lut.to(device, torch.uint8, copy=True)
            self.keys = torch.zeros((len(groups), self.key_dim), device=device)
        self._changed()

    def set_keys(self, keys: Tensor, cases: Sequence[str] | None = None) -> None:
        """Store the guides' embeddings `(N, D)`, L2-normalised; `cases` are the guides' case ids, for the message.

        Raises:
            ValueError: an embedding that is not finite (the message names its case).
        """
        finite = torch.isfinite(keys).all(dim=1)
        if not finite.all():
            rows = (~finite).nonzero().flatten().tolist()
            names = ", ".join(dict.fromkeys(cases[i] for i in rows)) if cases is not None else f"rows {rows}"
            raise ValueError(
                f"{len(rows)} of {len(self)} guide embeddings are not finite (of: {names}): check these cases for NaN "
                "or extreme intensities; if all cases are named, the retriever's weights are broken: lower initial_lr"
            )
        with torch.inference_mode(False), torch.no_grad():
            self.keys = keys.detach().to(self.keys.device, torch.float32, copy=True)
        self._changed()

    def stored_images(self, ids: Tensor) -> Tensor:
        """Guide images of ids ``(...)`` as ``(..., C, *L)`` fp32 in the network's intensities."""
        return self.images[ids].float() * self.scale.view(-1, *[1] * len(self.low_shape))

    def masks(self, ids: Tensor) -> Tensor:
        """Masks of ids ``(...)`` as ``(..., M, *L)`` fp32, 0 or 1; all channels are zero where the label is 255."""
        return self.lut[self.labels[ids].int()].movedim(-1, ids.ndim).float().contiguous()

    @torch.compiler.disable
    @torch.no_grad()
    def lookup(
        self,
        queries: Tensor,
        num_guides: int,
        groups: Tensor | None = None,
        random: bool = False,
        generator: torch.Generator | None = None,
    ) -> Guides:
        """The guides of each query, without gradient. Never compiled: then neither N nor the groups enter a graph.

        These are exactly the nearest guides of other groups: K + g are searched, g the size of the largest group, and
        the query's own group is dropped. A query that is not finite gets valid guides of any kind, so that its NaN
        reaches the loss instead of vanishing in the null guide.

        Args:
            queries: ``(B, D)``, L2-normalised.
            num_guides: K. Fewer valid ones come back where the bank holds fewer outside the query's group.
            groups: ``(B,)`` int64, of the samples, whose guides they must not get; None (predicting): all may come.
            random, generator: draw the valid guides uniformly instead, without repeats, by this generator.

        Raises:
            ValueError: the bank is empty, or the process was forked from the one that filled it.
        """
        if self.is_empty:
            raise ValueError("guides were asked of an empty guide bank; fill it first")
        require_main_process()
        queries, k = queries.float(), min(num_guides, len(self))
        groups = None if groups is None else groups.to(queries.device)
        largest = 0 if groups is None else self._largest_group()
        chosen = select(queries, self.keys, k, self.groups, groups, largest, self.dedup_cosine, random, generator)
        ids, valid = (F.pad(part, (0, num_guides - k)) for part in chosen)

        def blank(rows: Tensor) -> Tensor:
            return rows.masked_fill(~valid.view(*valid.shape, *[1] * (rows.ndim - 2)), 0.0)

        return Guides(ids, valid, blank(self.stored_images(ids)), blank(self.masks(ids)), blank(self.keys[ids]))

    def _largest_group(self) -> int:
        """Guides of the largest group, counted once; it follows any writing to the buffer (a broadcast, a copy)."""
        # the tensor itself is kept: an id could be reused. Inference tensors count no versions
        groups, version = self.groups, None if self.groups.is_inference() else self.groups._version
        if self._counted is None or self._counted[0] is not groups or self._counted[1] != version:
            self._counted = groups, version, int(torch.unique(groups, return_counts=True)[1].max())
        return self._counted[2]

    def _changed(self) -> None:
        self.is_empty = len(self) == 0
        if not self.is_empty:
            require_main_process()  # from now on forked children are refused, whether this bank is searched or not

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
                    f"{tuple(own.shape)}: patch size, channels, labels or jras.store_stride changed since; use the "
                    "plans the training was started with"
                )
            # nnU-Net's predictor loads folds under inference mode; buffers made there could not be written to later
            if stored.shape != own.shape or own.is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, torch.zeros(stored.shape, dtype=own.dtype, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GuideBank:
        """Moves to a device, but keeps the stored types: ``network.float()`` must not double the images."""
        for name, dtype in STORED_DTYPES.items():
            buffer = getattr(self, name)
            # flat: ``network.to(memory_format=...)`` means feature maps, and fails on the labels' number of axes
            setattr(self, name, fn(buffer.flatten()).view(buffer.shape).to(dtype))
        return self
