"""J-RAS on nnU-Net: episodes in training, a bank of the training cases for everything else, and what is logged.

After Ahmed, Mohammed, Asilian Bidgoli, "J-RAS", https://arxiv.org/abs/2510.09953: retriever and segmenter are trained
jointly, on image-mask guides. What the abstract does not say is ours; no reproduction.
"""

import secrets
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, distributed, nn

from nnunetv2_ext.core.checkpoint import read, unwrap
from nnunetv2_ext.core.labelmaps import target_to_labels
from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.core.step import Batch, Passes, Term, top_resolution
from nnunetv2_ext.core.stock import stock_network, stock_shapes
from nnunetv2_ext.core.trainer_settings import method_settings_in
from nnunetv2_ext.data.subjects import pairs_suggested, subjects_of_dataset
from nnunetv2_ext.jras.bank import IGNORED, stored
from nnunetv2_ext.jras.build import draw_bank, group_ids
from nnunetv2_ext.jras.episodes import EpisodeLoader, require_subjects
from nnunetv2_ext.jras.labels import mask_lut, masks_of_target
from nnunetv2_ext.jras.network import Episode, Exclusion, JRASNetwork, Reading, reading
from nnunetv2_ext.jras.panel import draw_reading, view_of_patch
from nnunetv2_ext.jras.read import mass_recall, transported_loss
from nnunetv2_ext.jras.settings import FIRST_DESIGN, JRASSettings, is_of_first_design
from nnunetv2_ext.jras.strip import plain_weights
from nnunetv2_ext.parts.trainer import MethodTrainer


