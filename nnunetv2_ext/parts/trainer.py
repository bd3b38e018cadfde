"""MethodTrainer: what a method subclasses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import distributed, nn

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.compat import pretrained_weights_file
from nnunetv2_ext.core.randomness import make_repeatable
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.data.channels import OF_CT, SCALED_BY_255, channel_names, hint_on_rgb
from nnunetv2_ext.data.derive import notices
from nnunetv2_ext.data.split import write_split_if_absent
from nnunetv2_ext.data.store import CaseStore
from nnunetv2_ext.data.subjects import divided, pairs_suggested, subjects_of_dataset
from nnunetv2_ext.parts.augmentation import VARIANTS, variant_geometry
from nnunetv2_ext.parts.encoder import encoders, hold_still, scale_rate
from nnunetv2_ext.parts.random_convolution import RandomConvolution, insert
from nnunetv2_ext.parts.schedule import ScaledPolyLR
from nnunetv2_ext.parts.settings import HouseSettings
from nnunetv2_ext.parts.start.source import read_source
from nnunetv2_ext.parts.start.start import Home, look_at, require_all_of
from nnunetv2_ext.parts.start.units import asked_by

_TWO_STARTS = "init_from and -pretrained_weights both say which weights to start from; give one of the two"


class MethodTrainer(ExtTrainer):
    """ExtTrainer with everything the house offers to every trainer above core.

    Attributes:
        case_store: state per case; a method that has some sets it in ``initialize`` by `new_case_store`. It is saved
            with every checkpoint, and ``--c`` takes what belongs to the checkpoint.
    """

    common_settings: ClassVar = HouseSettings

    case_store: CaseStore | None = None

    _gin: RandomConvolution | None = None  # its probability is shared with the loader's workers
    _takes_weights_of_checkpoint = False
    _started: list[int] | None = None  # versions of the weights after init_from was read
    _start_table: str | None = None  # what init_from loaded, for the checkpoints

    def initialize(self) -> None:
        """nnU-Net's, then the weights of ``init_from``: before a method copies them, on every rank.

        Raises:
            ValueError: the file cannot be used (see `parts.start.start`), or that of ``-pretrained_weights``.
        """
        super().initialize()
        s = self._house
        if self._takes_weights_of_checkpoint:
            if s.init_from is not None:
                self.print_to_log_file("init_from is not read again: the checkpoint has the weights.")
            return
        if given := pretrained_weights_file():
            if s.init_from is not None:
                raise ValueError(_TWO_STARTS)
            require_all_of(self.network, Path(given))
        if s.init_from is None:
            return
        path = Path(s.init_from).expanduser()
        own = Path(self.output_folder).resolve()
        if own in (path.resolve().parent, path.resolve()):
            raise ValueError(
                f"init_from={path} is a checkpoint of the very training that starts here, which will move it away: "
                "copy it to another folder, or continue the training with --c and without init_from"
            )
        home = Home(self.configuration_manager.configuration, self.dataset_json)
        source = read_source(path, s.init_trust)
        self._start_table = look_at(self.network, source, home, asked_by(s, self.is_cascaded)).apply()
        self.print_to_log_file(f"init_from={path}: {self._start_table}", add_timestamp=False)
        self._started = _versions(self.network)

    @property
    def _house(self) -> HouseSettings:
        return self.settings  # type: ignore[return-value]  # common_settings

    def method_state(self) -> dict[str, Any]:
        """The table of what ``init_from`` loaded, under its name."""
        return super().method_state() | ({} if self._start_table is None else {"init_from": self._start_table})

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart of `method_state`."""
        super().load_method_state(states)
        self._start_table = states.get("init_from")

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> tuple[torch.optim.Optimizer, Any]:
        """The base trainer's, or what the settings ask for: another optimiser, a warm-up, another rate of the encoder.

        Raises:
            ValueError: something is asked for, and the base trainer has a schedule of its own.
        """
        optimizer, scheduler = super().configure_optimizers(*args, **kwargs)
        s = self._house
        changes = s.optimizer is not None and type(optimizer).__name__.lower() != s.optimizer
        scaled, frozen = s.encoder_lr_factor != 1, s.freeze_encoder_epochs > 0
        if (changes or scaled or s.warmup_epochs) and type(scheduler) is not PolyLRScheduler:
            key = "optimizer" if changes else "encoder_lr_factor" if scaled else "warmup_epochs"
            raise ValueError(
                f"{key}={getattr(s, key)} goes with nnU-Net's polynomial schedule, and the base trainer has "
                f"{type(scheduler).__name__}: unset {key}"
            )
        if s.warmup_epochs and s.warmup_epochs >= self.num_epochs:
            raise ValueError(
                f"warmup_epochs={s.warmup_epochs} leaves nothing of num_epochs={self.num_epochs}: use fewer"
            )
        if changes:
            optimizer = self._other_optimizer(optimizer)
            scheduler = PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
        if scaled:
            scale_rate(optimizer, self.network, s.encoder_lr_factor)
        if scaled or s.warmup_epochs:
            scheduler = ScaledPolyLR(optimizer, self.initial_lr, self.num_epochs, s.warmup_epochs)
        if frozen:
            hold_still(optimizer, self.network, lambda: self.current_epoch < s.freeze_encoder_epochs)
        return optimizer, scheduler

    def _other_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        rest = {"lr": self.initial_lr, "weight_decay": self.weight_decay}
        groups: list[dict[str, Any]] = [
            {key: group[key] for key in ("params", "name") if key in group} for group in optimizer.param_groups
        ]
        if self._house.optimizer == "adamw":
            return torch.optim.AdamW(groups, **rest)
        return torch.optim.SGD(groups, **rest, momentum=0.99, nesterov=True)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """nnU-Net's, or that of the setting ``augmentation``; without mirroring if ``mirroring`` says so."""
        found = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        variant = self._house.augmentation
        if variant == "base":
            return found
        rotation, dummy_2d, initial_patch_size, mirror_axes = variant_geometry(self, variant)
        if not self.settings.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_training_transforms(self, *args, **kwargs):
        """nnU-Net's, or those of the setting ``augmentation``; with ``gin`` a random convolution behind them.

        Raises:
            ValueError: the pipeline has no place for it.
        """
        s = self._house
        if s.augmentation == "base":
            transforms = super().get_training_transforms(*args, **kwargs)
        else:
            transforms = VARIANTS[s.augmentation].get_training_transforms(*args, **kwargs)
            if s.seed is not None:
                make_repeatable(transforms)
        if s.gin > 0:
            schemes = self.configuration_manager.normalization_schemes
            joint = s.gin_channels == "joint" or (s.gin_channels == "auto" and set(schemes) == {SCALED_BY_255})
            probability = torch.zeros(1).share_memory_()
            self._gin = RandomConvolution(probability, "joint" if joint else "separate", s.gin_layers, s.gin_hidden)
            self._set_gin()
            if s.gin_on == "workers":
                insert(transforms, self._gin)
        return transforms

    def on_device(self, batch: dict) -> Batch:
        """As a loader made it; with ``gin_on=device`` random convolutions follow, of every stream of patches.

        One number is drawn from the methods' generator, and everything else from a generator of its own on the CPU.
        """
        found, gin = super().on_device(batch), self._gin
        where: str = self.settings.gin_on  # type: ignore[attr-defined]  # common_settings
        if gin is None or where == "workers" or float(gin.probability) == 0:
            return found
        masked = self.configuration_manager.use_mask_for_norm
        draw = partial(torch.randint, 2**62, (1,), generator=self.generator, device=self.device)
        streams = {
            name: {**value, "data": gin.of_batch(value["data"], masked, int(draw()))}
            for name, value in found.extras.items()
            if isinstance(value, Mapping) and "data" in value
        }
        data = gin.of_batch(found.data, masked, int(draw()))
        return replace(found, data=data, extras={**found.extras, **streams})

    def _hint_on_gin(self) -> str | None:
        schemes = self.configuration_manager.normalization_schemes
        ct = [name for name, scheme in zip(channel_names(self.dataset_json), schemes) if scheme == OF_CT]
        if not ct or self._house.gin == 0:
            return None
        return (
            f"gin changes the intensities of {', '.join(ct)}, which have absolute units: compare with gin=0 before you "
            "use this model"
        )

    def _set_gin(self) -> None:
        if self._gin is not None:
            s = self._house
            self._gin.probability.fill_(s.gin if self.current_epoch < s.gin_until * self.num_epochs else 0.0)

    def new_case_store(self, channels: Sequence[int] = (), fill: float = 0) -> CaseStore | None:
        """A store of arrays ``(*channels, X, Y, Z)`` of the preprocessed cases, beside the fold; first rank only.

        Boxes of ``batch.extra("boxes")`` fit it as ``box.cpu().numpy()``.

        Args:
            channels: leading axes.
            fill: value of what nobody has written yet.
        """
        if self.local_rank != 0:
            return None
        folder = self.preprocessed_dataset_folder

        @cache
        def shape(case: str) -> tuple[int, ...]:
            dataset = infer_dataset_class(folder)(folder, [case])
            return (*channels, *dataset.load_case(case)[0].shape[1:])

        return CaseStore(Path(self.output_folder) / "case_state", shape, fill)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's; where subjects are known and no split was written, it is written with every subject whole."""
        if self.fold == "all":
            return super().do_split()
        folder = self.preprocessed_dataset_folder
        cases = infer_dataset_class(folder).get_identifiers(folder)
        subjects = subjects_of_dataset(self.dataset_json, cases, self.settings.group_regex)
        file = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if subjects is not None and self.local_rank == 0 and write_split_if_absent(file, cases, (), subjects):
            self.print_to_log_file(f"Wrote {file}: no subject is in training and validation.")
        if self.is_ddp:
            distributed.barrier()
        train, validation = super().do_split()
        if subjects is None and (pairs := pairs_suggested(cases)) and divided(train, validation, pairs.subjects):
            self.print_to_log_file(f"WARNING: {pairs}. This fold divides them: give the expression as group_regex.")
        if both := divided(train, validation, subjects):
            self.print_to_log_file(
                f"WARNING: {len(both)} subjects, e.g. {both[0]}, have cases in training and validation: delete {file}, "
                "and a split that keeps subjects together is written"
            )
        return train, validation

    def on_train_start(self) -> None:
        """nnU-Net's, with the state of the cases as the checkpoint knew it, or none.

        Raises:
            ValueError: weights of ``-pretrained_weights`` were put over those of ``init_from``; or the state of a case
                does not go back as far as the checkpoint.
        """
        if self._started is not None and self._started != _versions(self.network):
            raise ValueError(_TWO_STARTS)
        self._started = None
        said = (*notices(self.dataset_json), hint_on_rgb(self.dataset_json), self._hint_on_gin())
        for notice in filter(None, said):
            self.print_to_log_file(f"NOTE: {notice}")
        if self.case_store is not None and self._is_resumed:
            self.case_store.rewind(self.global_step)
        super().on_train_start()
        if self.case_store is not None and not self._is_resumed:
            self.case_store.set_aside()

    def on_train_epoch_start(self) -> None:
        """nnU-Net's; the state of the cases is kept, to which checkpoint_before_nan.pth goes back."""
        super().on_train_epoch_start()
        self._set_gin()
        if self.current_epoch < self._house.freeze_encoder_epochs:
            for encoder in encoders(self.network):
                encoder.eval()  # running statistics stay too
        if self.case_store is not None and not self.disable_checkpointing:
            self.case_store.flush(self.global_step)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's; the file that ``init_from`` names is not read, and may be gone by now."""
        self._takes_weights_of_checkpoint = True
        super().load_checkpoint(filename_or_checkpoint)

    def _save(self, path: Path, *arguments: Any, **named: Any) -> None:
        store = None if self.disable_checkpointing else self.case_store
        if store is not None:
            store.flush(self.global_step)
        super()._save(path, *arguments, **named)
        # nnU-Net's --c takes one of these, and the best one only if there is no other
        names = ("checkpoint_final.pth", "checkpoint_latest.pth")
        is_continued = path.name in names or not any(path.with_name(name).is_file() for name in names)
        if store is not None and is_continued:
            # within an epoch its start is still needed, of which checkpoint_before_nan.pth is
            store.saved(self.global_step if self._partial_epoch is None else self.first_step_of_epoch)


def _versions(network: nn.Module) -> list[int]:
    """Each write to a parameter raises its number."""
    return [parameter._version for parameter in unwrap(network).parameters()]
