"""The region-aware dual encoder: CLIP whose patch embedding takes the mask as a fourth channel (Alpha-CLIP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_ext.rada.semantics.clip_model import ClipSource, load_clip
from nnunetv2_ext.rada.semantics.clip_weights import ALPHA_NOTICE, alpha_state_dict, load_strict, read_weights

# Alpha-CLIP's normalisation of the mask: +1.923 inside, -1.923 outside
ALPHA_MEAN, ALPHA_STD = 0.5, 0.26

Precision = Literal["fp32", "bf16"]


class RegionEncoder:
    """Image regions and sentences as unit vectors of one space.

    Args:
        model: an open_clip model in eval mode; its patch embedding is replaced by one of four channels in place. The
            kernel of the mask is zero, so that masks change nothing, until ``load_alpha``.
        tokenizer: open_clip's for that model.
        device: where to run.
        precision: ``bf16`` runs matrix products in bfloat16; vectors are fp32 in both.

    Attributes:
        image_size: S, pixels per side.
        dim: D, numbers in a vector.
        reads_masks: whether Alpha-CLIP's weights are loaded.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, device: torch.device | str = "cpu", precision: Precision = "fp32"
    ) -> None:
        self.device, self.precision = torch.device(device), precision
        self._tokenizer, self._model = tokenizer, model
        visual: Any = model.visual
        self.has_tokens = _is_vision_transformer(visual)
        if self.has_tokens:
            visual.conv1 = _with_mask_channel(visual.conv1)
        size = visual.image_size
        self.image_size = int(size[0] if isinstance(size, (tuple, list)) else size)
        preprocess = visual.preprocess_cfg
        self._mean = torch.tensor(preprocess["mean"], device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocess["std"], device=self.device).view(1, 3, 1, 1)
        self._visual: Any = visual
        self.reads_masks = False
        self._model.to(self.device)
        self.dim = int(self.encode_text(["a slice"]).shape[1])

    def load_alpha(self, path: str, model_name: str, log: Callable[[str], None] = print) -> None:
        """Replace the visual weights by Alpha-CLIP's.

        Raises:
            ValueError: the file is missing, damaged, no Alpha-CLIP file, or of another size than the model.
        """
        setting = "rada.alpha_weights"
        if not self.has_tokens:
            raise ValueError(f"{setting}: Alpha-CLIP's weights are for OpenAI's ViT, not for {model_name}")
        try:
            state = alpha_state_dict(read_weights(path, setting, log))
        except ValueError as error:
            raise error if str(error).startswith(setting) else ValueError(f"{setting}: {path}: {error}") from error
        load_strict(self._visual, state, path, setting, f"the image encoder of {model_name}")
        self.reads_masks = True
        log(f"Alpha-CLIP: masks are read with the weights of {path}.")
        log(ALPHA_NOTICE)

    @torch.inference_mode()
    def encode_images(self, images: Tensor, masks: Tensor) -> Tensor:
        """Vectors `(n, D)`, fp32 on the CPU, of images `(n, 3, S, S)` in 0..1 with masks `(n, 1, S, S)` in 0..1."""
        with self._autocast():
            return self._normalise(self._visual(self._stack(images, masks)))

    @torch.inference_mode()
    def encode_pooled(self, images: Tensor, masks: Tensor) -> Tensor:
        """As ``encode_images``, but the mean of the patch tokens under the mask, projected like the image's vector.

        The encoder itself sees the whole image. A token weighs as much as the mask covers its patch.

        Raises:
            ValueError: a mask is empty, or the image encoder is no open_clip ViT.
        """
        if not self.has_tokens:
            raise ValueError("rada.region=pool needs an open_clip ViT, which gives patch tokens; use rada.region=crop")
        with self._autocast():
            found = self._visual.forward_intermediates(
                self._stack(images, torch.ones_like(masks)), indices=1, normalize_intermediates=True
            )
        tokens = found["image_intermediates"][-1].float()  # (n, width, rows, columns)
        weights = F.adaptive_avg_pool2d(masks.to(self.device).float(), tokens.shape[-2:])
        total = weights.sum((2, 3))
        if bool((total == 0).any()):
            raise ValueError("patch tokens cannot be pooled under an empty mask")
        pooled = (tokens * weights).sum((2, 3)) / total
        return self._normalise(pooled @ self._visual.proj.float())

    @torch.inference_mode()
    def encode_text(self, sentences: Sequence[str]) -> Tensor:
        """Vectors `(n, D)`, fp32 on the CPU."""
        with self._autocast():
            return self._normalise(self._model.encode_text(self._tokenizer(list(sentences)).to(self.device)))  # type: ignore[operator]

    def _stack(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the patch embedding reads: `(n, 4, S, S)`, or three channels where there is none for the mask."""
        normalised = (images.to(self.device) - self._mean) / self._std
        if not self.has_tokens:
            return normalised
        return torch.cat((normalised, (masks.to(self.device) - ALPHA_MEAN) / ALPHA_STD), 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @staticmethod
    def _normalise(vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=1).cpu()


def load_encoder(
    source: ClipSource,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    log: Callable[[str], None] = print,
) -> RegionEncoder:
    """CLIP, with Alpha-CLIP's image encoder if `source` names its weights.

    Torch's random stream is left as it was: modules are built with random weights before these are filled, and a
    training that finds all vectors on disk builds none.

    Raises:
        ValueError: see ``load_clip`` and ``RegionEncoder.load_alpha``.
    """
    with torch.random.fork_rng(devices=[]):  # built on the CPU
        model, tokenizer = load_clip(source, log)
        encoder = RegionEncoder(model, tokenizer, device, precision)
        if source.alpha_weights is not None:
            encoder.load_alpha(source.alpha_weights, source.located or source.model, log)
    return encoder


def _is_vision_transformer(visual: nn.Module) -> bool:
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer)


def _with_mask_channel(conv: nn.Conv2d) -> nn.Conv2d:
    """The patch embedding with a fourth input channel whose kernel is zero: the output is that of `conv`."""
    wide = nn.Conv2d(4, conv.out_channels, conv.kernel_size, conv.stride, bias=False)  # type: ignore[arg-type]
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, :3] = conv.weight
    return wide.requires_grad_(False)
