"""The base, frozen, and adapters that hang on it by forward hooks.

With z the input of a layer of the base, a gate per sample, and all of B, P and V' zero at the start:

    gate_n = any(x'_n != 0)                                  over the new channels and voxels of the patch
    h_s    = S_s(h_{s-1}),  h_0 = S_0(x')                    stem: twice (convolution, norm, leaky rectifier) per stage
    e_s    = where(gate, E_s(e_{s-1}) + P_s h_s, E_s(...))   behind stage s of the encoder, P_s a 1x1 convolution
    y      = where(gate, W * z + B * (A * z), W * z)         each k > 1 convolution of the base
    seg    = where(gate, V * z + V' * z, V * z)              each segmentation layer

``where`` and not a product with the gate: 0 times infinity is NaN, and samples without the channel then give every
adapter a gradient of zero, which DDP waits for. After Saadi et al., PEMMA, https://arxiv.org/abs/2404.13704, whose
LoRA and parallel path are for a transformer; this form for a U-Net is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from nnunetv2_ext.parts.forward_hooks import register_forward_hook
from nnunetv2_ext.pemma.settings import PEMMASettings

NARROWEST, NARROWER = 4, 4  # features of the stem: a quarter of the base's, at least four


class Now:
    """What the hooks need to know of the forward that runs.

    Attributes:
        gate: bool ``(B, 1, ...)``; None: no adapter acts.
        further: what the stem adds behind each stage of the encoder.
    """

    gate: Tensor | None = None
    further: Sequence[Tensor] = ()


class Adapter(nn.Module):
    """What a layer's output gets added where the gate is open; a forward hook of that layer."""

    def __init__(self, now: Now) -> None:
        super().__init__()
        self.now = now

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output, bit for bit where the gate is closed."""
        gate = self.now.gate
        if gate is None:
            return output
        # the sum with -0.0 is the output itself, -0.0 included; the output's gradient then needs no selection
        return output + torch.where(gate, self(inputs[0]).to(output.dtype), -0.0)


class LowRank(Adapter):
    """``B * (A * z)`` beside a convolution W: A has its kernel and stride and r outputs; B is 1x1, zero at first."""

    def __init__(self, of: Any, rank: int, now: Now) -> None:
        super().__init__(now)
        size = of.kernel_size, of.stride, of.padding, of.dilation
        self.a = type(of)(of.in_channels, rank, *size, bias=False)
        self.b = _zeros(type(of)(rank, of.out_channels, 1, bias=False))

    def forward(self, z: Tensor) -> Tensor:
        return self.b(self.a(z))

    def merged(self, weight: Tensor) -> Tensor:
        """``W + B A`` for the base's weight ``(O, I, *K)``."""
        return weight + torch.einsum("or,ri...->oi...", self.b.weight.flatten(1), self.a.weight)


