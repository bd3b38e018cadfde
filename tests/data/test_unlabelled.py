"""The second stream: nnU-Net's batches as they were, patches of other cases, and nothing of their labels."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_ext.core.step import Batch, Passes
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.data.unlabelled import UnlabelledLoader, UnlabelledStream, with_unlabelled, write_found


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
    assert set(batch["unlabelled"]) == {"data", "keys", "boxes", "inside"}
    other = trainer.seen.stream()
    assert other.data.shape == (3, *trainer.seen.data.shape[1:]) and other.data.dtype == torch.float32
    assert len(other.keys) == 3 and not labelled & set(other.keys) and other.target == []
    assert other.extra("boxes").shape == (3, 3, 2)
    inside = other.extra("inside")
    assert inside.dtype == torch.bool and inside.shape == (3, 1, *other.data.shape[2:]) and bool(inside.any())
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


class OneCase:
    """A dataset of one case: a scan in the middle of empty surroundings, which the preprocessor marks by -1."""

    identifiers = ("a",)

    def __init__(self, label: int) -> None:
        seg = np.full((1, 1, 12, 12), -1, dtype=np.int8)
        seg[:, :, 4:8, 4:8] = label
        self.case = np.ones((1, 1, 12, 12), dtype=np.float32), seg, None, {"class_locations": {1: [[0, 0, 4, 4]]}}

    def load_case(self, case: str) -> Any:
        return self.case


def loader_of(make_trainer: Any, label: int, found: Any = None, **dataset: Any) -> UnlabelledLoader:
    labels = make_trainer(ExtTrainer, "", "2d", **dataset).label_manager
    sizes = {"patch_size": [6, 6], "final_patch_size": [6, 6], "oversample_foreground_percent": 1.0}
    return UnlabelledLoader(OneCase(label), 2, label_manager=labels, found=found, **sizes)


def test_inside_is_where_the_scan_is_whatever_its_labels(make_trainer) -> None:
    for label in (0, 2):
        loader = loader_of(make_trainer, label)
        loader.get_bbox = lambda *_: ([0, -2, 4], [1, 8, 14])  # padded on two sides
        batch = UnlabelledStream(iter([{"data": 0}]), loader).__next__()["unlabelled"]
        inside = np.zeros((10, 10), dtype=bool)
        inside[6:10, 0:4] = True
        assert np.array_equal(batch["inside"][0, 0].numpy(), inside)


def test_patches_are_drawn_where_foreground_was_found_as_soon_as_it_is(make_trainer, tmp_path) -> None:
    file = tmp_path / "found.npz"
    loader = loader_of(make_trainer, 0, file)
    starts = {tuple(box[1:, 0].tolist()) for _ in range(20) for box in next(loader)["boxes"]}
    assert len(starts) > 5
    write_found(file, {"a": np.array([[0, 5, 6]])})
    starts = {tuple(box[1:, 0].tolist()) for _ in range(20) for box in next(loader)["boxes"]}
    assert starts == {(2, 3)}
    write_found(file, {"a": np.zeros((0, 3), dtype=int)})  # none was found
    starts = {tuple(box[1:, 0].tolist()) for _ in range(20) for box in next(loader)["boxes"]}
    assert len(starts) > 5
