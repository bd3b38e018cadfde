"""The region-aware dual encoder: CLIP whose patch embedding takes the mask as a fourth channel (Alpha-CLIP)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_ext.rada.semantics.clip_model import WITHOUT_CLIP, ClipSource, Log, in_one_line, load_clip, require_file

ALPHA_NOTICE = (
    "Alpha-CLIP: the code is Apache-2.0, the weights are for research only, the training data CC BY-NC 4.0"
    " (https://github.com/SunzeY/AlphaCLIP)."
)
# Alpha-CLIP's normalisation of the mask: +1.923 inside, -1.923 outside
ALPHA_MEAN, ALPHA_STD = 0.5, 0.26
_ALPHA = "rada.alpha_weights"


class RegionEncoder:
    """Image regions and sentences as unit vectors of one space.

    Args:
        model: an open_clip model in eval mode; its patch embedding is replaced by one of four channels in place. The
            kernel of the mask is zero, so that masks change nothing, until ``load_alpha``.
        tokenizer: open_clip's for that model.
        device: where to run.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        from open_clip.transformer import VisionTransformer

        self.device = torch.device(device)
        self._tokenizer, self._model = tokenizer, model
        visual: Any = model.visual
        self.has_tokens = isinstance(visual, VisionTransformer)  # patch tokens, and a place for the mask
        if self.has_tokens:
            visual.conv1 = _with_mask_channel(visual.conv1)
        size = visual.image_size
        self.image_size = int(size[0] if isinstance(size, (tuple, list)) else size)  # S, pixels per side
        self._mean, self._std = (
            torch.tensor(visual.preprocess_cfg[name], device=self.device).view(1, 3, 1, 1) for name in ("mean", "std")
        )
        self._visual: Any = visual
        self._model.to(self.device)
        self.dim = int(self.encode_text(["a slice"]).shape[1])  # D, numbers in a vector

    def load_alpha(self, path: str, model_name: str, log: Log = print) -> None:
        """Replace the visual weights by Alpha-CLIP's.

        Raises:
            ValueError: the file is missing, damaged, no Alpha-CLIP file, or of another size than the model.
        """
        if not self.has_tokens:
            raise ValueError(f"{_ALPHA}: Alpha-CLIP's weights are for OpenAI's ViT, not for {model_name}")
        state = alpha_state_dict(path)
        try:
            self._visual.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{_ALPHA}: {path} does not fit the image encoder of {model_name} ({in_one_line(error)}); give the "
                f"weights of that model, or set rada.clip_model to the model of these weights, {WITHOUT_CLIP}"
            ) from error
        log(f"Alpha-CLIP: masks are read with the weights of {path}.")
        log(ALPHA_NOTICE)

    @torch.inference_mode()
    def encode_images(self, images: Tensor, masks: Tensor) -> Tensor:
        """Vectors `(n, D)`, fp32 on the CPU, of images `(n, 3, S, S)` in 0..1 with masks `(n, 1, S, S)` in 0..1."""
        return self._normalise(self._visual(self._stack(images, masks)))

    @torch.inference_mode()
    def encode_pooled(self, images: Tensor, masks: Tensor) -> Tensor:
        """As ``encode_images``, but the mean of the patch tokens under the mask, projected like the image's vector.

        The encoder itself sees the whole image. A token weighs as much as the mask covers its patch.

        Raises:
            ValueError: a mask is empty, or the image encoder is not an open_clip ViT.
        """
        if not self.has_tokens:
            raise ValueError("rada.region=pool needs an open_clip ViT, which gives patch tokens; use rada.region=crop")
        seen = self._stack(images, torch.ones_like(masks))
        found = self._visual.forward_intermediates(seen, indices=1, normalize_intermediates=True)
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
        return self._normalise(self._model.encode_text(self._tokenizer(list(sentences)).to(self.device)))  # type: ignore[operator]

    def _stack(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the patch embedding reads: `(n, 4, S, S)`, or three channels where there is none for the mask."""
        normalised = (images.to(self.device) - self._mean) / self._std
        if not self.has_tokens:
            return normalised
        return torch.cat((normalised, (masks.to(self.device) - ALPHA_MEAN) / ALPHA_STD), 1)

    @staticmethod
    def _normalise(vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=1).cpu()


def load_encoder(source: ClipSource, device: torch.device | str = "cpu", log: Log = print) -> RegionEncoder:
    """CLIP, with Alpha-CLIP's image encoder if `source` names its weights.

    Torch's random stream is left as it was: modules are built with random weights before these are filled, and a
    training that finds all vectors on disk builds none.

    Raises:
        ValueError: see ``load_clip`` and ``RegionEncoder.load_alpha``.
    """
    with torch.random.fork_rng(devices=[]):  # built on the CPU
        model, tokenizer = load_clip(source, log)
        encoder = RegionEncoder(model, tokenizer, device)
        if source.alpha_weights is not None:
            encoder.load_alpha(source.alpha_weights, source.located or source.model, log)
    return encoder


def alpha_state_dict(path: str) -> dict[str, Tensor]:
    """Alpha-CLIP's visual weights under open_clip's names, for a patch embedding of four channels; no code is run.

    Alpha-CLIP adds a convolution of the mask to the one of the image: ``conv1(x) + conv1_alpha(a)`` is one convolution
    of the four channels with both kernels side by side. Its attention calls ``in_proj_weight`` ``in_proj.weight``.

    Source: https://github.com/SunzeY/AlphaCLIP, alpha_clip/model.py; equal to 2.4e-6 when measured.

    Args:
        path: a ``torch.save`` file with the state dict, or the same as ``.safetensors``.

    Raises:
        ValueError: there is no such file, or it is damaged or something else.
    """
    file = require_file(path, _ALPHA)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in too many ways to list
        raise ValueError(
            f"{_ALPHA}: {path} cannot be read as weights ({in_one_line(error)}); it is truncated or not a weights "
            f"file: download it again, {WITHOUT_CLIP}"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    state = {str(name).removeprefix("module.").removeprefix("visual."): tensor for name, tensor in content.items()}
    missing = [name for name in ("conv1.weight", "conv1_alpha.weight") if not isinstance(state.get(name), Tensor)]
    if missing:
        names = " and ".join(missing)
        raise ValueError(
            f"{_ALPHA}: {path}: no Alpha-CLIP weights: {names} not found; give another file, {WITHOUT_CLIP}"
        )
    colour, alpha = state.pop("conv1.weight"), state.pop("conv1_alpha.weight")
    if alpha.shape != (colour.shape[0], 1, *colour.shape[2:]):
        shapes = ("x".join(map(str, tensor.shape)) for tensor in (alpha, colour))
        raise ValueError(f"{_ALPHA}: {path}: conv1_alpha.weight is {' beside conv1.weight of '.join(shapes)}")
    renamed = {name.replace(".attn.in_proj.", ".attn.in_proj_"): tensor for name, tensor in state.items()}
    return {"conv1.weight": torch.cat((colour, alpha), 1), **renamed}


@torch.no_grad()
def _with_mask_channel(conv: nn.Conv2d) -> nn.Conv2d:
    """The patch embedding with a fourth input channel whose kernel is zero: the output is that of `conv`."""
    wide = nn.Conv2d(4, conv.out_channels, conv.kernel_size, conv.stride, bias=False)  # type: ignore[arg-type]
    wide.weight.zero_()
    wide.weight[:, :3] = conv.weight
    return wide.requires_grad_(False)
