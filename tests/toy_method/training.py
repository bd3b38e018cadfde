"""The toy's training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from nnunetv2_ext.core.checkpoint import unwrap
from nnunetv2_ext.core.step import Batch, LossPass, Passes, Term
from nnunetv2_ext.data.loaders import PlacedDataLoader
from nnunetv2_ext.data.store import CaseStore
from nnunetv2_ext.data.unlabelled import UnlabelledStream
from nnunetv2_ext.parts.consistency import consistency_loss
from nnunetv2_ext.parts.ramps import momentum
from nnunetv2_ext.parts.teacher import EMATeacher
from nnunetv2_ext.parts.trainer import MethodTrainer

from .loss import NEVER_SEEN, IntensityHead, foreground_probability, intensity_loss, running_mean
from .settings import ToySettings

NAME = "toy_method"


class ToyTraining(MethodTrainer):
    """Unlabelled patches with noise are predicted as the teacher does without; a head predicts the image."""

    method_settings: ClassVar[dict[str, type[BaseModel]]] = {NAME: ToySettings}
    settings: Any
    teacher: EMATeacher | None = None
    _teacher_is_loaded = False
    _foreground: Tensor | None = None  # (B,) of the step's batch
    _places: tuple[tuple[str, ...], Tensor] = ((), torch.empty(0, 3, 2))

    def initialize(self) -> None:
        """Make teacher and store."""
        super().initialize()
        if self.settings.toy_method.weight:
            self.teacher = EMATeacher(unwrap(self.network))
        if self.settings.toy_method.head_weight and self.local_rank == 0:
            self.case_store = CaseStore(Path(self.output_folder) / "case_state", self._shape_of, fill=NEVER_SEEN)

    def on_train_start(self) -> None:
        """The teacher starts as the student, unless a checkpoint had one."""
        super().on_train_start()
        if self.teacher is not None and not self._teacher_is_loaded:
            self.teacher.copy_from(unwrap(self.network))

    def build_training_modules(self) -> dict[str, nn.Module]:
        """The head."""
        modules = super().build_training_modules()
        if self.settings.toy_method.head_weight:
            with torch.random.fork_rng(devices=[]):  # self.generator is made later
                modules[NAME] = IntensityHead(self.label_manager.num_segmentation_heads)
        return modules

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> Any:
        """Places for the store, and patches of all cases that the fold does not train on."""
        loader = super().make_train_loader(dataset, **nnunet_arguments)
        if self.settings.toy_method.head_weight:
            loader = PlacedDataLoader(dataset, **nnunet_arguments)
        if not self.settings.toy_method.weight:
            return loader
        cases = sorted(set(self._dataset(None).identifiers) - set(dataset.identifiers))
        if not cases:
            raise ValueError("every case is a training case, none is left as unlabelled: set toy_method.weight=0")
        arguments = nnunet_arguments | {"oversample_foreground_percent": 0.0}  # it would look at labels
        stream: Any = UnlabelledStream(loader, super().make_train_loader(self._dataset(cases), **arguments))
        stream._data = dataset  # nnU-Net's loader has it, and the contract reads it
        return stream

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
        if self.teacher is not None:
            steps = self.num_epochs * self.num_iterations_per_epoch
            self.teacher.update(unwrap(self.network), momentum(self.global_step, steps, mine.momentum))
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

    def method_state(self) -> dict[str, Any]:
        """The teacher's weights."""
        state = super().method_state()
        return state if self.teacher is None else state | {NAME: {"teacher": self.teacher.state_dict()}}

    def load_method_state(self, states: dict[str, Any]) -> None:
        """Take up the teacher; a checkpoint without one leaves it to `on_train_start`."""
        super().load_method_state(states)
        if self.teacher is not None and NAME in states:
            self.teacher.load_state_dict(states[NAME]["teacher"])
            self._teacher_is_loaded = True

    def _head_terms(self, batch: Batch) -> dict[str, Term]:
        logits = _top(self.forward(batch))
        self._foreground = foreground_probability(logits, self.label_manager.has_regions)
        self._places = batch.keys, batch.extra("boxes")
        loss = intensity_loss(self.training_modules[NAME](logits), batch.data)
        return {"toy_intensity": Term(loss, self.settings.toy_method.head_weight)}

    def _unlabelled_terms(self, batch: Batch) -> dict[str, Term]:
        assert self.teacher is not None
        unlabelled, mine = batch.extra("unlabelled"), self.settings.toy_method
        clean = dataclasses.replace(
            batch, data=unlabelled["data"], target=[], keys=tuple(unlabelled["keys"]), extras={}
        )
        noise = torch.randn(clean.data.shape, generator=self.generator, device=self.generator.device)
        student = _top(self.forward(clean.with_data(clean.data + mine.noise * noise)))
        teacher = _top(self.forward(clean, self.teacher))
        loss = consistency_loss(teacher, student, None, regions=self.label_manager.has_regions)
        return {"toy_consistency": Term(loss, mine.weight)}

    def _dataset(self, cases: list[str] | None) -> Any:
        previous = self.folder_with_segs_from_previous_stage
        return self.dataset_class(
            self.preprocessed_dataset_folder, cases, folder_with_segs_from_previous_stage=previous
        )

    def _shape_of(self, case: str) -> tuple[int, ...]:
        return tuple(self._dataset([case]).load_case(case)[0].shape[1:])


def _top(output: Any) -> Tensor:
    return output[0] if isinstance(output, list | tuple) else output