class JRASTraining(MethodTrainer):
    """Adds guides to every forward; with `jras.retriever=none` and `jras.style_share=0` it is plain nnU-Net.

    In training the loader brings guides of other subjects. Validation, pictures and prediction read the bank, which
    travels in the network's weights; what ties it to the training cases (names, the key of their numbers) is under the
    extension's key only.
    """

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"jras": JRASSettings}
    bench_parts: ClassVar = {"guides": ("network._encoded",), "read": ("network._read",)}

    _datasets: tuple[Any, Any] | None = None  # training, validation -> get_tr_and_val_datasets
    _bank_state: dict[str, Any] | None = None  # group key and cases of the guides

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
            ValueError: plans without this package's block or of the first design, or a network that cannot be wrapped.
        """
        if is_of_first_design(plans_manager.plans.get(PLANS_KEY, {}).get("jras") or {}):
            raise ValueError(FIRST_DESIGN)
        settings = method_settings_in(plans_manager.plans, "jras", JRASSettings)
        backbone = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        if not settings.has_retrieval:
            return backbone
        channels = len(configuration_manager.normalization_schemes)
        return JRASNetwork(backbone, settings, channels, num_output_channels, configuration_manager.patch_size)

    # ---- data
    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's; the bank is drawn from the first."""
        self._datasets = super().get_tr_and_val_datasets()
        return self._datasets

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> Any:
        """Batches with guides; nnU-Net's own loader if neither guides nor curves are asked for."""
        s = self.jras
        if not s.has_retrieval and not s.style_share:
            return super().make_train_loader(dataset, **nnunet_arguments)
        plan = self.configuration_manager
        channels, number = len(plan.normalization_schemes), s.guides_for(len(plan.patch_size)) if s.has_retrieval else 0
        how = (number, s.fg_share, s.style_share, channels, self._subjects(dataset.identifiers))
        return EpisodeLoader(dataset, *how, **nnunet_arguments)

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
        assert self._bank_state is not None
        plain = sum(p.numel() for p in stock_network(self.my_init_kwargs).parameters())
        further = sum(p.numel() for p in network.parameters()) - plain
        size = sum(buffer.nbytes for buffer in network.bank.buffers()) / 1e6
        self.print_to_log_file(
            f"J-RAS: {len(network.bank)} guides of {len(set(self._bank_state['cases']))} cases in the bank, "
            f"{network.num_guides} a patch, read at stage {network.level} of the encoder; "
            f"{further:,} further parameters. PRIVACY: every checkpoint and exported zip holds these image patches of "
            f"training cases, {size:.1f} MB; `nnUNetv2_ext bank MODEL --strip -o MODEL2` writes a model without them."
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
        s, labels, subjects = self.jras, self.label_manager, self._subjects(cases)
        assert self._datasets is not None
        require_subjects(network.num_guides, len({(subjects or {}).get(case, case) for case in cases}))
        key = [secrets.token_bytes(16)]  # stays in the training's own state, never among the weights
        if self.is_ddp:
            distributed.broadcast_object_list(key, 0)
        seed = (self.settings.seed or 0) * 1000 + (999 if self.fold == "all" else int(self.fold))
        patch = self.configuration_manager.patch_size
        content = draw_bank(self._datasets[0], cases, patch, s.bank_size_for(len(patch)), s.fg_share, labels, seed)
        foreground = [n for n in labels.all_labels if n]
        if missing := [str(n) for n in foreground if not (content.labels == n).any()]:
            self.print_to_log_file(
                f"WARNING: no guide of the bank shows the label {', '.join(missing)}; raise jras.fg_share or "
                "jras.bank_size"
            )
        if labels.has_ignore_label:
            share = float((content.labels != IGNORED).float().mean())
            self.print_to_log_file(f"{100 * share:.2g} % of the guides' voxels are annotated.")
        self._bank_state = {"group_key": key[0], "cases": content.cases}
        network.bank.fill(stored(content.images, content.labels, self.groups_of(content.cases), mask_lut(labels)))

    def groups_of(self, cases: Sequence[str]) -> Tensor:
        """Numbers of the cases' subjects, as the bank has them; int64 on the device."""
        assert self._bank_state is not None
        names = [str(case) for case in cases]
        groups = group_ids(names, self._bank_state["group_key"], self._subjects(names))
        return groups.to(self.device, non_blocking=True)

    def _subjects(self, cases: Sequence[str]) -> dict[str, str] | None:
        """As `group_regex` says, else as dataset.json records them; None: nothing is known."""
        return subjects_of_dataset(self.dataset_json, cases, self.settings.group_regex)

    # ---- a step
    def forward(self, batch: Batch, network: Any = None) -> Any:
        """Whichever network it is reads the guides of the batch; the trained one drops some in training."""
        if self.retrieval_network is None:
            return super().forward(batch, network)
        images, target = batch.extra("guide_data"), batch.extra("guide_target")
        masks, known = masks_of_target(target.flatten(0, 1), self.label_manager)
        kept = torch.ones(len(images), dtype=torch.bool, device=images.device)
        if network is None and self.network.training and torch.is_grad_enabled():
            drawn = torch.rand(len(images), generator=self.generator, device=self.generator.device)
            kept = (drawn >= self.jras.guide_dropout).to(images.device)
        number = len(images)
        episode = Episode(images, masks.unflatten(0, (number, -1)), known.unflatten(0, (number, -1)), kept)
        with reading(episode):
            return super().forward(batch, network)

    def loss_passes(self, batch: Batch) -> Passes:
        """nnU-Net's supervised pass, with the loss of the mask that its guides' attention transports."""
        passes, network = super().loss_passes(batch), self.retrieval_network
        if network is None:
            return passes
        masks, known = masks_of_target(batch.top_target, self.label_manager)  # before any loss sees the target
        supervised: Any = passes["supervised"]

        def compute() -> dict[str, Term]:
            terms = supervised.compute()
            assert network.last is not None
            transported, network.last = network.last.transported, None  # its graph must not outlive the step
            with torch.set_grad_enabled(self.jras.transport_weight > 0):  # of weight 0 it is only logged
                loss = transported_loss(transported, masks, known, self.label_manager.has_regions)
            return terms | {"transported": Term(loss, self.jras.transport_weight)}

        return passes.replaced("supervised", replace(supervised, compute=compute))

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, of the bank, without guides of the batch's own subjects."""
        with reading(Exclusion(self.groups_of(batch["keys"]))) if self._bank_state else nullcontext():
            return super().validation_step(batch)

    # ---- log and picture
    def epoch_figures(self) -> dict[str, float]:
        """How much of the attention the retrieved guides would get, of that of the best ones."""
        figures, network = super().epoch_figures(), self.retrieval_network
        if network is None or self.last_batch is None or not network.reader.scores:
            return figures
        batch = self.on_device(self.last_batch)
        found, _ = self.read_bank(batch)
        own = self.groups_of(batch.keys)[:, None] == network.bank.groups[None]
        assert found.ids is not None and found.valid is not None
        queries = found.keys, found.vectors, found.ids, found.valid
        features = network.bank_features(batch.data.shape[1])
        return figures | {"jras/mass_recall": mass_recall(network.reader, features, own, *queries)}

    def read_bank(self, batch: Batch) -> tuple[Reading, Tensor]:
        """What the network reads of the bank for a batch, guides of its own subjects left out, and its logits."""
        network = self.retrieval_network
        assert network is not None
        was_training = network.training
        network.eval()
        try:
            with (
                torch.no_grad(),
                reading(Exclusion(self.groups_of(batch.keys))),
                torch.autocast("cuda", enabled=self.device.type == "cuda"),
            ):
                logits = network(batch.data)
        finally:
            network.train(was_training)
        assert network.last is not None
        return network.last, top_resolution(logits)

    def draw_panel(self, path: Path) -> None:
        """One patch, what its cells read, its guides, prediction and truth. It shows patients' images."""
        super().draw_panel(path)
        network, plan = self.retrieval_network, self.configuration_manager
        if network is None or self.last_batch is None:
            return
        batch = self.on_device(self.last_batch)
        _, known = masks_of_target(batch.top_target, self.label_manager)
        sample = batch.select([int(((batch.top_target > 0) & known).flatten(1).sum(1).argmax())])
        logits, truth = self.read_bank(sample)[1], target_to_labels(sample.top_target[0], self.label_manager)
        cases = None if self._bank_state is None else self._bank_state["cases"]
        view = view_of_patch(network, logits, sample.data, sample.keys[0], self.label_manager, truth, cases)
        view = view._replace(directions=self.directions_of_case(sample.keys[0]))
        file = path.with_name(f"{path.stem}_guides{path.suffix}")  # another method may draw to the path itself
        title, spacing = f"{self.picture_title}, epoch {self.current_epoch - 1}", plan.spacing[-len(plan.patch_size) :]
        draw_reading(view, file, title, self.dataset_json, self.label_manager, spacing, augmented=True)

    # ---- checkpoints
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's.

        Raises:
            ValueError: a checkpoint of the first design.
        """
        weights: Any = ()
        with suppress(ValueError):  # a broken file, of which more is said, or another one is found
            weights = read(Path(filename_or_checkpoint))["network_weights"]
        if "null_logit" in weights:
            raise ValueError(FIRST_DESIGN)
        super().load_checkpoint(filename_or_checkpoint)

    def method_state(self) -> dict[str, Any]:
        """Adds what ties the bank to the training cases."""
        state = super().method_state()
        if self._bank_state is not None:
            state["jras"] = dict(self._bank_state)
        return state

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Counterpart; without it the weights still predict, and a continued training draws a new bank."""
        super().load_method_state(states)
        if (state := states.get("jras")) is not None and self.retrieval_network is not None:
            self._bank_state = {name: state[name] for name in ("group_key", "cases")}

    @classmethod
    def export_weights(cls, checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
        """Plain nnU-Net's weights: the bank and what belongs to it are left behind."""
        return plain_weights(super().export_weights(checkpoint, weights), stock_shapes(checkpoint["init_args"]))
