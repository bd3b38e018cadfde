"""Three networks of the plans side by side, and the bank of class vectors they share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunetv2_ext.parts.resizing import ResizableLinear
from nnunetv2_ext.rada.member import Member, MemberOutput
from nnunetv2_ext.rada.requirements import require_volumes
from nnunetv2_ext.rada.semantics.align import alignment_loss
from nnunetv2_ext.rada.semantics.bank import NUM_AXES, SemanticBank, own_or_bank
from nnunetv2_ext.rada.semantics.head import EMBEDDING_DIM, SemanticHead
from nnunetv2_ext.rada.settings import RADASettings


class RADANet(nn.Module):
    """One or three networks and the bank of class vectors; called, it predicts.

    Args:
        networks: of one architecture, with different weights.
        semantics: see `Member`.
        infer: index of the only network that predicts; None: the mean of all logits.
        dimension: D, of the class vectors.
    """

    def __init__(
        self, networks: Sequence[nn.Module], semantics: str, infer: int | None, dimension: int = EMBEDDING_DIM
    ) -> None:
        super().__init__()
        num_classes: int = networks[0].decoder.seg_layers[-1].out_channels  # type: ignore[union-attr, index, assignment]
        self.semantics = semantics
        self.infer = infer
        # until the trainer says which axes there are, or a checkpoint does
        axes = ((0, 1, 2),) if len(networks) == 1 else ((0, 1), (0, 2), (1, 2))
        self.bank = SemanticBank(num_classes, dimension if semantics == "clip" else 0, axes)
        members = [Member(network, semantics, dimension) for network in networks]
        self.members = nn.ModuleList(members)

    @property
    def decoder(self) -> RADANet:
        """Itself, for nnU-Net, which sets `network.decoder.deep_supervision`."""
        return self

    @property
    def deep_supervision(self) -> bool:
        """Whether each network returns logits of all resolutions or of the highest only."""
        return self.member(0).decoder.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        for k in range(len(self.members)):
            self.member(k).decoder.deep_supervision = enabled

    @property
    def heads(self) -> list[SemanticHead]:
        """Of the networks in their order; empty without semantics."""
        found = (self.member(k).head for k in range(len(self.members)))
        return [head for head in found if head is not None]

    @property
    def buffers_of_any_size(self) -> frozenset[str]:
        """Names of weights that take the size of what is loaded into them: all that depends on D."""
        resizable = [(path, m) for path, m in self.named_modules() if isinstance(m, ResizableLinear)]
        names = {f"{path}.{name}" for path, module in resizable for name, _ in module.named_parameters()}
        return frozenset(names | {"bank.image", "bank.text"})

    @property
    def stock_prefixes(self) -> tuple[str, ...]:
        """Where nnU-Net's own networks sit (see parts/start/)."""
        return tuple(f"members.{k}.network." for k in range(len(self.members)))

    def member(self, k: int) -> Member:
        """Network k, from 0."""
        return self.members[k]  # type: ignore[return-value]

    def forward_member(self, k: int, data: Tensor, vectors: Tensor | None = None) -> MemberOutput:
        """What network k computes of `data`, `(B, channels, *S)`.

        For `clip`, `vectors` are the image vectors `(B, C, D)` the samples are conditioned on (see `conditioning`);
        None: the bank's.
        """
        if self.semantics != "clip":
            return self.members[k](data)
        # looked up here: inside, torch.compile would make a graph for each network and reach its limit of eight
        return self.members[k](data, (self.bank.text, self.bank.in_view(k)[None] if vectors is None else vectors))

    def forward(self, data: Tensor) -> Tensor:
        """Full-resolution logits `(B, C, *S)`, the mean of all networks or those of one, as `infer` says.

        The tensor is new and may be written to.
        """
        if self.infer is not None:
            return self.forward_member(self.infer, data).full_resolution
        logits = (self.forward_member(k, data).full_resolution for k in range(len(self.members)))
        return reduce(torch.add, logits) / len(self.members)

    def set_bank(self, image: Tensor, text: Tensor) -> None:
        """Fill the bank with R, `(3, C, D)`, and U, `(C, D)`; ValueError if they are not finite.

        Vectors of another dimension than so far start the layers that read them anew.
        """
        before, now = self.bank.text.shape[-1], text.shape[-1]
        self.bank.set(image, text)
        for module in self.modules():
            if isinstance(module, ResizableLinear):
                size = module.in_features if module.free == "in" else module.out_features
                module.resize(size // before * now)

    def conditioning(self, k: int, vectors: Tensor, valid: Tensor, use_own: Tensor) -> Tensor:
        """What network k is conditioned on, `(B, C, D)`, for `forward_member`; see `own_or_bank`."""
        return own_or_bank(vectors, valid, self.bank.image, self.bank.view_axes[k], use_own)

    def alignment_loss(
        self,
        k: int,
        features: Tensor,
        label: Tensor,
        bits: Tensor,
        own: tuple[Tensor, Tensor] | None = None,
        tau: float = 0.07,
        min_voxels: int = 32,
    ) -> Tensor | None:
        """`align.alignment_loss` of network k with its projection, and the bank or its tokens.

        Args as there; `own`: vectors of the samples and which are valid, needed for `clip`.
        """
        member = self.member(k)
        assert member.projection is not None
        if member.tokens is not None:
            text = member.unit_tokens()
            bank = text[None].expand(NUM_AXES, -1, -1)
            vectors = bank[None].expand(len(features), -1, -1, -1)
            valid = torch.ones(vectors.shape[:3], dtype=torch.bool, device=features.device)
        else:
            text, bank = self.bank.text, self.bank.image
            assert own is not None
            vectors, valid = own
        axes, projection = self.bank.view_axes[k], member.projection
        return alignment_loss(features, label, bits, axes, vectors, valid, text, projection, tau, min_voxels, bank)


def build_rada_network(
    configuration_manager: Any,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool,
    settings: RADASettings,
    dimension: int = EMBEDDING_DIM,
) -> RADANet:
    """The networks of the plans, initialised one after the other, then their heads.

    So the first network starts with the weights that a plain nnU-Net gets from the same random state. Arguments are
    those of nnUNetTrainer.build_network_architecture; loading weights changes `dimension`, D, to theirs.

    Raises:
        ValueError: a 2-D configuration, or a network without encoder and U-Net decoder.
    """
    require_volumes(configuration_manager.patch_size)
    c = configuration_manager
    of_plans = c.network_arch_class_name, c.network_arch_init_kwargs, c.network_arch_init_kwargs_req_import
    options = {"allow_init": True, "deep_supervision": enable_deep_supervision}
    networks = [
        get_network_from_plans(*of_plans, num_input_channels, num_output_channels, **options)
        for _ in range(settings.num_networks)
    ]
    return RADANet(networks, settings.semantics, settings.single_network, dimension)
