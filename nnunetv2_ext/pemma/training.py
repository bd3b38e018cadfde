"""Training of PEMMA: adapters for a new channel beside a finished model, whose weights never change."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nnunetv2_ext.core.checkpoint import first_difference, read, unwrap
from nnunetv2_ext.core.compat import pretrained_weights_file
from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.core.resolve import Resolved
from nnunetv2_ext.core.step import Batch, Passes
from nnunetv2_ext.core.trainer_settings import method_settings_in
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.parts.epoch_means import EpochMeans
from nnunetv2_ext.parts.trainer import MethodTrainer
from nnunetv2_ext.pemma.base import Base, checkpoint_of, misfit, read_base
from nnunetv2_ext.pemma.missing import KeepMissing
from nnunetv2_ext.pemma.network import PEMMANetwork, is_present
from nnunetv2_ext.pemma.panel import draw_panel
from nnunetv2_ext.pemma.settings import PEMMASettings

NAME, BASE, ADAPTERS = "pemma", "base.", "adapters."
_NO_BASE = (
    'pemma.base is not set: name the finished model of the old channels, nnUNet_ext_settings="pemma.base=MODEL_FOLDER"'
)


class PEMMATraining(MethodTrainer):
    """nnU-Net's loss, augmentation and schedule; the network is a frozen base with adapters, which alone learn."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {NAME: PEMMASettings}
    default_settings: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw",
        "initial_lr": 1e-3,
        "weight_decay": 1e-4,
        "num_epochs": 200,
    }

    _base_facts: dict[str, Any]  # where the base came from -> initialize, or the checkpoint

    @property
    def pemma(self) -> PEMMASettings:
        """This method's settings."""
        return self.settings.pemma  # the block settings_model added

    @property
    def old_channels(self) -> int:
        """C0."""
        assert self.pemma.base_channels is not None  # after initialize
        return self.pemma.base_channels

    @classmethod
    def build_network_architecture(  # type: ignore[override]  # a class method, so that super() works; called the same way
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network of the old channels, with adapters. The predictor calls it with nothing but the plans.

        Raises:
            ValueError: plans without this package's block, or a network that adapters do not fit.
        """
        settings = method_settings_in(plans_manager.plans, NAME, PEMMASettings)
        if settings.base_channels is None:
            raise ValueError(_NO_BASE)
        old = settings.base_channels
        base = super().build_network_architecture(
            plans_manager, configuration_manager, old, num_output_channels, enable_deep_supervision
        )
        return PEMMANetwork(base, settings, old, num_input_channels - old)

    # ---- the start
    def initialize(self) -> None:
        """nnU-Net's, with the base's weights and those of ``pemma.start_from``; with ``--c`` the checkpoint has both.

        Raises:
            ValueError: a cascade, no base or one that does not fit, or a setting that would change the base.
        """
        self._figures, base = EpochMeans(), None
        self._require_frozen()
        if not self._takes_weights_of_checkpoint:
            base = self._read_base()
        super().initialize()
        if base is not None:
            network: Any = unwrap(self.network)
            network.base.load_state_dict(base.weights)
            self._base_facts = {"base": str(base.file), "base_sha256": base.sha256, "base_trainer": base.trainer}
            if self.pemma.start_from is not None:
                self._start_from(Path(self.pemma.start_from))

    def _require_frozen(self) -> None:
        s: Any = self.settings
        if self.is_cascaded:
            raise ValueError(
                f"{self.configuration_name} is the second stage of a cascade, whose channels of the first stage would "
                "stand between the old and the new ones: adapt 3d_fullres or 2d"
            )
        for key, changed in (
            ("init_from", s.init_from is not None),
            ("encoder_lr_factor", s.encoder_lr_factor != 1),
            ("freeze_encoder_epochs", s.freeze_encoder_epochs > 0),
        ):
            if changed:
                raise ValueError(
                    f"{key}={getattr(s, key)} is about weights of the base, which PEMMA takes from pemma.base and "
                    f"never changes: unset {key}"
                )
        if pretrained_weights_file():
            raise ValueError(
                "-pretrained_weights and pemma.base both say which weights to start from: leave the first one out"
            )

    def _read_base(self) -> Base:
        if self.pemma.base is None:
            raise ValueError(_NO_BASE)
        base = read_base(Path(self.pemma.base), self.fold)
        plans, configuration = self.plans_manager.plans, self.configuration_manager.configuration
        if difference := misfit(base, plans, configuration, self.dataset_json):
            raise ValueError(
                f"pemma.base={base.file} does not fit these plans: {difference}. `nnUNetv2_ext add-channel prepare "
                f"-d {self.plans_manager.dataset_name[7:10]} -base {self.pemma.base}` writes plans that fit, or says "
                "why not"
            )
        number = len(base.channels)
        if self.pemma.base_channels not in (None, number):
            raise ValueError(
                f"pemma.base_channels={self.pemma.base_channels}, and the base has {number} channels: unset it"
            )
        block = self.pemma.model_copy(update={"base_channels": number})
        self._apply_settings(Resolved(self.settings.model_copy(update={NAME: block}), self.resolved.sources))
        return base

    def _start_from(self, path: Path) -> None:
        file = checkpoint_of(path, self.fold, "pemma.start_from")
        if file.resolve().parent == Path(self.output_folder).resolve():
            raise ValueError(
                f"pemma.start_from={file} is a checkpoint of the very training that starts here, which will move it "
                "away: copy it to another folder, or continue the training with --c and without pemma.start_from"
            )
        theirs, network = read(file)["network_weights"], unwrap(self.network)
        ours = network.state_dict()
        if difference := first_difference(ours, theirs):
            name, here, there = difference
            raise ValueError(
                f"pemma.start_from={file} has other adapters: {name} is {there} there and {here} here. Use the "
                "settings it was trained with (rank, stem, train_heads), or unset it"
            )
        if other := next((n for n in ours if n.startswith(BASE) and not torch.equal(ours[n], theirs[n])), None):
            raise ValueError(
                f"pemma.start_from={file} was trained on another base (first at {other}): give the base it was "
                "trained on as pemma.base, or unset pemma.start_from"
            )
        network.load_state_dict(theirs)

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> tuple[torch.optim.Optimizer, Any]:
        """The house's, over the adapters alone: weight decay would move a base that gets no gradient."""
        optimizer, scheduler = super().configure_optimizers(*args, **kwargs)
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        return optimizer, scheduler

    def on_train_start(self) -> None:
        """nnU-Net's; ``pemma.json`` says what was adapted, and how much of it learns."""
        if not self.was_initialized:
            fingerprint = Path(self.preprocessed_dataset_folder_base) / "dataset_fingerprint.json"
            if not fingerprint.is_file():  # nnU-Net's planning leaves it, and add-channel takes the base's plans
                number = self.plans_manager.dataset_name[7:10]
                raise ValueError(f"{fingerprint} is missing: run nnUNetv2_extract_fingerprint -d {number}")
            self.initialize()  # before the settings are compared with other folds': it finds the number of channels
        super().on_train_start()
        network: Any = unwrap(self.network)
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        total = sum(p.numel() for p in network.base.parameters())
        names = channel_names(self.dataset_json)
        old, new = names[: self.old_channels], names[self.old_channels :]
        self.print_to_log_file(
            f"PEMMA: {', '.join(new)} beside {', '.join(old)}; {trainable:,} values learn beside {total:,} of the "
            f"base, which stay ({100 * trainable / total:.1f} %)"
        )
        if self.local_rank == 0:
            facts = {"old_channels": old, "new_channels": new, "trainable": trainable, "of_base": total}
            content = self._base_facts | facts | {"share": trainable / total}
            atomic_write_text(Path(self.output_folder) / "pemma.json", json.dumps(content, indent=2) + "\n")

    # ---- data
    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's; raises ValueError if no training case has the new channels."""
        train, validation = super().get_tr_and_val_datasets()
        if not any(np.any(np.asarray(train.load_case(case)[0][self.old_channels :])) for case in train.identifiers):
            new = ", ".join(channel_names(self.dataset_json)[self.old_channels :])
            raise ValueError(
                f"{new} is missing (all zeros) in each of the {len(train.identifiers)} training cases of fold "
                f"{self.fold}: there is nothing to train; add its images and preprocess again"
            )
        return train, validation

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> Any:
        """The house's; new channels that are missing stay zero through them."""
        return KeepMissing(super().get_training_transforms(*args, **kwargs), self.old_channels)

    def on_device(self, batch: dict) -> Batch:
        """The house's; new channels that are missing stay zero through what it does there."""
        present = is_present(torch.as_tensor(batch["data"])[:, self.old_channels :])
        found = super().on_device(batch)
        self._figures.add("pemma/present", present.float().mean())
        return self._without_new(found, ~present)

    def _without_new(self, batch: Batch, rows: Tensor) -> Batch:
        if not bool(rows.any()):
            return batch
        data = batch.data.clone()
        data[rows.to(data.device), self.old_channels :] = 0
        return batch.with_data(data)

    def loss_passes(self, batch: Batch) -> Passes:
        """nnU-Net's; with ``pemma.channel_dropout`` some samples lose their new channels, behind the augmentation."""
        share = self.pemma.channel_dropout
        if share:
            rows = torch.rand(len(batch.data), generator=self.generator, device=self.device) < share
            batch = self._without_new(batch, rows)
        return super().loss_passes(batch)

    # ---- what is told and kept
    def epoch_figures(self) -> dict[str, float]:
        """Share of the training samples that had the new channels."""
        return super().epoch_figures() | self._figures.read()

    def draw_panel(self, path: Path) -> None:
        """The last batch: what the base says, what the adapted network says, and where they differ."""
        if self.last_batch is not None:
            draw_panel(self, self.on_device(self.last_batch), path)

    def method_state(self) -> dict[str, Any]:
        """Which base it was, and the unfinished epoch's figures."""
        return super().method_state() | {NAME: {**self._base_facts, "figures": self._figures.state_dict()}}

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        state = dict(states.get(NAME) or {})
        self._figures.load_state_dict(state.pop("figures", {}), self.device)
        self._base_facts = state

    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """``base``: the finished model as it was, byte for byte.

        Raises:
            ValueError: other weights, which plain nnU-Net could not load.
        """
        if weights != "base":
            raise ValueError(
                f"plain nnU-Net could not load the adapters of {cls.__name__}: add --weights base, which is the model "
                "of the old channels, or --merged, which needs this package"
            )
        return {n.removeprefix(BASE): v for n, v in checkpoint["network_weights"].items() if n.startswith(BASE)}
