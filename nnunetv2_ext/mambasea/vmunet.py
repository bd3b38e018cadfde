"""VM-UNet (arXiv 2402.02491) with nnU-Net's contract: a U-Net of visual state-space blocks.

Names of parameters are those of VMamba's published weights, so that these can be loaded.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_ext.mambasea.lsa import LSA
from nnunetv2_ext.mambasea.scan import require_scan, selective_scan

WIDTHS, DEPTHS, DEPTHS_UP = (96, 192, 384, 768), (2, 2, 2, 2), (2, 2, 2, 1)
DIVISOR = 32  # of the sides: patches of 4, three times merged
STATE, EXPANSION, DIRECTIONS = 16, 2, 4
# nnU-Net's trainers need two resolutions, of which the coarser one has weight 0
STRIDES = ((1, 1), (2, 2), (2, 2))


class SS2D(nn.Module):
    """Four selective scans over a map ``(B, H, W, C)``: rows, columns, and both backwards.

    Attributes:
        augment: what a training does to the scan outputs ``(B, 4, D, L)``; None: nothing.
    """

    augment: LSA | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        inner, rank = EXPANSION * width, math.ceil(width / 16)
        self.rank = rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        bound = inner**-0.5
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * STATE, inner).uniform_(-bound, bound))
        bound = rank**-0.5
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, rank).uniform_(-bound, bound))
        # steps from 0.001 to 0.1 at the start, log-uniform, through the inverse of softplus (Mamba)
        step = torch.exp(torch.empty(DIRECTIONS, inner).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_projs_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        decays = torch.arange(1, STATE + 1).float().log()
        self.A_logs = nn.Parameter(decays.repeat(DIRECTIONS * inner, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        x, gate = self.in_proj(x).chunk(2, -1)
        x = functional.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        sequences = four_scans(x)  # (B, 4, D, L)
        projected = torch.einsum("bkdl,kcd->bkcl", sequences, self.x_proj_weight)
        low_rank, B, C = projected.split((self.rank, STATE, STATE), 2)
        delta = torch.einsum("bkrl,kdr->bkdl", low_rank, self.dt_projs_weight)
        delta = functional.softplus(delta.float() + self.dt_projs_bias[..., None])
        A = -torch.exp(self.A_logs.float()).unflatten(0, (DIRECTIONS, -1))
        y = selective_scan(sequences, delta, A, B, C, self.Ds.unflatten(0, (DIRECTIONS, -1)))
        if self.augment is not None:
            y = self.augment.of_scans(y, self.training)
        y = four_folds(y, x.shape[2:]).permute(0, 2, 3, 1).to(gate.dtype)
        return self.out_proj(self.out_norm(y) * functional.silu(gate))


def four_scans(x: Tensor) -> Tensor:
    """``(B, D, H, W)`` as sequences ``(B, 4, D, H W)``: rows, columns, rows backwards, columns backwards."""
    forwards = torch.stack((x.flatten(2), x.transpose(2, 3).flatten(2)), 1)
    return torch.cat((forwards, forwards.flip(-1)), 1)


def four_folds(sequences: Tensor, size: Sequence[int]) -> Tensor:
    """Sum over four sequences ``(B, 4, D, H W)``, each back in its place: ``(B, D, H, W)``."""
    height, width = size
    forwards = sequences[:, :2] + sequences[:, 2:].flip(-1)
    rows = forwards[:, 0].unflatten(-1, (height, width))
    columns = forwards[:, 1].unflatten(-1, (width, height))
    return rows + columns.transpose(2, 3)


class VSSBlock(nn.Module):
    """Norm and scans, with a residual that is dropped for whole samples at ``drop_path``."""

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.self_attention = SS2D(width)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        y = self.self_attention(self.ln_1(x))
        if self.training and self.drop_path:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
            y = y * kept / (1 - self.drop_path)
        return x + y


class _Merging(nn.Module):
    """Four neighbours become one of twice the width."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class _Expansion(nn.Module):
    """One token becomes ``factor`` x ``factor`` of the width ``out``."""

    def __init__(self, width: int, out: int, factor: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Linear(width, factor**2 * out, bias=False), nn.LayerNorm(out)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        f = self.factor
        x = self.expand(x).view(batch, height, width, f, f, -1).transpose(2, 3)
        return self.norm(x.reshape(batch, f * height, f * width, -1))


class _Stage(nn.Module):
    def __init__(self, width: int, drops: Sequence[float], before: nn.Module | None, after: nn.Module | None) -> None:
        super().__init__()
        self.upsample = before
        self.blocks = nn.ModuleList(VSSBlock(width, drop) for drop in drops)
        self.downsample = after

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.upsample is None else self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class _PatchEmbedding(nn.Module):
    def __init__(self, input_channels: int, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(input_channels, width, 4, 4), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class _Encoder(nn.Module):
    """Maps ``(B, H, W, C)`` in front of each stage, then the last one's output."""

    def __init__(self, input_channels: int, widths: Sequence[int], drops: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbedding(input_channels, widths[0])
        merging = [_Merging(a, b) for a, b in pairwise(widths)]
        self.layers = nn.ModuleList(_Stage(w, d, None, m) for w, d, m in zip(widths, drops, [*merging, None]))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.patch_embed(x)]
        for stage in self.layers:
            maps.append(stage(maps[-1]))
        return maps


class _Decoder(nn.Module):
    """Stages back to patches of 4, added skips, expansion to pixels and the head."""

    def __init__(
        self, widths: Sequence[int], num_classes: int, drops: Sequence[Sequence[float]], deep_supervision: bool
    ) -> None:
        super().__init__()
        expansions = [_Expansion(a, b, 2) for a, b in zip(widths[::-1], widths[-2::-1])]
        stages = zip(widths[::-1], drops, [None, *expansions])
        self.layers_up = nn.ModuleList(_Stage(w, d, e, None) for w, d, e in stages)
        self.final_up = _Expansion(widths[0], widths[0] // 4, 4)
        self.final_conv = nn.Conv2d(widths[0] // 4, num_classes, 1)
        self.deep_supervision = deep_supervision

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.layers_up[0](maps[-1])
        for stage, skip in zip(self.layers_up[1:], maps[-2:0:-1]):  # type: ignore[arg-type]  # a slice is a ModuleList
            x = stage(x + skip)
        logits: Tensor = self.final_conv(self.final_up(x).permute(0, 3, 1, 2))
        return logits


class VMUNet(nn.Module):
    """VM-UNet for images ``(B, C, H, W)`` of any size; logits ``(B, K, H, W)``.

    The sides are padded to multiples of 32 inside, by repeating the border, and the logits are cropped. There is no
    deep supervision. Where a trainer asks for it (``decoder.deep_supervision``), the second output is the logits at
    half resolution: nnU-Net gives the coarsest output the weight 0.

    Args:
        input_channels, num_classes: C and K.
        widths: of the four stages, multiples of 4; each twice the one before in the paper.
        depths, depths_up: blocks of each stage, encoder and decoder, the decoder's coarsest first.
        drop_path: of the encoder's last and the decoder's first block; it grows and falls linearly.
        strides: read by nnU-Net from the plans, for its deep-supervision resolutions.
        deep_supervision: see above.

    Raises:
        ValueError: no scan is installed, or lists that are not of four.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        widths: Sequence[int] = WIDTHS,
        depths: Sequence[int] = DEPTHS,
        depths_up: Sequence[int] = DEPTHS_UP,
        drop_path: float = 0.2,
        strides: Sequence[Sequence[int]] = STRIDES,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        require_scan()
        if {len(widths), len(depths), len(depths_up)} != {4} or any(w < 4 or w % 4 for w in widths):
            raise ValueError(
                f"VM-UNet has four stages, whose widths are multiples of 4; got widths {list(widths)}, depths "
                f"{list(depths)} and depths_up {list(depths_up)}"
            )
        drops = torch.linspace(0, drop_path, sum(depths)).split(list(depths))
        drops_up = torch.linspace(drop_path, 0, sum(depths_up)).split(list(depths_up))
        self.encoder = _Encoder(input_channels, widths, [d.tolist() for d in drops])
        self.decoder = _Decoder(widths, num_classes, [d.tolist() for d in drops_up], deep_supervision)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, see the class."""
        height, width = x.shape[2:]
        pad = [-n % DIVISOR for n in (width, height)]
        if any(pad):
            x = functional.pad(x, (0, pad[0], 0, pad[1]), mode="replicate")
        logits = self.decoder(self.encoder(x))[..., :height, :width].contiguous()
        if not self.decoder.deep_supervision:
            return logits
        size = [round(n / 2) for n in (height, width)]
        return [logits, functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)]
