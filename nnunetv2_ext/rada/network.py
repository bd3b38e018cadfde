"""Three networks of the plans side by side, and the bank of class vectors they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunetv2_ext.parts.resizing import ResizableLinear
from nnunetv2_ext.rada.member import Member, MemberOutput
from nnunetv2_ext.rada.requirements import require_volumes
from nnunetv2_ext.rada.semantics.align import alignment_loss
from nnunetv2_ext.rada.semantics.bank import NUM_AXES, SemanticBank, own_or_bank
from nnunetv2_ext.rada.semantics.head import EMBEDDING_DIM
from nnunetv2_ext.rada.settings import RADASettings


class _Decoders:
    """What nnU-Net switches deep supervision at: `network.decoder.deep_supervision`."""

    def __init__(self, net: RADANet) -> None:
        self._net = net

    @property
    def deep_supervision(self) -> bool:
        return self._net.members[0].network.decoder.deep_supervision  # type: ignore[return-value, union-attr]

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        self._net.set_deep_supervision(enabled)


class RADANet(nn.Module):
    """One or three networks and the bank of class vectors; called, it predicts.

    Args:
        networks: of one architecture, with different weights.
        semantics: see `Member`.
        infer: `mean` of the logits, or the index of the only network that predicts.
        dimension: D, of the class vectors.

    Attributes:
        members: the networks with what belongs to each.
        bank: `image`, `text` and `views`; buffers, which take the size of what is loaded.
        infer: as given.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        semantics: str = "off",
        infer: Literal["mean"] | int = "mean",
        dimension: int = EMBEDDING_DIM,
    ) -> None:
        super().__init__()
        num_classes: int = networks[0].decoder.seg_layers[-1].out_channels  # type: ignore[union-attr, index, assignment]
        self.semantics = semantics
        self.infer = infer
        # until the trainer says which axes there are, or a checkpoint does
        axes = ((0, 1, 2),) if len(networks) == 1 else ((0, 1), (0, 2), (1, 2))
        self.bank = SemanticBank(num_classes, dimension if semantics == "clip" else 0, axes)
        self.members = nn.ModuleList(
            [Member(network, semantics, self.bank, k, dimension) for k, network in enumerate(networks)]
        )

    @property
    def decoder(self) -> Any:
        """For nnU-Net, which sets its `deep_supervision`."""
        return _Decoders(self)

    @property
    def buffers_of_any_size(self) -> frozenset[str]:
        """Names of weights that take the size of what is loaded into them: all that depends on D."""
        resizable = [(path, m) for path, m in self.named_modules() if isinstance(m, ResizableLinear)]
        names = {f"{path}.{name}" for path, module in resizable for name, _ in module.named_parameters()}
        return frozenset(names | {"bank.image", "bank.text"})

    @property
    def stock_prefixes(self) -> tuple[str, ...]:
        """Where nnU-Net's own networks sit (see parts/start.py)."""
        return tuple(f"members.{k}.network." for k in range(len(self.members)))

    def member(self, k: int) -> Member:
        """Network k, from 0."""
        return self.members[k]  # type: ignore[return-value]

    def forward_member(self, k: int, data: Tensor, vectors: Tensor | None = None) -> MemberOutput:
        """What network k computes; see `Member.forward`."""
        if vectors is None and self.semantics == "clip":
            # looked up here: inside, torch.compile would make a graph for each network and reach its limit of eight
            vectors = self.bank.in_view(k)[None]
        return self.members[k](data, vectors)

    def forward(self, data: Tensor) -> Tensor:
        """Full-resolution logits `(B, C, *S)`, the mean of all networks or those of one, as `infer` says.

        The tensor is new and may be written to.
        """
        if self.infer != "mean":
            return self.forward_member(self.infer, data).full_resolution
        total = self.forward_member(0, data).full_resolution
        for k in range(1, len(self.members)):
            total = total + self.forward_member(k, data).full_resolution
        return total / len(self.members)

    def set_deep_supervision(self, enabled: bool) -> None:
        """Whether each network returns logits of all resolutions or of the highest only."""
        for member in self.members:
            member.network.decoder.deep_supervision = enabled  # type: ignore[union-attr]

    def freeze_unused_segmentation_layers(self, mode: Literal["pool", "off"]) -> None:
        """Take the gradient from segmentation layers without a loss: DDP would wait for it.

        Args:
            mode: `pool`: the lowest, whose weight is 0; `off`: all but the highest.
        """
        for member in self.members:
            layers: Any = member.network.decoder.seg_layers  # type: ignore[union-attr]  # lowest resolution first
            unused = list(layers)[:-1] if mode == "off" else list(layers)[:-1][:1]
            for layer in layers:
                layer.requires_grad_(not any(layer is other for other in unused))

    def set_bank(self, image: Tensor, text: Tensor) -> None:
        """Fill the bank; vectors of another dimension than so far start the layers that read them anew.

        Args:
            image: R, `(3, C, D)`.
            text: U, `(C, D)`.

        Raises:
            ValueError: vectors that are not finite.
        """
        self.bank.set(image, text)
        for k in range(len(self.members)):
            member = self.member(k)
            assert member.head is not None and member.projection is not None
            member.head.resize(text.shape[-1])
            member.projection.resize(text.shape[-1])

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

        Args:
            features, label, bits, tau, min_voxels: see there.
            own: vectors of the samples and which are valid, needed for `clip`.

        Returns:
            None if no class has enough voxels on a plane in view.
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
        return alignment_loss(
            features,
            label,
            bits,
            self.bank.view_axes[k],
            vectors,
            valid,
            text,
            member.projection,
            tau,
            min_voxels,
            bank,
        )


def build_rada_network(
    plans_manager: Any,
    configuration_manager: Any,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool,
    settings: RADASettings,
    dimension: int = EMBEDDING_DIM,
) -> RADANet:
    """The networks of the plans, initialised one after the other, then their heads.

    So the first network starts with the weights that a plain nnU-Net gets from the same random state.

    Args:
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision: as of
            nnUNetTrainer.build_network_architecture.
        settings: `num_networks`, `semantics` and `infer` matter.
        dimension: D, of the class vectors; loading weights changes it to theirs.

    Raises:
        ValueError: a 2-D configuration, or a network without encoder and U-Net decoder.
    """
    require_volumes(configuration_manager.patch_size)
    networks = [
        get_network_from_plans(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )
        for _ in range(settings.num_networks)
    ]
    infer = settings.single_network
    return RADANet(networks, settings.semantics, "mean" if infer is None else infer, dimension)
