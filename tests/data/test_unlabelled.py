"""The second stream: nnU-Net's batches as they were, patches of other cases, and nothing of their labels."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_ext.core.step import Batch, Passes
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.data.unlabelled import UnlabelledLoader, UnlabelledStream, with_unlabelled


class WithStream(ExtTrainer):
    """All cases but the training cases are the stream."""

    seen: Batch | None = None

    def make_train_loader(self, dataset: Any, **nnunet_arguments: Any) -> UnlabelledStream:
        labelled = super().make_train_loader(dataset, **nnunet_arguments)
        others = set(self.dataset_class.get_identifiers(dataset.source_folder)) - set(dataset.identifiers)
        return with_unlabelled(labelled, dataset, others, **nnunet_arguments | {"batch_size": 3})

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
    assert trainer.seen is not None and set(trainer.seen.keys) <= labelled
    assert set(batch["unlabelled"]) == {"data", "keys", "boxes"}
    other = trainer.seen.stream()
    assert other.data.shape == (3, *trainer.seen.data.shape[1:]) and other.data.dtype == torch.float32
    assert len(other.keys) == 3 and not labelled & set(other.keys) and other.target == []
    assert other.extra("boxes").shape == (3, 3, 2)
    assert trainer.seen.select([0]).stream().data.shape[0] == 3


def test_labels_do_not_decide_where_the_patches_lie(make_trainer, monkeypatch) -> None:
    trainer = make_trainer(WithStream, "train_cases=2 oversample_foreground_percent=1", "2d")
    trainer.initialize()
    stream = trainer.get_dataloaders()[0].data_loader
    assert isinstance(stream.unlabelled, UnlabelledLoader)
    assert not stream.unlabelled.has_ignore
    asked = []
    original = UnlabelledLoader.get_bbox

    def spy(self: Any, shape: Any, force_fg: bool, *args: Any, **kwargs: Any) -> Any:
        asked.append(bool(force_fg))
        return original(self, shape, force_fg, *args, **kwargs)

    monkeypatch.setattr(UnlabelledLoader, "get_bbox", spy)
    next(stream.unlabelled)
    assert asked == [False] * 3


def test_no_case_left_and_a_training_case_are_refused(make_trainer) -> None:
    trainer = make_trainer(ExtTrainer, "", "2d")
    trainer.initialize()
    dataset, _ = trainer.get_tr_and_val_datasets()
    with pytest.raises(ValueError, match="there are no cases left; leave some cases out of the training set"):
        with_unlabelled(None, dataset, [])
    with pytest.raises(ValueError, match=f"{dataset.identifiers[0]} are training cases"):
        with_unlabelled(None, dataset, dataset.identifiers[:1])
    assert np.size(dataset.identifiers) > 1
