"""Networks of segmentation-models-pytorch (SMP) with nnU-Net's contract."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ARCHITECTURES = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# nnU-Net's trainers need two resolutions, of which the coarser one has weight 0
STRIDES = ((1, 1), (2, 2), (2, 2))
DIVISOR = 32  # of the sides, for five halvings; SMP's dilated networks have fewer


def import_smp() -> Any:
    """segmentation_models_pytorch; ValueError with the command that installs it if it is missing."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(
            f'segmentation-models-pytorch is not installed ({error}): pip install "nnunetv2-ext[photo]"'
        ) from error
    return smp


class SMPNetwork(nn.Module):
    """A network of SMP, for images ``(B, C, H, W)`` of any size; logits ``(B, K, H, W)``.

    The sides are padded to multiples of the encoder's stride inside, by repeating the border, and the logits are
    cropped. None of SMP's networks has deep supervision. Where a trainer asks for it (``decoder.deep_supervision``),
    the second output is the logits at half resolution: nnU-Net gives the coarsest output the weight 0.

    Args:
        input_channels, num_classes: C and K.
        architecture: a name of SMP, see ``ARCHITECTURES``.
        encoder: a name of SMP, or ``tu-`` and one of timm. Its weights are random: a plans file names no weights.
        mean, std: of each channel, by which the input is normalised; None leaves the input as nnU-Net made it.
        strides: read by nnU-Net from the plans, for its deep-supervision resolutions.
        deep_supervision: see above.

    Raises:
        ValueError: SMP is not installed, or does not know the architecture or encoder.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        architecture: str = "Unet",
        encoder: str = "tu-tf_efficientnet_lite0",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        strides: Sequence[Sequence[int]] = STRIDES,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        smp = import_smp()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"there is no network smp:{architecture}: it takes {', '.join(ARCHITECTURES)}")
        try:
            model = getattr(smp, architecture)(
                encoder, encoder_weights=None, in_channels=input_channels, classes=num_classes
            )
        except Exception as error:  # KeyError of SMP, RuntimeError of timm, ValueError of an encoder without features
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{architecture} cannot be built with the encoder {encoder} ({reason[:300]}): take a name that SMP "
                "lists, or tu- and a name that timm.list_models() lists"
            ) from error
        self.encoder, self.decoder, self.segmentation_head = model.encoder, model.decoder, model.segmentation_head
        self.decoder.deep_supervision = deep_supervision
        self.has_pooled_norm = architecture in ("DeepLabV3", "DeepLabV3Plus", "PSPNet")
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(std).view(shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, see the class."""
        if isinstance(self.mean, Tensor) and isinstance(self.std, Tensor):
            x = (x - self.mean) / self.std
        height, width = x.shape[2:]
        pad = [-n % DIVISOR for n in (width, height)]
        if any(pad):
            x = functional.pad(x, (0, pad[0], 0, pad[1]), mode="replicate")
        # SMP's depthwise convolutions are 1.3 to 1.4 times faster so, also on a CPU
        x = x.contiguous(memory_format=torch.channels_last)
        logits = self.segmentation_head(self.decoder(self.encoder(x)))
        logits = logits[..., :height, :width].contiguous()
        if not self.decoder.deep_supervision:
            return logits
        size = [round(n / 2) for n in (height, width)]
        return [logits, functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)]
