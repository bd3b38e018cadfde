"""``--head-only``: the last segmentation layer fitted anew in closed form, on the features in front of it.

Ridge regression towards the layer of before, W0. With x the features of a voxel and a 1, and t its target, A is the
mean over classes c of the mean over their voxels of x x^T, and B that of x t^T: classes count the same however large
they are. With s the number by which W0 fits the targets best, and r = ridge mean(diag A),

    W = (A + r I)^-1 (B + r s W0).

Sums of a case are kept apart: leaving a case out costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor, nn

from nnunetv2_ext.parts.forward_hooks import register_forward_hook

RIDGE = 1.0  # measured: docs/methods/adapt.md
_SCALE = 10.0  # a target is plus or minus half of it: logits as sure as a trained network's


@dataclass
class Sums:
    """Of some voxels, by class: number ``(C,)``, sum of x x^T ``(C, F, F)`` and of x t^T ``(C, F, K)``, fp64."""

    number: Tensor
    gram: Tensor
    cross: Tensor

    @classmethod
    def empty(cls, classes: int, features: int, heads: int) -> Sums:
        """Of no voxel."""
        shapes = (classes,), (classes, features, features), (classes, features, heads)
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, features: Tensor, targets: Tensor, classes: Tensor) -> None:
        """Voxels: ``(N, F)``, ``(N, K)``, and which class each one counts for, ``(N,)``."""
        for value in classes.unique().tolist():
            x = features[classes == value].cpu().double()
            self.number[value] += len(x)
            self.gram[value] += x.T @ x
            self.cross[value] += x.T @ targets[classes == value].cpu().double()

    def means(self) -> tuple[Tensor, Tensor]:
        """A and B of the module's equation."""
        there = self.number > 0
        weights = (1 / self.number[there] / there.sum()).view(-1, 1, 1)
        return (weights * self.gram[there]).sum(0), (weights * self.cross[there]).sum(0)


def joined(parts: Sequence[Sums]) -> Sums:
    """Of all their voxels."""
    return Sums(*(torch.stack(tensors).sum(0) for tensors in zip(*((p.number, p.gram, p.cross) for p in parts))))


def solve(new: Sums, before: Tensor, old: Sums | None = None, replay: float = 0.0, ridge: float = RIDGE) -> Tensor:
    """W ``(F, K)`` of the module's equation.

    Args:
        new: of the given cases.
        before: W0 ``(F, K)``, fp64.
        old: of old cases; A and B are then (1 - replay) times the new ones' plus replay times the old ones'.
        replay: that share.
        ridge: how strongly the solution is held at the layer of before, no unit.
    """
    a, b = new.means()
    if old is not None and replay:
        a, b = ((1 - replay) * n + replay * o for n, o in zip((a, b), old.means()))
    scale = ((before * b).sum() / (before * (a @ before)).sum()).clamp(min=0)
    hold = ridge * a.diagonal()[:-1].mean()
    return torch.linalg.solve(a + hold * torch.eye(len(a), dtype=a.dtype), b + hold * scale * before)


