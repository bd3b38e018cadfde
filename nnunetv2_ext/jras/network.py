"""The network: the plan's own architecture, and beside its decoder what reads guides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_ext.jras.bank import STORED_DTYPES, GuideBank
from nnunetv2_ext.jras.read import GuideFeatures, Reader, joined, prototype_similarity
from nnunetv2_ext.jras.search import select
from nnunetv2_ext.jras.settings import JRASSettings

READ_STRIDE = 4  # the read is at the resolution nearest to a quarter of the patch's
MIN_CELLS = 16  # per axis in the plane; coarser cells do not tell where a structure is
MAX_CELLS = 4096  # of a patch, for MIN_CELLS' sake: attention costs their square
FEATURES_KEPT = 5  # of the last weights that were loaded: nnU-Net loads those of each fold for each case
ENCODED_AT_ONCE = 8


class Episode(NamedTuple):
    """Guides of a training batch: images `(B, K, C, *P)`, masks `(B, K, M, *P)`, where known `(B, K, 1, *P)`.

    `kept` bool `(B,)`: the other samples read nothing.
    """

    images: Tensor
    masks: Tensor
    known: Tensor
    kept: Tensor


class Exclusion(NamedTuple):
    groups: Tensor  # (B,) int64: subjects of a batch that reads the bank, whose guides they do not get


# Not an attribute of the network: copies of it (a moving-average teacher) must respect it too, however they are wrapped
_CONTEXT: ContextVar[Episode | Exclusion | None] = ContextVar("jras_context", default=None)


@contextmanager
def reading(context: Episode | Exclusion) -> Iterator[None]:
    """Within it, the forward of any `JRASNetwork` reads these guides, or the bank with this exclusion.

    Without it the bank is read and nothing is excluded.
    """
    token = _CONTEXT.set(context)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


class Reading(NamedTuple):
    """What the last forward read: the transported masks `(B, M, *s)`, in an episode with their graph; of the bank's
    guides ids and validity `(B, K)`, None in an episode; keys and vectors of the queries.
    """

    transported: Tensor
    ids: Tensor | None
    valid: Tensor | None
    keys: Tensor
    vectors: Tensor


class JRASNetwork(nn.Module):
    """A U-Net whose decoder also gets what each cell reads of K guides.

    Its first convolutions at three resolutions have further input columns, which start with weights of zero: at first,
    with an empty bank, and for samples that read nothing, it is `backbone` bit for bit. The columns are stored beside
    `backbone`, whose weights keep nnU-Net's names and shapes.

    Args:
        backbone: nnU-Net's own network with `encoder` (a list of skips) and `decoder`.
        settings: what is marked structural.
        image_channels: C; further input channels (of a cascade) are zero for guides.
        heads, patch_size: M and P.

    Attributes:
        stock_prefixes: where nnU-Net's own network sits (see parts/start/).
        buffers_of_any_size: names of those that take the size of what is loaded into them (see core/checkpoint.py).
        gradients: how many of an episode's guides pass gradients on.
        last: what the last forward read; None after one without guides.

    Raises:
        ValueError: a backbone that is not a U-Net of nnU-Net's convolution blocks.
    """

    stock_prefixes = ("backbone.",)

    def __init__(
        self, backbone: nn.Module, settings: JRASSettings, image_channels: int, heads: int, patch_size: Sequence[int]
    ) -> None:
        super().__init__()
        decoder = getattr(backbone, "decoder", None)
        stages = list(getattr(decoder, "stages", ()))
        if not hasattr(backbone, "encoder") or not stages or not all(hasattr(stage, "convs") for stage in stages):
            raise ValueError(
                f"J-RAS needs a network with an encoder and a decoder of convolution blocks (PlainConvUNet, "
                f"ResidualEncoderUNet), not {type(backbone).__name__}; use plans of the standard or the residual "
                "encoder planner"
            )
        channels: Sequence[int] = backbone.encoder.output_channels  # type: ignore[assignment, union-attr]
        self.settings, self.backbone = settings, backbone
        self.image_channels, self.heads, dim = image_channels, heads, len(patch_size)
        self.num_guides, self.gradients = settings.guides_for(dim), settings.guides_with_gradient
        self.level = read_level(patch_size, backbone.encoder.strides)  # type: ignore[union-attr, arg-type]
        self.fine = tuple(range(min(2, len(stages))))  # levels of the prototypes
        scores = settings.retriever == "joint"
        self.reader = Reader(channels[self.level], settings.key_dim, settings.value_dim, dim, scores)
        self.columns = nn.ModuleDict()
        for level in sorted({self.level, *self.fine}):
            read = heads + settings.value_dim if level == self.level else 0
            self.columns[str(level)] = _columns(self._first_convolution(level), read + heads * (level in self.fine))
        self.bank = GuideBank(image_channels, heads, patch_size)
        self.bank.shared_by_copies = True  # type: ignore[assignment]  # a moving-average teacher looks into this one
        self.last: Reading | None = None
        self._features = _FeatureCache()
        # DDP broadcasts all buffers at every forward; all ranks have the same bank. A compiled network adds a prefix
        self.buffers_of_any_size = frozenset(f"bank.{name}" for name in STORED_DTYPES)
        names = sorted(self.buffers_of_any_size)
        self._ddp_params_and_buffers_to_ignore = [*names, *(f"_orig_mod.{name}" for name in names)]

    # properties: as attributes their weights would be in the state twice. nnU-Net switches the decoder's outputs
    encoder = property(lambda self: self.backbone.encoder)
    decoder = property(lambda self: self.backbone.decoder)

    def _first_convolution(self, level: int) -> Any:
        return self.decoder.stages[len(self.decoder.stages) - 1 - level].convs[0].conv

    def forward(self, x: Tensor) -> Any:
        """Logits of `(B, C_in, *P)`: `(B, M, *P)`, or their list over deep-supervision resolutions.

        Raises:
            ValueError: training without an episode.
        """
        episode = self._episode()
        skips = list(self.encoder(x))
        if episode is None and self.bank.is_empty:
            self.last = None
            return self._decode(skips, {})
        keys = self.reader.keys(skips[self.level])
        vectors = self.reader.query_vectors(keys)
        ids = valid = None
        if episode is not None:
            guides, kept = self._encoded(episode, x.shape[1]), episode.kept
        else:
            guides, ids, valid = self._looked_up(vectors, x.shape[1])
            kept = valid.any(1)
        further, transported = self._read(skips, keys, vectors, guides, kept)
        transported = transported if ids is None else transported.detach()  # only an episode is learnt from
        self.last = Reading(transported, ids, valid, keys.detach(), vectors.detach())
        return self._decode(skips, further)

    def _read(
        self, skips: list[Tensor], keys: Tensor, vectors: Tensor, guides: GuideFeatures, kept: Tensor
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Further inputs of the decoder by level, exactly zero for samples that read nothing; the transported masks."""
        found = self.reader(keys, vectors, guides).transpose(1, 2).unflatten(2, skips[self.level].shape[2:])
        further = {self.level: [found]}
        for number, level in enumerate(self.fine):
            similar = prototype_similarity(skips[level], guides.sums[number], guides.counts[number])
            further.setdefault(level, []).append(similar)
        keep = kept.view(-1, *[1] * (found.ndim - 1)).to(found.dtype)
        return {level: torch.cat(parts, 1) * keep for level, parts in further.items()}, found[:, : self.heads]

    def _decode(self, skips: list[Tensor], further: dict[int, Tensor]) -> Any:
        """nnU-Net's UNetDecoder.forward, with the further columns."""
        decoder, x, outputs = self.decoder, skips[-1], []
        for number, stage in enumerate(decoder.stages):
            level = len(decoder.stages) - 1 - number
            x = torch.cat((decoder.transpconvs[number](x), skips[level]), 1)
            if level in further:
                first = stage.convs[0]
                x = first.conv(x) + self.columns[str(level)](further[level])
                for module in [*list(first.all_modules)[1:], *list(stage.convs)[1:]]:
                    x = module(x)
            else:
                x = stage(x)
            if decoder.deep_supervision:
                outputs.append(decoder.seg_layers[number](x))
        return outputs[::-1] if decoder.deep_supervision else decoder.seg_layers[-1](x)

    # ---- the guides
    @torch.compiler.disable
    def _episode(self) -> Episode | None:
        context = _CONTEXT.get()
        if isinstance(context, Episode):
            return context
        if self.training and torch.is_grad_enabled():
            raise ValueError(
                "a J-RAS network is trained with the guides of an episode (the trainer's loader brings them), or with "
                "jras.retriever=none"
            )
        return None

    def _encoded(self, episode: Episode, inputs: int) -> GuideFeatures:
        """Features `(B, K)` of an episode's guides; the first `gradients` of each pass gradients on."""
        batch, number = episode.images.shape[:2]
        parts, cut = [], min(self.gradients, number)
        for first, last, grad in ((0, cut, True), (cut, number, False)):
            if first == last:
                continue
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                own = [part[:, first:last].flatten(0, 1) for part in episode[:3]]
                parts.append(self.encode_guides(own[0], own[1], own[2], inputs).unflatten(batch))
        return joined(parts, 1)

    def encode_guides(self, images: Tensor, masks: Tensor, known: Tensor, inputs: int) -> GuideFeatures:
        """Features `(G,)` of guides: images `(G, C, *P)`, masks `(G, M, *P)`, known `(G, 1, *P)`.

        Args:
            inputs: channels that the encoder takes; those of a previous stage are zero.
        """
        x = images[:, : self.image_channels]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, inputs - x.shape[1]))
        skips = []
        stem = getattr(self.encoder, "stem", None)
        x = x if stem is None else stem(x)
        for stage in list(self.encoder.stages)[: max(self.level, *self.fine) + 1]:
            x = stage(x)
            skips.append(x)
        return self.reader.guide_features(skips[self.level], [skips[level] for level in self.fine], masks, known)

    @torch.compiler.disable
    @torch.no_grad()
    def _looked_up(self, vectors: Tensor, inputs: int) -> tuple[GuideFeatures, Tensor, Tensor]:
        context, features = _CONTEXT.get(), self.bank_features(inputs)
        groups = context.groups if isinstance(context, Exclusion) else None
        generator = None
        if not self.reader.scores:  # a control that predicts the same patch in the same way, whatever came before
            generator = torch.Generator(vectors.device).manual_seed(0)
        number = min(self.num_guides, len(self.bank))
        ids, valid = select(vectors.float(), features.vectors, number, self.bank.groups, groups, generator)
        return features.select(ids, valid), ids, valid

    @torch.no_grad()
    def bank_features(self, inputs: int) -> GuideFeatures:
        """Features `(N,)` of all guides in eval mode; computed once for each weights and content."""
        versions = self._versions()
        if (found := self._features.get(versions)) is not None:
            return found
        was_training = self.training
        self.eval()
        try:
            rows = torch.arange(len(self.bank), device=self.bank.groups.device).split(ENCODED_AT_ONCE)
            parts = [self.encode_guides(self.bank.stored_images(i), *self.bank.masks(i), inputs) for i in rows]
        finally:
            self.train(was_training)
        found = joined(parts, 0)
        self._features.put(versions, found)
        return found

    def _versions(self) -> tuple[Any, ...]:
        """Changes with every write to the weights or the bank, and with the device."""
        tensors = [*self.parameters(), *self.bank.buffers()]
        written = (-1 if t.is_inference() else t._version for t in tensors)
        return (self.bank.version, tensors[0].device, tensors[0].dtype, *written)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Torch's; features of guides that were computed with these very tensors are taken up again."""
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self._features.loaded(list(state_dict.values()), self._versions())
        return result


