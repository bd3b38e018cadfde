"""The class vectors a network is conditioned on: means over the training cases, and a sample's own ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_ext.parts.resizing import new_zeros

NUM_AXES = 3


def mean_vectors(vectors: Tensor, valid: Tensor) -> Tensor:
    """R(a, c): per axis and class the mean over the cases that have planes of this axis, of length 1.

    Where no case has one, the mean over the planes of all axes; where there is none either, 0.

    Args:
        vectors: `(N, 3, C, D)`, of N cases, per plane axis and class; background in row 0.
        valid: `(N, 3, C)` bool, which of them exist.

    Returns:
        `(3, C, D)` fp32.
    """
    weights = valid.float()[..., None]
    sums = torch.where(valid[..., None], vectors.float(), 0.0).sum(0)
    of_axis = sums / weights.sum(0).clamp(min=1)
    of_all = sums.sum(0) / weights.sum((0, 1)).clamp(min=1)
    return F.normalize(torch.where(valid.any(0)[..., None], of_axis, of_all), dim=-1)


def mean_in_view(vectors: Tensor, view_axes: Sequence[int]) -> Tensor:
    """Mean over the axes a network holds, length 1 where it is not 0: `(..., 3, C, D)` to `(..., C, D)`."""
    return F.normalize(vectors[..., list(view_axes), :, :].float().mean(-3), dim=-1)


def own_or_bank(vectors: Tensor, valid: Tensor, bank: Tensor, view_axes: Sequence[int], use_own: Tensor) -> Tensor:
    """Image vectors a batch is conditioned on: a sample's own where it has them, else the bank's.

    Args:
        vectors: own ones, `(B, 3, C, D)`; what is not valid is never read.
        valid: `(B, 3, C)` bool.
        bank: `(3, C, D)`.
        view_axes: axes the network holds.
        use_own: `(B,)` bool, see `draw_own`.

    Returns:
        `(B, C, D)`, mean over the axes in view, of length 1 where it is not 0.
    """
    wanted = valid & use_own[:, None, None]
    return mean_in_view(torch.where(wanted[..., None], vectors.float(), bank.float()[None]), view_axes)


def draw_own(has_own: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Which samples use their own vectors this time, `(B,)` bool: those that have some, with this probability."""
    return has_own & (torch.rand(has_own.shape, device=has_own.device, generator=generator) < probability)


def vectors_of(
    cases: Mapping[str, tuple[Tensor, Tensor]], keys: Sequence[str], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Own vectors of a batch, `(B, 3, C, D)` fp32, and which are valid, `(B, 3, C)`.

    Args:
        cases: case id to vectors `(3, C, D)` and which are valid `(3, C)`, at least one; others have none.
        keys: the batch's cases.
        device: where they are wanted.
    """
    none = tuple(torch.zeros_like(tensor) for tensor in next(iter(cases.values())))
    vectors, valid = (torch.stack(parts) for parts in zip(*(cases.get(str(key), none) for key in keys), strict=True))
    return vectors.to(device, non_blocking=True), valid.to(device, non_blocking=True)


class SemanticBank(nn.Module):
    """Image vectors R, text vectors U and the axes each network holds: buffers, so they travel in the checkpoint.

    The dimension D is that of what is loaded.

    Args:
        num_classes: C, with background.
        dimension: D; 0 where no vectors are needed.
        view_axes: per network the axes of the planes it learns from.
    """

    image: Tensor  # R, (3, C, D) fp32
    text: Tensor  # U, (C, D) fp32; row 0, background, is not used
    views: Tensor  # (networks, 3) bool
    view_axes: tuple[tuple[int, ...], ...]  # the same as numbers, on the host, so that no step waits for the device
    is_filled: bool  # whether R and U are there

    def __init__(self, num_classes: int, dimension: int, view_axes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(NUM_AXES, num_classes, dimension))
        self.register_buffer("text", torch.zeros(num_classes, dimension))
        self.register_buffer("views", torch.zeros(len(view_axes), NUM_AXES, dtype=torch.bool))
        self.set_views(view_axes)

    def in_view(self, k: int) -> Tensor:
        """R, mean over the axes network k holds, `(C, D)`."""
        return mean_in_view(self.image, self.view_axes[k])

    def set_views(self, view_axes: Sequence[Sequence[int]]) -> None:
        """Set the axes each network holds."""
        self.views.copy_(torch.tensor([[axis in axes for axis in range(NUM_AXES)] for axes in view_axes]))
        self._read()

    def set(self, image: Tensor, text: Tensor) -> None:
        """Replace R and U, of any dimension.

        Raises:
            ValueError: values that are not finite.
        """
        if not torch.isfinite(image).all() or not torch.isfinite(text).all():
            raise ValueError("an embedding is not finite; delete the embedding cache, and compute it again")
        if self.text.shape[-1] != text.shape[-1]:
            self.image, self.text = new_zeros(self.image, image.shape), new_zeros(self.text, text.shape)
        self.image.copy_(image)
        self.text.copy_(text)
        self._read()

    def _read(self) -> None:
        """What the host keeps of the buffers."""
        self.view_axes = tuple(tuple(axis for axis, held in enumerate(row) if held) for row in self.views.tolist())
        self.is_filled = bool((self.text != 0).any()) and bool((self.image != 0).any())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("image", "text"):
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is None:
                continue
            if stored.shape[:-1] != own.shape[:-1]:
                raise ValueError(
                    f"the stored embeddings have {name} of shape {tuple(stored.shape)}, this network needs "
                    f"{(*own.shape[:-1], 'any')}: the dataset's labels changed since; train anew"
                )
            if stored.shape != own.shape or own.is_inference():
                setattr(self, name, new_zeros(own, stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read()
