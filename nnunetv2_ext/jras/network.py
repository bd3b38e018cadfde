"""The network: the plan's own architecture, and around it what retrieves guides and uses them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_ext.jras.bank import STORED_DTYPES, GuideBank, Guides
from nnunetv2_ext.jras.encoder import BottleneckRetriever, GuideEncoder, Retriever
from nnunetv2_ext.jras.fusion import AttentionFusion, concat_guides
from nnunetv2_ext.jras.labels import adaptive_pool, low_res_shape
from nnunetv2_ext.jras.settings import JRASSettings

INITIAL_NULL_LOGIT = 0.5  # the null guide starts as good as a guide of this cosine


class Exclusion(NamedTuple):
    """What the lookups within `excluding` respect: the subjects `(B,)` int64 of the batch, whose guides they do not
    get, the share of samples that get no guide, and the generator of that and of `retriever=random` (None: global).
    """

    groups: Tensor
    dropout: float = 0.0
    generator: torch.Generator | None = None


# Not an attribute of the network: copies of it (a moving-average teacher) must respect it too, however they are wrapped
_EXCLUSION: ContextVar[Exclusion | None] = ContextVar("jras_exclusion", default=None)


@contextmanager
def excluding(exclusion: Exclusion) -> Iterator[None]:
    """Within it, the forward of any `JRASNetwork` looks up guides for these samples. Without it nothing is excluded."""
    token = _EXCLUSION.set(exclusion)
    try:
        yield
    finally:
        _EXCLUSION.reset(token)


class Retrieval(NamedTuple):
    """What the last forward retrieved, detached: ids (rows of the bank) and validity `(B, K)`, weights w `(B, K + 1)`
    with the null guide's last, cosines `(B, K)`, meaningless where not valid, and queries `(B, D)`.
    """

    ids: Tensor
    valid: Tensor
    weights: Tensor
    similarities: Tensor
    queries: Tensor


class JRASNetwork(nn.Module):
    """A U-Net that retrieves guides for the patch it sees and uses them.

        q = R(low x);  guides = bank.lookup(q);  w = softmax([q . k / tau, b0 / tau]);  y = decoder(fuse(encoder(x),
        G(guides), w))

    With an empty bank it is exactly `backbone` (for `concat`: with zeros below the image). With
    `retriever_encoder=bottleneck`, q = R(deepest features of encoder(x)).

    Args:
        backbone: nnU-Net's own network with `encoder` (a list of skips) and `decoder`; for `fusion=concat` built with
            C + M more input channels.
        settings: what is marked structural.
        image_channels: C; further input channels (of a cascade) are not retrieved by.
        heads, patch_size: M and P.

    Attributes:
        stock_prefixes: where nnU-Net's own network sits (see parts/start.py).
        buffers_of_any_size: names of those that take the size of what is loaded into them (see core/checkpoint.py).
        null_logit: b0, the cosine a guide must exceed to be preferred to none.
        retriever_is_fixed: whether the weights w pass no gradient on (set by the trainer during the warm-up).
        last: what the last forward retrieved; None after one without guides.

    Raises:
        ValueError: a backbone without encoder and decoder, or with fewer than two resolutions.
    """

    stock_prefixes = ("backbone.",)

    def __init__(
        self, backbone: nn.Module, settings: JRASSettings, image_channels: int, heads: int, patch_size: Sequence[int]
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "encoder") or not hasattr(backbone, "decoder"):
            raise ValueError(
                f"J-RAS needs a network with an encoder and a decoder (PlainConvUNet, ResidualEncoderUNet), not "
                f"{type(backbone).__name__}; use plans of the standard or the residual encoder planner"
            )
        channels: Sequence[int] = backbone.encoder.output_channels  # type: ignore[assignment, union-attr]
        if len(channels) < 2:
            raise ValueError("J-RAS needs a network of at least two resolutions; use another configuration")
        self.settings = settings
        self.image_channels, self.heads = image_channels, heads
        self.low_shape = low_res_shape(patch_size, settings.store_stride)
        self.backbone = backbone
        self.retriever: Retriever | BottleneckRetriever
        if settings.reads_bottleneck:
            self.retriever = BottleneckRetriever(channels[-1], settings.key_dim)
        else:
            self.retriever = Retriever(image_channels, self.low_shape, settings.retriever_widths, settings.key_dim)
        self.null_logit = nn.Parameter(torch.tensor(INITIAL_NULL_LOGIT))
        if settings.fusion == "attention":
            self.guide_encoder = GuideEncoder(image_channels + heads, self.low_shape, settings.guide_widths)
            fine, coarse = settings.guide_widths[-2:]
            self.fusion = AttentionFusion(channels[-1], channels[-2], fine, coarse, len(self.low_shape))
        self.bank = GuideBank(image_channels, heads, self.low_shape, settings.key_dim, settings.dedup_cosine)
        self.bank.shared_by_copies = True  # type: ignore[assignment]  # a moving-average teacher looks into this one
        self.retriever_is_fixed = False
        self.last: Retrieval | None = None
        if not settings.trains_retriever:  # before DDP wraps: it waits for every gradient it was promised
            for parameter in self.retrieval_parameters():
                parameter.requires_grad_(False)
        # DDP broadcasts all buffers at every forward; all ranks have the same bank. A compiled network adds a prefix
        self.buffers_of_any_size = frozenset(f"bank.{name}" for name in STORED_DTYPES)
        names = sorted(self.buffers_of_any_size)
        self._ddp_params_and_buffers_to_ignore = [*names, *(f"_orig_mod.{name}" for name in names)]

    # properties: as attributes their weights would be in the state twice. nnU-Net switches the decoder's outputs
    encoder = property(lambda self: self.backbone.encoder)
    decoder = property(lambda self: self.backbone.decoder)

    def retrieval_parameters(self) -> list[nn.Parameter]:
        """Those of R, and b0."""
        return [*self.retriever.parameters(), self.null_logit]

    def low_resolution(self, x: Tensor) -> Tensor:
        """The image channels of `(B, C_in, *P)` as the retriever sees them, `(B, C, *L)`."""
        return adaptive_pool(x[:, : self.image_channels], self.low_shape)

    def forward(self, x: Tensor) -> Any:
        """Logits of `(B, C_in, *P)`: `(B, M, *P)`, or their list over deep-supervision resolutions.

        Raises:
            ValueError: training with an empty bank.
        """
        if self.bank.is_empty:
            if self.training and torch.is_grad_enabled():
                raise ValueError(
                    "a J-RAS network cannot be trained with an empty guide bank: fill it first (the trainer does so in "
                    "on_train_start), or set jras.retriever=none"
                )
            self.last = None
            if self.settings.fusion == "concat":  # zeros below the image, as where all weight is on the null guide
                x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.image_channels + self.heads))
            return self.backbone(x)
        if self.settings.fusion == "concat":
            guides, weights = self._retrieve(self.retriever(self.low_resolution(x)))
            return self.backbone(concat_guides(x, guides.images, guides.masks, weights))
        skips = list(self.encoder(x))
        seen = skips[-1] if self.settings.reads_bottleneck else self.low_resolution(x)
        guides, weights = self._retrieve(self.retriever(seen))
        features = self.guide_encoder(guides.images.flatten(0, 1), guides.masks.flatten(0, 1))
        u, v = (x.unflatten(0, guides.ids.shape) for x in features)
        skips[-1], skips[-2] = self.fusion(skips[-1], skips[-2], u, v, weights)
        return self.decoder(skips)

    def _retrieve(self, queries: Tensor) -> tuple[Guides, Tensor]:
        guides = self._lookup(queries.detach())
        # eval: what refresh has stored; training: anew, so that the loss teaches the keys' side as well
        if self.training and torch.is_grad_enabled() and self.settings.trains_keys:
            keys = self.retriever(guides.images.flatten(0, 1)).unflatten(0, guides.ids.shape)
        else:
            keys = guides.keys
        similarities = (queries[:, None] * keys).sum(2)
        weights = self.weights(similarities, guides.valid)
        self.last = Retrieval(guides.ids, guides.valid, weights.detach(), similarities.detach(), queries.detach())
        return guides, weights

    def weights(self, similarities: Tensor, valid: Tensor) -> Tensor:
        """w `(B, K + 1)` fp32 from cosines `(B, K)`: rows sum to 1, the null guide's last; 0 where not valid."""
        if self.settings.retriever == "random":
            number = valid.sum(1, keepdim=True)
            return torch.cat((valid / number.clamp(min=1), (number == 0).float()), 1).float()
        with torch.autocast(similarities.device.type, enabled=False):
            logits = torch.where(valid, similarities, torch.full_like(similarities, -torch.inf))
            null = self.null_logit.float().expand(len(logits), 1)
            weights = (torch.cat((logits, null), 1) / self.settings.tau).softmax(1)
        if self.retriever_is_fixed:
            # never plain detach: under DDP the gradients would be silently wrong
            weights = weights.detach() + 0 * weights
        return weights

    @torch.compiler.disable
    def _lookup(self, queries: Tensor) -> Guides:
        exclusion, is_random = _EXCLUSION.get(), self.settings.retriever == "random"
        groups, generator = (exclusion.groups, exclusion.generator) if exclusion else (None, None)
        if is_random and generator is None:
            # a control that predicts the same patch in the same way, whatever was predicted before
            generator = torch.Generator(queries.device).manual_seed(int(queries.view(torch.int32).sum()) % 2**31)
        guides = self.bank.lookup(queries, self.settings.num_guides, groups, is_random, generator)
        if exclusion is None or exclusion.dropout == 0:
            return guides
        kept = torch.rand(len(queries), 1, device=queries.device, generator=exclusion.generator) >= exclusion.dropout
        return guides._replace(valid=guides.valid & kept)

    def embed(self, patches: Tensor) -> Tensor:
        """Embeddings `(n, D)` of patches: low-resolution ones `(n, C, *L)`, for `bottleneck` `(n, C, *P)`."""
        return self.retriever(self.encoder(patches)[-1] if self.settings.reads_bottleneck else patches)

    @torch.no_grad()
    def embed_bank(
        self, first: int = 0, last: int | None = None, batch: int = 64, read: Callable[[range], Tensor] | None = None
    ) -> Tensor:
        """Embeddings `(last - first, D)` of the guides in eval mode; modes, gradients, random state stay.

        Args:
            first, last: rows of the bank, the latter not included; None: all.
            batch: guides embedded at a time.
            read: the patches `embed` takes, for rows of the bank; None: the stored ones (not for `bottleneck`).
        """
        read = read or (lambda rows: self.bank.stored_images(torch.tensor(rows, device=self.bank.keys.device)))
        last = len(self.bank) if last is None else last
        modes = [(module, module.training) for module in (self.retriever, self.encoder)]
        try:
            for module, _ in modes:
                module.eval()
            parts = [self.embed(read(range(start, min(last, start + batch)))) for start in range(first, last, batch)]
        finally:
            for module, mode in modes:
                module.train(mode)
        return torch.cat(parts) if parts else self.bank.keys.new_zeros((0, self.settings.key_dim))