class _FeatureCache:
    """Features of the bank's guides for the weights they were computed with: today's, and those of the last loads.

    nnU-Net's predictor loads the weights of every fold for every case, always from the same tensors.
    """

    def __init__(self) -> None:
        self._now: tuple[tuple[Any, ...], GuideFeatures | None] | None = None  # versions, features
        self._source: list[tuple[Tensor, int]] = []  # what the weights were loaded from, while they are just that
        self._loads: list[tuple[list[tuple[Tensor, int]], GuideFeatures]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _FeatureCache:
        return _FeatureCache()

    def __reduce__(self) -> Any:
        return _FeatureCache, ()

    def get(self, versions: tuple[Any, ...]) -> GuideFeatures | None:
        if self._now is not None and self._now[0] == versions:
            return self._now[1]
        self._source = []  # something was written since
        return None

    def put(self, versions: tuple[Any, ...], features: GuideFeatures) -> None:
        self._now = versions, features
        if self._source:
            self._loads = [*self._loads[-FEATURES_KEPT + 1 :], (self._source, features)]

    def loaded(self, source: Sequence[Tensor], versions: tuple[Any, ...]) -> None:
        """The network holds the content of these tensors now."""
        self._source = [] if any(t.is_inference() for t in source) else [(t, t._version) for t in source]
        known = [f for kept, f in self._loads if self._source and _same(kept, self._source)]
        self._now = versions, known[-1] if known else None


def _same(one: Sequence[tuple[Tensor, int]], other: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether both are the same tensors, with nothing written to them in between."""
    return len(one) == len(other) and all(a is b and v == w for (a, v), (b, w) in zip(one, other))


def read_level(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> int:
    """The encoder's stage that guides are read at: nearest to a quarter of the patch, of those with a skip.

    Finer as long as it has fewer than 16 cells along an axis of the plane (the two axes with most cells) and the next
    one has at most 4,096 in all. Coarser, if the next one has not too few, as long as it has more than these; in 2-D
    as long as it has more than 16 x 16 and the next one is not coarser than an eighth.
    """
    total = np.cumprod([list(stride) for stride in strides], axis=0)[: max(1, len(strides) - 1)]
    sizes = np.maximum(1, np.asarray(patch_size) // total)
    in_plane, cells, stride = np.sort(sizes, axis=1)[:, -2], sizes.prod(1), total.max(1)
    level = int(np.abs(np.log2(stride / READ_STRIDE)).argmin())
    while level > 0 and in_plane[level] < MIN_CELLS and cells[level - 1] <= MAX_CELLS:
        level -= 1
    while level + 1 < len(sizes) and in_plane[level + 1] >= MIN_CELLS:
        enough = MIN_CELLS ** len(patch_size) if stride[level + 1] <= 2 * READ_STRIDE else MAX_CELLS
        if cells[level] <= enough:
            break
        level += 1
    return level


def _columns(convolution: Any, inputs: int) -> nn.Module:
    """Further input columns of a convolution, with weights of zero."""
    further = type(convolution)(
        inputs,
        convolution.out_channels,
        convolution.kernel_size,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        bias=False,
    )
    nn.init.zeros_(further.weight)
    return further
