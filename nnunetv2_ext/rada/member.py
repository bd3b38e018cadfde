"""One of the three networks: nnU-Net's own, and what lets class vectors speak in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_ext.parts.resizing import ResizableLinear
from nnunetv2_ext.rada.semantics.bank import SemanticBank
from nnunetv2_ext.rada.semantics.head import EMBEDDING_DIM, SemanticHead


class MemberOutput(NamedTuple):
    """What one network computes.

    Attributes:
        logits: `(B, C, *S)`; with deep supervision the list of all resolutions, highest first.
        features: last decoder feature, `(B, F, *S)`.
    """

    logits: Tensor | list[Tensor]
    features: Tensor

    @property
    def full_resolution(self) -> Tensor:
        """Logits `(B, C, *S)` of the highest resolution."""
        return self.logits if isinstance(self.logits, Tensor) else self.logits[0]


class Member(nn.Module):
    """One network: nnU-Net's own, and if there are semantics a head, a projection and for `learned` class tokens.

    Its loss reaches no other network, so it can be compiled in place, clipped and wrapped in DDP on its own.

    Args:
        network: with `encoder` (a list of skips) and a `UNetDecoder` as `decoder`.
        semantics: `clip` (vectors of the bank or given), `learned` (tokens of its own), `off`.
        bank: of the whole; not registered here, its buffers belong to `RADANet`.
        view_index: which row of the bank's views is this network's.
        dimension: D, of the class vectors.

    Attributes:
        network: as given; without semantics this computes exactly what it computes.
        head: meeting point A, see `SemanticHead`; None without semantics.
        projection: P, F to D, of meeting point B, see `alignment_loss`; None without semantics.
        tokens: `(C, D)`, for `learned`; else None.

    Raises:
        ValueError: a network without such encoder and decoder.
    """

    def __init__(
        self,
        network: nn.Module,
        semantics: str,
        bank: SemanticBank,
        view_index: int,
        dimension: int = EMBEDDING_DIM,
    ) -> None:
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
        self.view_index = view_index
        self._bank = (bank,)  # in a tuple, or its buffers would be registered once more
        head = projection = tokens = None
        if semantics != "off":
            encoder: Any = network.encoder
            last: Any = decoder.seg_layers[-1]
            head = SemanticHead(
                last.out_channels, encoder.output_channels[-1], last.in_channels, encoder.conv_op, dimension
            )
            projection = ResizableLinear(last.in_channels, dimension, free="out")
        if semantics == "learned":
            tokens = nn.Parameter(F.normalize(torch.randn(last.out_channels, dimension), dim=-1))
        self.head: SemanticHead | None = head
        self.projection: ResizableLinear | None = projection
        self.tokens: nn.Parameter | None = tokens

    @property
    def bank(self) -> SemanticBank:
        """The bank all networks share."""
        return self._bank[0]

    def forward(self, data: Tensor, vectors: Tensor | None = None) -> MemberOutput:
        """Logits and last decoder feature.

        Args:
            data: `(B, channels, *S)`.
            vectors: image vectors `(B, C, D)` the samples are conditioned on (see `RADANet.conditioning`); None: the
                bank's. Ignored by `learned` and `off`.

        Raises:
            ValueError: training with `clip` and an empty bank.
        """
        decoder: Any = self.network.decoder
        skips = list(self.network.encoder(data))  # type: ignore[operator]
        outputs: list[Tensor] = []
        x = skips[-1]
        last = len(decoder.stages) - 1
        for s in range(last + 1):
            x = decoder.stages[s](torch.cat((decoder.transpconvs[s](x), skips[-(s + 2)]), 1))
            if decoder.deep_supervision or s == last:
                outputs.append(decoder.seg_layers[s](x))
        outputs.reverse()
        if self.head is not None:
            text, image = self._class_vectors(vectors)
            outputs[0] = self.head(outputs[0], x, skips[-1], text, image)
        return MemberOutput(outputs if decoder.deep_supervision else outputs[0], x)

    def unit_tokens(self) -> Tensor:
        """The tokens at length 1, `(C, D)`."""
        assert self.tokens is not None
        return F.normalize(self.tokens.float(), dim=-1)

    def _class_vectors(self, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Text `(C, D)` and image `(B or 1, C, D)`."""
        if self.tokens is not None:
            tokens = self.unit_tokens()
            return tokens, tokens[None]
        if self.training and torch.is_grad_enabled() and not self.bank.is_filled:
            raise ValueError(
                "a RADA network cannot be trained with an empty embedding bank: fill it first (the trainer does so in "
                "on_train_start), or set rada.semantics to learned or off"
            )
        return self.bank.text, self.bank.in_view(self.view_index)[None] if vectors is None else vectors
