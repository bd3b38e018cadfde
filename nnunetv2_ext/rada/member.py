"""One of the three networks: nnU-Net's own, and what lets class vectors speak in it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_ext.parts.resizing import ResizableLinear
from nnunetv2_ext.rada.semantics.head import EMBEDDING_DIM, SemanticHead


class MemberOutput(NamedTuple):
    """What one network computes."""

    logits: Tensor | list[Tensor]  # (B, C, *S); with deep supervision all resolutions, highest first
    features: Tensor  # last decoder feature, (B, F, *S)

    @property
    def full_resolution(self) -> Tensor:
        """Logits `(B, C, *S)` of the highest resolution."""
        return self.logits if isinstance(self.logits, Tensor) else self.logits[0]


class Member(nn.Module):
    """One network: nnU-Net's own, and if there are semantics a head, a projection and for `learned` class tokens.

    Its loss reaches no other network, so it can be compiled in place and clipped on its own.

    Args:
        network: with `encoder` (a list of skips) and a `UNetDecoder` as `decoder`.
        semantics: `clip` (vectors are given), `learned` (tokens of its own), `off`.
        dimension: D, of the class vectors.

    Raises:
        ValueError: a network without such encoder and decoder.
    """

    def __init__(self, network: nn.Module, semantics: str, dimension: int = EMBEDDING_DIM) -> None:
        super().__init__()
        decoder: Any = getattr(network, "decoder", None)
        if not hasattr(network, "encoder") or not all(
            hasattr(decoder, name) for name in ("stages", "transpconvs", "seg_layers", "deep_supervision")
        ):
            raise ValueError(
                f"RADA needs a network with an encoder and a U-Net decoder (PlainConvUNet, ResidualEncoderUNet), not "
                f"{type(network).__name__}; use plans of the standard or the residual encoder planner"
            )
        self.network = network
        # without semantics there is none of these, and the member computes exactly what `network` does
        self.head: SemanticHead | None = None  # meeting point A
        self.projection: ResizableLinear | None = None  # P, F to D, of meeting point B, see `alignment_loss`
        self.tokens: nn.Parameter | None = None  # (C, D), for `learned`
        if semantics != "off":
            encoder: Any = network.encoder
            last: Any = decoder.seg_layers[-1]
            sizes = last.out_channels, encoder.output_channels[-1], last.in_channels
            self.head = SemanticHead(*sizes, encoder.conv_op, dimension)
            self.projection = ResizableLinear(last.in_channels, dimension, free="out")
        if semantics == "learned":
            self.tokens = nn.Parameter(F.normalize(torch.randn(last.out_channels, dimension), dim=-1))

    @property
    def decoder(self) -> Any:
        """The network's."""
        return self.network.decoder

    def forward(self, data: Tensor, vectors: tuple[Tensor, Tensor] | None = None) -> MemberOutput:
        """Logits and last decoder feature.

        Args:
            data: `(B, channels, *S)`.
            vectors: for `clip`, what the samples are conditioned on: text `(C, D)` and image `(B or 1, C, D)`.
        """
        decoder = self.decoder
        skips = list(self.network.encoder(data))  # type: ignore[operator]
        outputs: list[Tensor] = []  # highest resolution first
        x = skips[-1]
        last = len(decoder.stages) - 1
        for s in range(last + 1):
            x = decoder.stages[s](torch.cat((decoder.transpconvs[s](x), skips[-(s + 2)]), 1))
            if decoder.deep_supervision or s == last:
                outputs.insert(0, decoder.seg_layers[s](x))
        if self.head is not None:
            if self.tokens is not None:
                tokens = self.unit_tokens()
                vectors = tokens, tokens[None]
            assert vectors is not None
            outputs[0] = self.head(outputs[0], x, skips[-1], *vectors)
        return MemberOutput(outputs if decoder.deep_supervision else outputs[0], x)

    def unit_tokens(self) -> Tensor:
        """The tokens at length 1, `(C, D)`."""
        assert self.tokens is not None
        return F.normalize(self.tokens.float(), dim=-1)
