"""Training of Mamba-Sea: a branch that sees brightened images, and one whose features get other statistics."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term, top_resolution
from nnunetv2_ext.mambasea.gva import GVA
from nnunetv2_ext.mambasea.lsa import LSA
from nnunetv2_ext.mambasea.panel import draw_panel
from nnunetv2_ext.mambasea.settings import MambaSeaSettings
from nnunetv2_ext.mambasea.vmunet import SS2D, VMUNet
from nnunetv2_ext.mambasea.weights import load_vmamba
from nnunetv2_ext.parts.epoch_means import EpochMeans
from nnunetv2_ext.parts.forward_hooks import register_forward_hook
from nnunetv2_ext.parts.trainer import MethodTrainer

NAME, GVA_MODULE, BRANCH = "mambasea", "mambasea_gva", "mambasea_branch"


class MambaSeaTraining(MethodTrainer):
    """LSA in the network, GVA in front of a second branch, and a consistency between both; prediction is the plan's."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {NAME: MambaSeaSettings}

    _lsa: Mapping[str, LSA] = {}
    _branch_logits: Tensor | None = None  # of the step's first pass, (B, heads, *S)

    @property
    def mambasea(self) -> MambaSeaSettings:
        """This method's settings."""
        return self.settings.mambasea  # type: ignore[attr-defined]  # the block settings_model added

    def build_training_modules(self) -> dict[str, nn.Module]:
        """GVA, and the second network."""
        modules, s = super().build_training_modules(), self.mambasea
        if s.gva:
            dim = len(self.configuration_manager.patch_size)
            modules[GVA_MODULE] = GVA(self._image_channels, dim, s.tau, s.gva)
            if s.branch == "own":
                modules[BRANCH] = copy.deepcopy(unwrap(self.network))
        return modules

    @property
    def _image_channels(self) -> int:
        return len(self.configuration_manager.normalization_schemes)  # those of a previous stage follow

    def initialize(self) -> None:
        """nnU-Net's; then VMamba's weights, and LSA behind each stage of the encoder or in each scan of VM-UNet.

        Raises:
            ValueError: weights for another network than VM-UNet, or that do not fit; no encoder with stages for LSA.
        """
        self._figures = EpochMeans()
        super().initialize()
        network, s = unwrap(self.network), self.mambasea
        if s.weights is not None:
            if not isinstance(network, VMUNet):
                raise ValueError(
                    f"mambasea.weights={s.weights} are for the network vmunet, and these plans have "
                    f"{type(network).__name__}: unset it, or plan with nnUNetv2_ext plan-network -network vmunet"
                )
            if not self._takes_weights_of_checkpoint:
                if self.settings.init_from is not None:  # type: ignore[attr-defined]  # common_settings
                    raise ValueError(
                        "init_from and mambasea.weights both say which weights to start from; give one of the two"
                    )
                table = load_vmamba(network, Path(s.weights).expanduser())
                self.print_to_log_file(f"mambasea.weights={s.weights}: {table}", add_timestamp=False)
        elif isinstance(network, VMUNet):
            self.print_to_log_file(
                "NOTE: mambasea.weights is not set: VM-UNet starts from random weights, and results will not match the "
                "paper's"
            )
        branch = self.training_modules.get(BRANCH)
        if branch is not None:
            branch.load_state_dict(network.state_dict())
        if s.lsa:
            self._lsa = self._with_lsa(network)
            if self.batch_size < 2:
                self.print_to_log_file("NOTE: batches of one sample: LSA changes nothing in the first step")

    def _with_lsa(self, network: nn.Module) -> dict[str, LSA]:
        found: dict[str, LSA] = {}
        stages = getattr(getattr(network, "encoder", None), "stages", None)
        if isinstance(network, VMUNet):
            for name, module in network.named_modules():
                if isinstance(module, SS2D):
                    found[name] = module.augment = LSA(self.generator, self.mambasea.lsa_share)
        elif isinstance(stages, (nn.Sequential, nn.ModuleList)):
            for number, stage in enumerate(stages):
                found[str(number)] = LSA(self.generator, self.mambasea.lsa_share)
                register_forward_hook(stage, found[str(number)].hook)
        else:
            raise ValueError(
                f"LSA goes behind the stages of an encoder, and {type(network).__name__} has no encoder.stages: set "
                "mambasea.lsa=0, or train nnU-Net's own network or vmunet"
            )
        return found

    # ---- one step ----------------------------------------------------------------------------------------------------
    def loss_passes(self, batch: Batch) -> Passes:
        """The branch behind GVA, then nnU-Net's pass with LSA; the mean of both, and their consistency."""
        passes, s = super().loss_passes(batch), self.mambasea
        if not s.lsa and not s.gva:
            return passes
        passes = passes.replaced("supervised", LossPass("supervised", lambda: self._supervised_terms(batch)))
        if not s.gva:
            return passes
        return passes.before("supervised", LossPass(NAME, lambda: self._branch_terms(batch)))

    def _branch_terms(self, batch: Batch) -> dict[str, Term]:
        draw = torch.rand(len(batch.data), generator=self.generator, device=self.device)
        images, rest = batch.data[:, : self._image_channels], batch.data[:, self._image_channels :]
        seen, brightened = self.training_modules[GVA_MODULE](images, draw)
        self._figures.add(f"{NAME}/brightened", brightened.float().mean())
        output = self.forward(batch.with_data(torch.cat((seen, rest), 1)), self.training_modules.get(BRANCH))
        self._branch_logits = top_resolution(output).detach()
        return {"mambasea_branch": Term(self.loss(output, batch.target), 0.5)}

    def _supervised_terms(self, batch: Batch) -> dict[str, Term]:
        with self._lsa_for_this_step():
            output = self.forward(batch)
        other, self._branch_logits = self._branch_logits, None
        loss = self.loss(output, batch.target)
        if other is None:
            return {"supervised": Term(loss)}
        difference = functional.mse_loss(top_resolution(output).float(), other.float())
        return {
            "supervised": Term(loss, 0.5),
            "mambasea_consistency": Term(difference, self.mambasea.consistency),
        }

    @contextmanager
    def _lsa_for_this_step(self) -> Iterator[None]:
        """LSA is on in this pass alone, in a share of the steps: never in pictures, teachers or validation."""
        on = bool(torch.rand(1, generator=self.generator, device=self.device) < self.mambasea.lsa)
        for lsa in self._lsa.values():
            lsa.active = on
        try:
            yield
        finally:
            for lsa in self._lsa.values():
                lsa.active = False

    # ---- log, picture, checkpoints -----------------------------------------------------------------------------------
    def epoch_figures(self) -> dict[str, float]:
        """Share of samples that GVA brightened."""
        return super().epoch_figures() | self._figures.read()

    def draw_panel(self, path: Path) -> None:
        """Patches of the last batch as both branches see them."""
        if self.last_batch is not None and self.mambasea.gva:
            title = f"{self.picture_title}, epoch {self.current_epoch - 1}"
            gva: Any = self.training_modules[GVA_MODULE]
            draw_panel(self.on_device(self.last_batch), gva, self.mambasea, path, title)

    def method_state(self) -> dict[str, Any]:
        """Adds LSA's running spread."""
        state = super().method_state()
        if self._lsa:
            spread = {name: lsa.spread.state_dict() for name, lsa in self._lsa.items()}
            state[NAME] = {"spread": spread, "figures": self._figures.state_dict()}
        return state

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        mine = states.get(NAME)
        if mine is not None:
            self._figures.load_state_dict(mine["figures"], self.device)
            for name, lsa in self._lsa.items():
                lsa.spread.load_state_dict(mine["spread"][name], self.device)
