"""A trainer with a guide bank: drawn from the fold's training cases, embedded, excluded by subject, saved, exported."""

import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, distributed, nn

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.step import Batch
from nnunetv2_ext.core.stock import stock_network, stock_shapes
from nnunetv2_ext.core.trainer_settings import method_settings_in
from nnunetv2_ext.data.subjects import pairs_suggested, subjects_of_dataset
from nnunetv2_ext.jras.bank import OUTSIDE
from nnunetv2_ext.jras.build import BankContent, cut_patch, draw_bank, group_ids
from nnunetv2_ext.jras.contrastive import flip
from nnunetv2_ext.jras.labels import mask_lut
from nnunetv2_ext.jras.network import Exclusion, JRASNetwork, excluding
from nnunetv2_ext.jras.settings import JRASSettings
from nnunetv2_ext.jras.strip import plain_weights
from nnunetv2_ext.parts.trainer import MethodTrainer

MIN_ANNOTATED = 0.05  # of the guides' cells, below which the log warns


class BankTraining(MethodTrainer):
    """The part of JRASTraining that owns the bank; with `jras.retriever=none` it is plain nnU-Net.

    The bank travels in the network's weights; what ties it to the training cases (names, places, the key of their
    numbers) under the extension's key only.
    """

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"jras": JRASSettings}

    _datasets: tuple[Any, Any] | None = None  # training, validation -> get_tr_and_val_datasets
    _bank_state: dict[str, Any] | None = None  # group key, cases, coordinates, patch size and spacing of the guides

    @property
    def jras(self) -> JRASSettings:
        """This method's settings."""
        return self.settings.jras  # type: ignore[attr-defined]  # the block settings_model added

    @property
    def retrieval_network(self) -> JRASNetwork | None:
        """The unwrapped network; None without retrieval."""
        network = unwrap(self.network)
        return network if isinstance(network, JRASNetwork) else None

    @classmethod
    def build_network_architecture(  # type: ignore[override]  # a class method, so that super() works; called the same way
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnU-Net's network for these plans, wrapped. The predictor calls it with nothing but the plans.

        Raises:
            ValueError: plans without this package's block, or a network that cannot be wrapped.
        """
        settings = method_settings_in(plans_manager.plans, "jras", JRASSettings)
        channels = len(configuration_manager.normalization_schemes)
        inputs = num_input_channels
        if settings.has_retrieval and settings.fusion == "concat":
            inputs += channels + num_output_channels
        backbone = super().build_network_architecture(
            plans_manager, configuration_manager, inputs, num_output_channels, enable_deep_supervision
        )
        if not settings.has_retrieval:
            return backbone
        if settings.reads_bottleneck and num_input_channels != channels:
            raise ValueError(
                "jras.retriever_encoder=bottleneck cannot be used in a cascade: guides have no result of the previous "
                "stage for the encoder to read; use jras.retriever_encoder=conv"
            )
        return JRASNetwork(backbone, settings, channels, num_output_channels, configuration_manager.patch_size)

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's; the bank is drawn from the first."""
        self._datasets = super().get_tr_and_val_datasets()
        return self._datasets

    def on_train_start(self) -> None:
        """nnU-Net's, which unpacks the data; then the bank is drawn, unless the checkpoint brought it."""
        super().on_train_start()
        network = self.retrieval_network
        if network is None:
            return
        assert self._datasets is not None
        cases, validation = (list(dataset.identifiers) for dataset in self._datasets)
        self._warn_of_shared_subjects(cases, validation)
        if self._bank_state is None or network.bank.is_empty:
            if self.current_epoch > 0:
                self.print_to_log_file("WARNING: the checkpoint has no guide bank; a new one is drawn.")
            self._draw_bank(network, cases)
        elif gone := sorted(set(self._bank_state["cases"]) - set(cases)):
            raise ValueError(
                "the checkpoint's guide bank holds cases that are not training cases of this fold any more: "
                f"{', '.join(gone)}; restore the split, or start a new training without --c"
            )
        else:  # checkpoints of older versions did not know recorded subjects
            network.bank.groups = self.groups_of(self._bank_state["cases"])
        assert self._bank_state is not None
        parameters = list(network.parameters())
        plain = sum(p.numel() for p in stock_network(self.my_init_kwargs).parameters())
        sizes = {"modules": sum(p.nbytes for p in parameters) - 4 * plain}  # in bytes, of fp32 and SGD with momentum
        sizes["momentum"] = sum(p.nbytes for p in parameters if p.requires_grad) - 4 * plain
        sizes["guides"] = sum(buffer.nbytes for buffer in network.bank.buffers())
        listed = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items())
        self.print_to_log_file(
            f"J-RAS: {len(network.bank)} guides of {len(set(self._bank_state['cases']))} cases, "
            f"{sum(p.numel() for p in parameters) - plain:,} further parameters. Every checkpoint grows by "
            f"{sum(sizes.values()) / 1e6:.1f} MB ({listed}). PRIVACY: every checkpoint and exported zip holds these "
            f"image patches of training cases, {sizes['guides'] / 1e6:.1f} MB; `nnUNetv2_ext export` writes a model "
            "without them."
        )

    def _warn_of_shared_subjects(self, cases: Sequence[str], validation: Sequence[str]) -> None:
        subjects = self._subjects([*cases, *validation])
        if subjects is None and (suggested := pairs_suggested({*cases, *validation})):
            self.print_to_log_file(
                f"WARNING: {suggested}. They guide each other, because nothing says so: set group_regex to it, or to "
                "one that matches no two names alike"
            )
        known = subjects or {}
        trained = {known.get(case, case) for case in cases}
        shared = [case for case in validation if known.get(case, case) in trained]
        if self.fold == "all" or shared:
            named = f"validation cases {', '.join(shared)} share a subject with training cases"
            which = "fold all validates on training cases" if self.fold == "all" else named
            self.print_to_log_file(
                f"WARNING: {which}. The predictor knows no case ids, so the final validation retrieves guides of the "
                "very subjects it is scored on: THOSE SCORES ARE VOID. Scores during training exclude them."
            )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's; `--val` alone must warn of void scores as well."""
        if self.retrieval_network is not None:
            self._warn_of_shared_subjects(*self.do_split())
        super().perform_actual_validation(save_probabilities)

    def _draw_bank(self, network: JRASNetwork, cases: Sequence[str]) -> None:
        s, axes = self.jras, self.inference_allowed_mirroring_axes or ()
        assert self._datasets is not None
        key = [secrets.token_bytes(16)]  # stays in the training's own state, never among the weights
        if self.is_ddp:
            distributed.broadcast_object_list(key, 0)
        seed = (self.settings.seed or 0) * 1000 + (999 if self.fold == "all" else int(self.fold))
        patch, labels, subjects = self.configuration_manager.patch_size, self.label_manager, self._subjects(cases)
        how = (s.bank_size, s.fg_share, labels, seed, subjects, axes if s.mirror_guides else ())
        content = draw_bank(self._datasets[0], cases, patch, network.low_shape, *how)
        if not ((content.labels > 0) & (content.labels != OUTSIDE)).any():
            self.print_to_log_file(
                "WARNING: no guide contains any foreground, so they can teach nothing about shape; "
                "raise jras.fg_share or jras.bank_size."
            )
        self._describe_labels(content)
        drawn = {name: getattr(content, name) for name in ("cases", "coordinates", "mirrored")}
        self._bank_state = {"group_key": key[0], **drawn, **self._geometry()}
        groups = self.groups_of(content.cases)
        network.bank.fill(content.images, content.labels, groups, mask_lut(self.label_manager))
        self._refresh(network)

    def _describe_labels(self, content: BankContent) -> None:
        """With an ignore label: how much the guides' masks know; a cell counts if half of it is annotated."""
        if not self.label_manager.has_ignore_label:
            return
        share = float((content.labels != OUTSIDE).float().mean())
        missing = [str(n) for n in self.label_manager.all_labels if n and not (content.labels == n).any()]
        none = f", none with the label {', '.join(missing)}" if missing else ""
        text = f"{100 * share:.2g} % of the guides' cells are annotated{none}"
        if share < MIN_ANNOTATED or missing:
            text = (
                f"WARNING: {text}: such guides say little about shape, and retrieval can hardly learn from them. "
                "jras.store_stride=1 keeps more of thin annotation, at more memory"
            )
        self.print_to_log_file(f"{text}.")

    def _refresh(self, network: JRASNetwork) -> None:
        """Embed all guides with today's retriever; each rank does its share."""
        N = len(network.bank)
        ranks = distributed.get_world_size() if self.is_ddp else 1
        share = -(-N // ranks)
        first, last = (min(N, (self.local_rank + n) * share) for n in (0, 1))
        whole = (self.configuration_manager.batch_size, self._read_guides) if self.jras.reads_bottleneck else ()
        with torch.autocast("cuda") if self.device.type == "cuda" else nullcontext():
            keys = network.embed_bank(first, last, *whole)
        if self.is_ddp:
            padded = nn.functional.pad(keys, (0, 0, 0, share - len(keys)))
            parts = [torch.empty_like(padded) for _ in range(ranks)]
            distributed.all_gather(parts, padded)
            keys = torch.cat(parts)[:N]
        network.bank.set_keys(keys, self._bank_state["cases"] if self._bank_state else None)

    def _read_guides(self, rows: range) -> Tensor:
        """The guides' patches at full resolution, `(n, C, *P)` on the device."""
        assert self._bank_state is not None and self._datasets is not None
        cases, corners, size = (self._bank_state[name] for name in ("cases", "coordinates", "patch_size"))
        read = (self._datasets[0].load_case(cases[row]) for row in rows)
        images = [cut_patch(data, seg, corners[row], size)[0] for row, (data, seg, *_) in zip(rows, read)]
        patches = torch.stack(images).to(self.device, non_blocking=True)
        mirrored = self._bank_state.get("mirrored")  # checkpoints of older versions have none
        return patches if mirrored is None else flip(patches, mirrored[rows.start : rows.stop].to(patches.device))

    def groups_of(self, cases: Sequence[str]) -> Tensor:
        """Numbers of the cases' subjects, as the bank has them; int64 on the device."""
        assert self._bank_state is not None
        names = [str(case) for case in cases]
        groups = group_ids(names, self._bank_state["group_key"], self._subjects(names))
        return groups.to(self.device, non_blocking=True)

    def _subjects(self, cases: Sequence[str]) -> dict[str, str] | None:
        """As `group_regex` says, else as dataset.json records them; None: nothing is known."""
        return subjects_of_dataset(self.dataset_json, cases, self.settings.group_regex)

    def _excluding(self, cases: Sequence[str], dropout: float = 0.0) -> AbstractContextManager[None]:
        if self._bank_state is None:
            return nullcontext()
        return excluding(Exclusion(self.groups_of(cases), dropout, self.generator))

    def forward(self, batch: Batch, network: Any = None) -> Any:
        """Guides of the batch's own subjects are not retrieved, whichever network looks for them."""
        trains = network is None and self.network.training and torch.is_grad_enabled()
        with self._excluding(batch.keys, self.jras.guide_dropout if trains else 0.0):
            return super().forward(batch, network)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, with the same rule."""
        with self._excluding(batch["keys"]):
            return super().validation_step(batch)

    def method_state(self) -> dict[str, Any]:
        """Adds what ties the bank to the training cases."""
        state = super().method_state()
        if self._bank_state is not None:
            state["jras"] = dict(self._bank_state)
        return state

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart; without it the weights still predict, and a continued training draws a new bank.

        Raises:
            ValueError: the bank was drawn with another patch size or spacing.
        """
        super().load_method_state(states)
        state = states.get("jras")
        if state is None or self.retrieval_network is None:
            return
        now = self._geometry()
        for name, value in now.items():
            then = tuple(state.get(name, value))  # checkpoints of older versions do not say
            if then != value:
                was, now_is = (" x ".join(f"{n:g}" for n in numbers) for numbers in (then, value))
                raise ValueError(
                    f"the checkpoint's guides were drawn with {name.replace('_', ' ')} {was}, the plans now say "
                    f"{now_is}: continue with the plans the training was started with, or start a new one without --c"
                )
        names = ("group_key", "cases", "coordinates", "mirrored")
        self._bank_state = {name: state[name] for name in names if name in state} | now

    def _geometry(self) -> dict[str, tuple[float, ...]]:
        plan = self.configuration_manager
        return {"patch_size": tuple(map(int, plan.patch_size)), "spacing": tuple(map(float, plan.spacing))}

    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """Plain nnU-Net's weights: the bank and what belongs to it are left behind."""
        return plain_weights(super().export_weights(checkpoint, weights), stock_shapes(checkpoint["init_args"]))
