"""Weights whose embedding dimension is that of the file they come from: it belongs to CLIP, not to nnU-Net's plans."""

from typing import Any

import torch
from torch import Tensor, nn


def new_zeros(like: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Zeros of another shape that can be written to later, also when made under inference mode.

    nnU-Net's predictor loads folds there.
    """
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


class ResizableLinear(nn.Linear):
    """A linear layer that takes the stored size of one side when weights are loaded.

    The parameters stay the same objects, so an optimiser that holds them keeps working; resize before a DDP wrapper is
    made.

    Args:
        in_features, out_features, bias: as of `nn.Linear`.
        free: the side that may differ, ``in`` or ``out``.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, free: str = "in") -> None:
        super().__init__(in_features, out_features, bias)
        self.free = free

    def reset_parameters(self) -> None:
        """He's initialisation and no bias: what follows is a ReLU, or only the direction counts."""
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def resize(self, size: int) -> None:
        """Give the free side another size; the weights start anew unless it is the present one."""
        if size == (self.in_features if self.free == "in" else self.out_features):
            return
        self._set_size((self.out_features, size) if self.free == "in" else (size, self.in_features))
        self.reset_parameters()

    def _set_size(self, shape: tuple[int, ...]) -> None:
        if shape == self.weight.shape:
            return
        self.out_features, self.in_features = shape
        for parameter, size in ((self.weight, shape), (self.bias, shape[:1])):
            if parameter is not None:
                parameter.data, parameter.grad = new_zeros(parameter, size), None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        stored, own = state_dict.get(prefix + "weight"), self.weight
        fixed = 0 if self.free == "in" else 1
        # where more than the free side differs, nn.Linear says so
        if stored is not None and stored.ndim == 2 and stored.shape[fixed] == own.shape[fixed]:
            self._set_size(tuple(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
