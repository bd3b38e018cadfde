"""The training of `nnUNetv2_ext adapt`: a short fine-tune, old cases in each batch, classes that are not drawn."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pydantic import BaseModel
from torch import Tensor

from nnunetv2_ext.adapt.marginal import kept_heads, merged_logits, merged_target, without_regions
from nnunetv2_ext.adapt.panel import draw_batch
from nnunetv2_ext.adapt.replay import OLD, ReplayLoader
from nnunetv2_ext.adapt.settings import AdaptSettings
from nnunetv2_ext.core.labelmaps import foreground_names
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term
from nnunetv2_ext.parts.trainer import MethodTrainer

STEPS, RATE = 300, 1e-3  # measured: docs/results.md
EPOCHS = 10


class AdaptTraining(MethodTrainer):
    """nnU-Net's training from the weights of ``init_from``, with replay and a loss that spares undrawn classes."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {"adapt": AdaptSettings}
    default_settings: ClassVar[dict[str, Any]] = {
        "initial_lr": RATE,
        "num_epochs": EPOCHS,
        "num_iterations_per_epoch": STEPS // EPOCHS,
        "num_val_iterations_per_epoch": 0,
    }

    hidden: tuple[int, ...] = ()  # heads of the classes or regions that are not drawn

    def initialize(self) -> None:
        """nnU-Net's, and the heads of what is not drawn.

        Raises:
            ValueError: a name of ``adapt.not_drawn`` is not a class of this dataset, or no other class is left.
        """
        names = foreground_names(self.dataset_json, self.label_manager)
        self.hidden = hidden_heads(names, self.settings.adapt.not_drawn, self.label_manager.has_regions)
        super().initialize()

    def configure_optimizers(self, *args: Any, **kwargs: Any) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's own SGD, whatever a base trainer has: its optimiser's state is gone with a finished model."""
        return nnUNetTrainer.configure_optimizers(self)

    def _do_i_compile(self) -> bool:
        return False  # compiling takes longer than a few hundred steps

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> Any:
        """nnU-Net's loader, and beside it one of the old cases."""
        settings = self.settings.adapt
        if settings.old_data is None or settings.replay == 0:
            return super().make_train_loader(dataset, **nnunet_arguments)
        nnunet_arguments["probabilistic_oversampling"] = True
        reader = infer_dataset_class(settings.old_data)
        cases = settings.old_cases and list(settings.old_cases)
        old = reader(settings.old_data, cases, settings.old_previous_stage)
        missing = sorted(set(old.identifiers) - set(reader.get_identifiers(settings.old_data)))
        if missing or not old.identifiers:
            raise ValueError(
                f"the old cases {', '.join(missing[:5]) or '(none)'} are not in {settings.old_data}: preprocess the "
                "old dataset again, or adapt without replay"
            )
        loaders = [super(AdaptTraining, self).make_train_loader(d, **nnunet_arguments) for d in (dataset, old)]
        # the old dataset may know no ignore label, and then says nothing of where it is annotated
        known = old.load_case(old.identifiers[0])[3]["class_locations"]
        loaders[1].has_ignore = loaders[1].has_ignore and loaders[1].annotated_classes_key in known
        return ReplayLoader(loaders[0], loaders[1], settings.replay)

    def loss_passes(self, batch: Batch) -> Passes:
        """nnU-Net's loss; of new samples without what is not drawn."""
        passes = super().loss_passes(batch)
        if not self.hidden:
            return passes
        return passes.replaced("supervised", LossPass("supervised", lambda: {"supervised": Term(self._loss(batch))}))

    def _loss(self, batch: Batch) -> Tensor:
        """The losses of new and old samples, each by its share of the batch."""
        output = self.forward(batch)
        domain = batch.extras.get("domain") or ("",) * len(batch.keys)
        total = batch.data.new_zeros(())
        for is_old in (False, True):
            rows = [row for row, name in enumerate(domain) if (name == OLD) == is_old]
            if rows:
                logits, target = _rows(output, rows), _rows(batch.target, rows)
                if not is_old:
                    logits, target = self._spared(logits, target)
                total = total + len(rows) / len(domain) * self.loss(logits, target)
        return total

    def _spared(self, logits: Any, target: Any) -> tuple[Any, Any]:
        """Logits and target, at each resolution, without what is not drawn."""
        if isinstance(logits, (list, tuple)):
            pairs = [self._spared(*pair) for pair in zip(logits, target)]
            return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        number = logits.shape[1]
        if self.label_manager.has_regions:
            kept = kept_heads(number, self.hidden, has_regions=True)
            return logits[:, kept], without_regions(target, self.hidden, number)
        return merged_logits(logits, self.hidden), merged_target(target, self.hidden, number)

    def draw_panel(self, path: Path) -> None:
        """The last batch: each sample with its label and the prediction."""
        if self.last_batch is not None:
            draw_batch(self, self.on_device(self.last_batch), path)


def hidden_heads(names: list[str], not_drawn: list[str], has_regions: bool) -> tuple[int, ...]:
    """Heads of the network that belong to ``not_drawn``, of the foreground ``names`` in their order.

    Raises:
        ValueError: a name is not among them, or nothing else is left to learn.
    """
    unknown = [name for name in not_drawn if name not in names]
    if unknown:
        raise ValueError(f"the model has no class {', '.join(unknown)}; it has {', '.join(names)}")
    if not set(names) - set(not_drawn):
        raise ValueError("every class of the model is named as not drawn, so there is nothing to learn: name fewer")
    return tuple(names.index(name) + (not has_regions) for name in dict.fromkeys(not_drawn))


def _rows(levels: Any, rows: list[int]) -> Any:
    return [level[rows] for level in levels] if isinstance(levels, (list, tuple)) else levels[rows]
