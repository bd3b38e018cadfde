"""Meeting point A: class vectors and the bottleneck condition the last decoder feature.

The parts are those of this line of work (Liu et al., "CLIP-Driven Universal Model", https://arxiv.org/abs/2301.00785;
SGTC, https://arxiv.org/abs/2412.15526), written from their description. Joining an image vector with the text vector,
and the gate, are ours.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nnunetv2_ext.parts.resizing import ResizableLinear

EMBEDDING_DIM = 512  # of CLIP's ViT-B, and of learned tokens
GATE_BOUND = 1.0  # of the gate's absolute value; ours: without it one training with learned vectors ended at 35
ADAPTER_WIDTH, CONTEXT_WIDTH, MAP_CHANNELS, MAX_GROUPS = 128, 256, 8, 16
# Class vectors of length 1 are scaled to sqrt(D), so that their entries have variance 1. Share of the generated weights
# that differs between classes, 4 classes, D = 512, cosine 0.8 between their vectors [measured]: 0.04 % at length 1 with
# torch's default initialisation (all classes get one head), 0.9 % scaled, 31 % scaled and with He's initialisation.
# weights and biases of a generated head 8-8-1, in this order
HEAD_SIZES = (MAP_CHANNELS**2, MAP_CHANNELS, MAP_CHANNELS**2, MAP_CHANNELS, MAP_CHANNELS, 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels), channels)


def _controller(outputs: int) -> nn.Sequential:
    """With He's initialisation: with torch's default the class vectors are lost on the way, see above."""
    widths = (2 * CONTEXT_WIDTH, 256, 128, 64, outputs)
    linear = [nn.Linear(*pair) for pair in pairwise(widths)]
    for layer in linear:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is linear[-1] else "relu")
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*[module for layer in linear for module in (layer, nn.ReLU())][:-1])


class Adapter(nn.Module):
    """D to 128 to D without bias, each followed by ReLU."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.down = ResizableLinear(dimension, ADAPTER_WIDTH, bias=False, free="in")
        self.up = ResizableLinear(ADAPTER_WIDTH, dimension, bias=False, free="out")

    def forward(self, vectors: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return F.relu(self.up(F.relu(self.down(vectors))))


class SemanticHead(nn.Module):
    """Adds `gate` times a semantic map to the logits.

    z(c) = ReLU(W [A_text(u(c)), A_image(r(c))]), g = Conv(mean(ReLU(norm(bottleneck)))). A controller turns [g, z(c)]
    into the weights of a head 8-8-1 for each foreground class. The head reads an 8-channel map of the last decoder
    feature.
    Binary: into an 8-vector added to that map, which one layer turns into both classes' logits.

    The gate starts at 0: the logits are then exactly those given, and the gate already gets a gradient. `bound_gate`
    keeps it small; here it counts as it is, so that a model predicts what it was trained to.

    Args:
        num_classes: C, with background.
        bottleneck_channels: of the encoder's last stage.
        feature_channels: F, of the last decoder feature.
        conv_op: the network's convolution class.
        dimension: D, of the class vectors.
    """

    def __init__(
        self,
        num_classes: int,
        bottleneck_channels: int,
        feature_channels: int,
        conv_op: type[nn.Module],
        dimension: int = EMBEDDING_DIM,
    ) -> None:
        super().__init__()
        self.is_binary = num_classes == 2
        self.text_adapter, self.image_adapter = Adapter(dimension), Adapter(dimension)
        self.merge = ResizableLinear(2 * dimension, CONTEXT_WIDTH, free="in")
        self.context_norm = _norm(bottleneck_channels)
        self.context = nn.Linear(bottleneck_channels, CONTEXT_WIDTH)
        self.controller = _controller(MAP_CHANNELS if self.is_binary else sum(HEAD_SIZES))
        self.reduction_norm = _norm(feature_channels)
        self.reduction = conv_op(feature_channels, MAP_CHANNELS, 1)
        if self.is_binary:
            self.classifier = conv_op(MAP_CHANNELS, num_classes, 1)
        self.gate = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def bound_gate(self) -> None:
        """Back to -`GATE_BOUND` to `GATE_BOUND`, after a step of the optimiser."""
        self.gate.clamp_(-GATE_BOUND, GATE_BOUND)

    def forward(self, logits: Tensor, features: Tensor, bottleneck: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """Logits with semantics, of the type of those given.

        Args:
            logits: `(B, C, *S)`.
            features: last decoder feature `(B, F, *S)`.
            bottleneck: `(B, F_b, *S_b)`.
            text: u, `(C, D)`, rows of length 1; row 0 is not used.
            image: r, `(B, C, D)` or `(1, C, D)`, rows of length 1 (0 where there is none); row 0 is not used.
        """
        weights = self.controlled(bottleneck, text, image)
        if torch.is_grad_enabled():
            # cheap to compute again, but its parts would be kept for backward at full resolution for every class
            semantic = checkpoint(self.semantic_map, features, weights, use_reentrant=False, preserve_rng_state=False)
        else:
            semantic = self.semantic_map(features, weights)
        return logits + (self.gate * semantic).to(logits.dtype)

    def controlled(self, bottleneck: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """What the controller generates, `(B, C - 1, n)` fp32; small, so it is always computed in full precision."""
        with torch.autocast(bottleneck.device.type, enabled=False):
            gain = math.sqrt(text.shape[1])  # see above
            image = gain * image[:, 1:].float()
            u = self.text_adapter(gain * text[1:].float()).expand(len(image), -1, -1)
            z = F.relu(self.merge(torch.cat((u, self.image_adapter(image)), -1)))
            g = self.context(F.relu(self.context_norm(bottleneck.float())).flatten(2).mean(2))
            z = z.expand(len(g), -1, -1)
            return self.controller(torch.cat((g[:, None].expand(-1, z.shape[1], -1), z), -1))

    def semantic_map(self, features: Tensor, weights: Tensor) -> Tensor:
        """`(B, C, *S)`, not yet gated; several classes: 0 for background.

        What overflows half precision becomes finite, or a gate of 0 would turn it into NaN.

        Args:
            features: `(B, F, *S)`.
            weights: as of `controlled`.
        """
        reduced = self.reduction(F.relu(self.reduction_norm(features)))
        if self.is_binary:
            shift = weights[:, 0].to(reduced.dtype)
            semantic = self.classifier(reduced + shift.view(*shift.shape, *[1] * (reduced.ndim - 2)))
        else:
            foreground = apply_heads(reduced.flatten(2), weights).unflatten(2, reduced.shape[2:])
            semantic = torch.cat((torch.zeros_like(foreground[:, :1]), foreground), 1)
        return torch.nan_to_num(semantic)


def apply_heads(reduced: Tensor, weights: Tensor) -> Tensor:
    """Generated heads 8-8-1 with ReLU between: `(B, K, N)`.

    Args:
        reduced: `(B, 8, N)`.
        weights: `(B, K, 153)`, three layers' weights and biases in the order of `HEAD_SIZES`.
    """
    B, K = weights.shape[:2]
    M = MAP_CHANNELS
    w1, b1, w2, b2, w3, b3 = weights.to(reduced.dtype).split(HEAD_SIZES, -1)
    x = F.relu(torch.baddbmm(b1.reshape(B, K * M, 1), w1.reshape(B, K * M, M), reduced))
    x = x.reshape(B * K, M, -1)  # each class goes on with its own eight channels
    x = F.relu(torch.baddbmm(b2.reshape(B * K, M, 1), w2.reshape(B * K, M, M), x))
    return torch.baddbmm(b3.reshape(B * K, 1, 1), w3.reshape(B * K, 1, M), x).reshape(B, K, -1)
