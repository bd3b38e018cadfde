"""The toy's training."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term, top_resolution
from nnunetv2_ext.data.loaders import PlacedDataLoader
from nnunetv2_ext.data.unlabelled import with_unlabelled
from nnunetv2_ext.parts.consistency import consistency_loss
from nnunetv2_ext.parts.ramps import momentum
from nnunetv2_ext.parts.teacher_training import TeacherTraining

from .loss import NEVER_SEEN, IntensityHead, foreground_probability, intensity_loss, running_mean
from .settings import ToySettings

NAME = "toy_method"


class ToyTraining(TeacherTraining):
    """Unlabelled patches with noise are predicted as the teacher does without; a head predicts the image."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {NAME: ToySettings}
    _foreground: Tensor | None = None  # (B,) of the step's batch
    _places: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0, 3, 2))

    @property
    def wants_teacher(self) -> bool:
        """Only the consistency needs it."""
        return self.settings.toy_method.weight > 0

    def teacher_momentum(self, step: int) -> float:
        """From the toy's own base."""
        return momentum(step, self.total_steps, self.settings.toy_method.momentum)

    def initialize(self) -> None:
        """Make the store."""
        super().initialize()
        if self.settings.toy_method.head_weight:
            self.case_store = self.new_case_store(fill=NEVER_SEEN)

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The head."""
        modules = super().build_training_modules()
        if self.settings.toy_method.head_weight:
            modules[NAME] = IntensityHead(self.label_manager.num_segmentation_heads)
        return modules

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> Any:
        """Places for the store, and patches of all cases that the fold does not train on."""
        loader = super().make_train_loader(dataset, **nnunet_arguments)
        if self.settings.toy_method.head_weight:
            loader = PlacedDataLoader(dataset, **nnunet_arguments)
        if not self.settings.toy_method.weight:
            return loader
        every = type(dataset).get_identifiers(
            dataset.source_folder
        )  # the toy is transductive: validation cases as well
        return with_unlabelled(loader, dataset, set(every) - set(dataset.identifiers), **nnunet_arguments)

    def loss_passes(self, batch: Batch) -> Passes:
        """The head on the labelled patches and the consistency on the unlabelled ones, then nnU-Net's."""
        passes, mine = super().loss_passes(batch), self.settings.toy_method
        if mine.head_weight:
            passes = passes.before("supervised", LossPass("toy_head", lambda: self._head_terms(batch)))
        if mine.weight:
            passes = passes.before("supervised", LossPass("toy_unlabelled", lambda: self._unlabelled_terms(batch)))
        return passes

    def after_step(self) -> None:
        """The teacher follows, and the store learns what the student saw."""
        super().after_step()
        mine = self.settings.toy_method
        if self.case_store is not None and self._foreground is not None:
            keys, boxes = self._places
            for case, box, value in zip(keys, boxes.cpu().numpy(), self._foreground.tolist()):
                old = self.case_store.read(case, box)
                if old is None:
                    old = np.full(box[:, 1] - box[:, 0], NEVER_SEEN)
                self.case_store.update(case, box, running_mean(old, value, mine.rate))

    def epoch_figures(self) -> dict[str, float]:
        """Mean of all places seen so far."""
        figures = super().epoch_figures()
        arrays = [] if self.case_store is None else [self.case_store.read(case) for case in self.case_store.cases()]
        seen = [array[array != NEVER_SEEN].astype(np.float64) for array in arrays if array is not None]
        return figures | ({f"{NAME}/foreground": float(np.concatenate(seen).mean())} if seen else {})

    def _head_terms(self, batch: Batch) -> dict[str, Term]:
        logits = top_resolution(self.forward(batch))
        self._foreground = foreground_probability(logits, self.label_manager.has_regions)
        self._places = batch.keys, batch.extra("boxes")
        loss = intensity_loss(self.training_modules[NAME](logits), batch.data)
        return {"toy_intensity": Term(loss, self.settings.toy_method.head_weight)}

    def _unlabelled_terms(self, batch: Batch) -> dict[str, Term]:
        clean, mine = batch.stream("unlabelled"), self.settings.toy_method
        noise = torch.randn(clean.data.shape, generator=self.generator, device=self.device)
        student = top_resolution(self.forward(clean.with_data(clean.data + mine.noise * noise)))
        teacher = self.forward(clean, self.teacher)
        loss = consistency_loss(teacher, student, None, regions=self.label_manager.has_regions)
        return {"toy_consistency": Term(loss, mine.weight)}
