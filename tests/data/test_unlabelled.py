"""The second stream: nnU-Net's batches as they were, patches of other cases, and none of their labels."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_ext.core.step import Batch, Passes
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.data.unlabelled import UnlabelledStream


class WithStream(ExtTrainer):
    """All cases but the training cases are the stream."""

    seen: Batch | None = None

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> UnlabelledStream:
        folder = self.preprocessed_dataset_folder
        names = sorted(set(self.dataset_class.get_identifiers(folder)) - set(dataset.identifiers))
        others = nnUNetDataLoader(self.dataset_class(folder, names), **nnunet_arguments | {"batch_size": 3})
        return UnlabelledStream(super().make_train_loader(dataset, **nnunet_arguments), others)

    def loss_passes(self, batch: Batch) -> Passes:
        self.seen = batch
        return super().loss_passes(batch)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_batch_carries_patches_of_other_cases_without_their_labels(make_trainer, pickled: bool) -> None:
    trainer = make_trainer(WithStream, "train_cases=2", "2d")
    trainer.initialize()
    train, _ = trainer.get_dataloaders()
    labelled = set(trainer._train_cases)
    batch = next(train)
    if pickled:  # as a spawned worker gets the loader
        loader = pickle.loads(pickle.dumps(train.data_loader))
        loader.set_thread_id(0)
        batch = next(loader)
    trainer.train_step(batch)
    assert trainer.seen is not None
    other = trainer.seen.extra("unlabelled")
    assert set(other) == {"data", "keys"}
    assert other["data"].shape == (3, *trainer.seen.data.shape[1:]) and other["data"].dtype == torch.float32
    assert len(other["keys"]) == 3 and not labelled & set(other["keys"])
    assert set(trainer.seen.keys) <= labelled
    assert trainer.seen.select([0]).extra("unlabelled")["data"].shape[0] == 3
