"""Weights of a pre-trained encoder from a local file."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunetv2_ext.parts.weights import read_weights


def load_encoder(encoder: nn.Module, name: str, path: Path) -> str:
    """Load ``path`` into the encoder of an `SMPNetwork`; all or nothing.

    Names are timm's (encoders ``tu-...``) or those of SMP's own encoder. Where names differ, as EfficientNet-PyTorch's
    do from timm's, tensors are taken in their order, and every shape must agree. The file's classifier is left out. The
    first convolution is adapted to other numbers of channels than three as timm does: summed for one, else repeated and
    rescaled.

    Returns:
        A sentence for the log: how many tensors, in which way.

    Raises:
        ValueError: a tensor is missing or has another shape; the first is named.
    """
    theirs = read_weights(path, "photo.weights")
    if broken := next((k for k, v in theirs.items() if v.is_floating_point() and not torch.isfinite(v).all()), None):
        raise ValueError(f"photo.weights={path}: its tensor {broken} holds NaN or infinite values; use another file")
    target: nn.Module = getattr(encoder, "model", encoder)  # SMP holds timm's network in ``model``
    state = OrderedDict(target.state_dict())
    ours = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    theirs = {key: value for key, value in theirs.items() if not key.endswith("num_batches_tracked")}
    first = next(key for key, value in ours.items() if value.ndim == 4)
    prefix = next((p for p in ("", "encoder.", "module.", "model.", "backbone.") if p + first in theirs), None)
    if prefix is not None:
        pairs = {key: theirs.get(prefix + key) for key in ours}
        how = "by name"
    else:
        # one after the other; what the file has beyond them is its classifier
        alike = ((a, b) for a, b in zip(ours, theirs) if a.rpartition(".")[2] == b.rpartition(".")[2])
        pairs = {a: theirs[b] for a, b in alike}
        how = "in their order, the names differ"
    chosen: dict[str, Tensor] = {}
    for key, value in ours.items():
        source = pairs.get(key)
        if source is not None and key == first and source.shape != value.shape:
            source = _other_channels(source, value.shape[1])
        if source is None or source.shape != value.shape:
            there = "missing" if source is None else "x".join(map(str, source.shape))
            raise ValueError(
                f"photo.weights={path} does not belong to the encoder {name}: {key} is {there} there and "
                f"{'x'.join(map(str, value.shape))} here; set photo.encoder to the one the file was trained with"
            )
        chosen[key] = source
    target.load_state_dict({**state, **chosen})
    return f"{len(chosen)} tensors of the encoder {name} from {path}, {how}; {len(theirs) - len(chosen)} left over"


def _other_channels(weight: Tensor, channels: int) -> Tensor:
    from timm.models import adapt_input_conv

    if weight.ndim != 4 or weight.shape[1] != 3:
        return weight
    adapted: Tensor = adapt_input_conv(channels, weight)
    return adapted