class Head:
    """The last segmentation layer of nnU-Net's U-Nets, with the features that go into it.

    Raises:
        ValueError: the network has no such layer.
    """

    def __init__(self, network: nn.Module, labels: Any, hidden: Sequence[int]) -> None:
        layers = getattr(getattr(network, "decoder", None), "seg_layers", None)
        if not layers or getattr(layers[-1], "kernel_size", (0,)) != (1,) * len(layers[-1].kernel_size):
            raise ValueError(
                f"--head-only needs a U-Net with a last layer of 1 x 1 convolutions, and {type(network).__name__} has "
                "none: adapt without --head-only"
            )
        self.network, self.labels, self.hidden = network, labels, tuple(hidden)
        self.layer: Any = layers[-1]
        self.name = next(name for name, module in network.named_modules() if module is self.layer)
        register_forward_hook(self.layer, self._keep)
        self._features: Tensor | None = None

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._features = inputs[0]

    @torch.no_grad()
    def sums(self, image: Tensor, label: np.ndarray, patch: Sequence[int], device: torch.device) -> Sums:
        """Of a preprocessed case: ``(C, X, Y, Z)`` and its label ``(X, Y, Z)``; -1 and the ignore label do not count.

        The network has the weights of before, which also tell hidden classes from the background.
        """
        self.network.eval()
        values = [0, *self.labels.all_labels] if 0 not in self.labels.all_labels else list(self.labels.all_labels)
        result = Sums.empty(len(values), self.layer.in_channels + 1, self.layer.out_channels)
        for tile, known in _tiles(image, label, patch):
            if not np.isin(known, values).any():
                continue
            logits = self.network(tile[None].to(device))
            features = self._features
            assert features is not None
            x = features[0].flatten(1).T.float()
            x = torch.cat((x, x.new_ones(len(x), 1)), 1)
            y = torch.from_numpy(known.astype(np.int64)).flatten().to(device)
            use = torch.isin(y, torch.tensor(values, device=device))
            targets, classes = self._targets(logits[0].flatten(1).T.float()[use], y[use])
            result.add(x[use], _SCALE * (targets - 0.5), classes)
        return result

    def _targets(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets ``(N, K)`` from 0 to 1, and the class that each voxel counts for.

        The background of the new labels is shared between background and hidden classes as the model sees it.
        """
        if self.labels.has_regions:
            regions = [labels.new_tensor(np.atleast_1d(region)) for region in self.labels.foreground_regions]
            return torch.stack([torch.isin(labels, region) for region in regions], 1).float(), labels
        targets = torch.nn.functional.one_hot(labels, logits.shape[1]).float()
        if self.hidden:
            among = [0, *self.hidden]
            background = labels == 0
            shared = torch.zeros_like(targets[background])
            shared[:, among] = logits[background][:, among].softmax(1)
            targets[background] = shared
        return targets, targets.argmax(1)

    def before(self, weights: dict[str, Tensor]) -> Tensor:
        """The layer in these weights as ``(F + 1, K)``, fp64."""
        weight, bias = weights[f"{self.name}.weight"], weights[f"{self.name}.bias"]
        return torch.cat((weight.flatten(1).T, bias[None])).cpu().double()

    def weights(self, before: dict[str, Tensor], solution: Tensor) -> dict[str, Tensor]:
        """The model's weights with the solution ``(F + 1, K)`` in the layer; hidden regions keep theirs."""
        after = dict(before)
        kept = list(self.hidden) if self.labels.has_regions else []
        for name, value in ((f"{self.name}.weight", solution[:-1].T), (f"{self.name}.bias", solution[-1])):
            old = before[name]
            new = value.reshape(old.shape).to(old.dtype)
            new[kept] = old[kept].to(new.device)
            # nnU-Net lists a tensor under more names than one
            after |= dict.fromkeys((key for key, other in before.items() if _same(other, old)), new)
        return after


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.data_ptr() == other.data_ptr()


def _tiles(image: Tensor, label: np.ndarray, patch: Sequence[int]) -> Any:
    """Input ``(C, *patch)`` and label of patches beside each other over the whole case; the last ones overlap."""
    size = (1, *patch) if len(patch) == 2 else tuple(patch)
    missing = [max(0, wanted - there) for wanted, there in zip(size, label.shape)]
    pads = [width for axis in reversed(missing) for width in (0, axis)]
    image = torch.nn.functional.pad(image, pads)
    label = np.pad(label, [(0, axis) for axis in missing], constant_values=-1)
    steps = compute_steps_for_sliding_window(label.shape, size, 1.0)
    for corner in ((x, y, z) for x in steps[0] for y in steps[1] for z in steps[2]):
        box = tuple(slice(start, start + width) for start, width in zip(corner, size))
        channels = (slice(None), *box)
        tile, known = image[channels], label[box]
        yield (tile[:, 0], known[0]) if len(patch) == 2 else (tile, known)