class Head(Adapter):
    """``V' * z`` beside a segmentation layer."""

    def __init__(self, of: Any, now: Now) -> None:
        super().__init__(now)
        self.v = _zeros(type(of)(of.in_channels, of.out_channels, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.v(z)


class Join(Adapter):
    """``P_s h_s`` behind stage s; the stem has computed it."""

    def __init__(self, stage: int, now: Now) -> None:
        super().__init__(now)
        self.stage = stage

    def forward(self, _: Tensor) -> Tensor:
        return self.now.further[self.stage]


class Stem(nn.Module):
    """An encoder of the new channels with the strides and kernels of the base's, and P_s.

    Args:
        channels: C', new ones.
        encoder: of the base.
        stages: how many of its stages it goes beside.
    """

    def __init__(self, channels: int, encoder: Any, stages: int) -> None:
        super().__init__()
        conv, dim = encoder.conv_op, len(encoder.strides[0])
        norm = nn.InstanceNorm2d if dim == 2 else nn.InstanceNorm3d
        blocks, joins = [], []
        of_stages = zip(encoder.output_channels[:stages], encoder.kernel_sizes, encoder.strides)
        for features, kernel, stride in of_stages:
            width, layers = max(NARROWEST, features // NARROWER), []
            size = [kernel] * dim if isinstance(kernel, int) else kernel
            for step in (stride, 1):
                layers += [conv(channels, width, size, step, [(k - 1) // 2 for k in size])]
                layers += [norm(width, affine=True), nn.LeakyReLU(inplace=True)]
                channels = width
            blocks.append(nn.Sequential(*layers))
            joins.append(_zeros(conv(width, features, 1)))
        self.blocks, self.joins = nn.ModuleList(blocks), nn.ModuleList(joins)

    def forward(self, new: Tensor) -> list[Tensor]:
        """``P_s h_s`` of each stage, for ``(B, C', *S)``."""
        found, h = [], new
        for block, join in zip(self.blocks, self.joins):
            h = block(h)
            found.append(join(h))
        return found


class PEMMANetwork(nn.Module):
    """A base that never changes, with adapters for new channels behind its own.

    For samples whose new channels are all zero, and for all samples before the first step, it is the base bit for bit.

    Args:
        base: nnU-Net's network of the old channels, with `encoder` and `decoder`.
        settings: what is marked structural.
        base_channels, new_channels: C0 and C'.

    Attributes:
        stock_prefixes: where nnU-Net's own network sits (see parts/start/).

    Raises:
        ValueError: a base that is not a U-Net of nnU-Net's convolution blocks, or no channel is new.
    """

    stock_prefixes = ("base.",)

    def __init__(self, base: nn.Module, settings: PEMMASettings, base_channels: int, new_channels: int) -> None:
        super().__init__()
        encoder: Any = getattr(base, "encoder", None)
        decoder: Any = getattr(base, "decoder", None)
        parts = (encoder, "stages"), (encoder, "strides"), (encoder, "kernel_sizes"), (decoder, "seg_layers")
        if not all(hasattr(part, name) for part, name in parts):
            raise ValueError(
                f"PEMMA needs a base with an encoder and a decoder of convolution blocks (PlainConvUNet, "
                f"ResidualEncoderUNet), not {type(base).__name__}; use a model of nnU-Net's standard or residual plans"
            )
        if new_channels < 1:
            raise ValueError(
                f"the dataset has {base_channels + new_channels} channels and the base {base_channels}: PEMMA adds "
                "channels, so add the new one behind the old ones"
            )
        self.base_channels, self._now = base_channels, Now()
        self.base = base
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        adapters: dict[str, nn.Module] = {}
        stages = {"all": len(encoder.stages), "first": 1, "none": 0}[settings.stem]
        if stages:
            adapters["stem"] = Stem(new_channels, encoder, stages)
        for number in range(stages):
            register_forward_hook(encoder.stages[number], Join(number, self._now).hook)
        if settings.rank:
            adapters["convs"] = nn.ModuleDict(
                {key_of(name): LowRank(conv, settings.rank, self._now) for name, conv in convolutions(base).items()}
            )
        if settings.train_heads:
            adapters["heads"] = nn.ModuleDict(
                {str(number): Head(layer, self._now) for number, layer in enumerate(decoder.seg_layers)}
            )
        self.adapters = nn.ModuleDict(adapters)
        for name, conv in convolutions(base).items() if settings.rank else ():
            register_forward_hook(conv, self.adapters["convs"][key_of(name)].hook)  # type: ignore[index]
        for number, layer in enumerate(decoder.seg_layers if settings.train_heads else ()):
            register_forward_hook(layer, self.adapters["heads"][str(number)].hook)  # type: ignore[index]

    # properties: as attributes their weights would be in the state twice. nnU-Net switches the decoder's outputs
    encoder = property(lambda self: self.base.encoder)
    decoder = property(lambda self: self.base.decoder)

    def train(self, mode: bool = True) -> PEMMANetwork:
        """The adapters' mode; the base stays as it predicts (batch statistics, dropout)."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        """Logits of ``(B, C0 + C', *P)``: ``(B, heads, *P)``, or their list over deep-supervision resolutions."""
        old, new = x[:, : self.base_channels].contiguous(), x[:, self.base_channels :]
        gate = is_present(new)
        if not self.training and not bool(gate.any()):
            return self.base(old)
        self._now.gate = gate.view(-1, *[1] * (x.ndim - 1))
        self._now.further = self.adapters["stem"](new) if "stem" in self.adapters else ()
        try:
            return self.base(old)
        finally:
            self._now.gate, self._now.further = None, ()


def is_present(new: Tensor) -> Tensor:
    """Whether a sample has the new channels, bool ``(B,)``: any voxel of ``(B, C', *P)`` is not zero."""
    return (new != 0).flatten(1).any(1)


def convolutions(base: nn.Module) -> dict[str, Any]:
    """The convolutions of a base with a kernel above 1, by name; transposed ones are left alone."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and max(module.kernel_size) > 1
    }


def key_of(name: str) -> str:
    """A module's name as a key of a ModuleDict, which takes no dot."""
    return name.replace(".", "-")


def _zeros(convolution: Any) -> Any:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)
    return convolution
