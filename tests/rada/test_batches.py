"""Batches: two streams, forced foreground where there is some, padding that supervises nobody, picklable loaders."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.rada.annotation.planes import Planes
from nnunetv2_ext.rada.batches import TwoStreamLoader, ViewDataset, number_labelled
from nnunetv2_ext.rada.targets import supervised_target, unannotated
from nnunetv2_ext.rada.views import AXES, INSIDE

IGNORE, SHAPE, PLANES = 3, (20, 24, 18), Planes(((9,), (12,), (7,)))
LABELS = SimpleNamespace(all_labels=[0, 1, 2], has_ignore_label=True)
KEY = (-1, 0, 1, 2)


class MemoryDataset:
    """Two labelled cases with three planes and a little foreground in a corner, three unlabelled ones."""

    source_folder = "nowhere"

    def __init__(self, labelled: int = 2, unlabelled: int = 3, shape: tuple[int, ...] = SHAPE) -> None:
        self.identifiers = [f"full_{n}" for n in range(labelled)] + [f"none_{n}" for n in range(unlabelled)]
        self.shape = shape

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict[str, Any]]:
        rng = np.random.default_rng(len(identifier))
        label = np.full((1, *self.shape), IGNORE, np.int8)
        locations: dict[Any, Any] = {1: [], 2: [], KEY: []}
        if identifier.startswith("full"):
            for axis in range(3):
                label[(0, *(slice(None),) * axis, PLANES.indices[axis][0])] = 0
            label[0, 9, 1, 1] = 2
            locations[2] = np.argwhere(label == 2)
            locations[KEY] = np.argwhere(label != IGNORE)
        return rng.normal(size=(1, *self.shape)).astype(np.float32), label, None, {"class_locations": locations}


def views(dataset: MemoryDataset) -> ViewDataset:
    labelled = [case for case in dataset.identifiers if case.startswith("full")]
    return ViewDataset(dataset, dict.fromkeys(labelled, PLANES), labelled, IGNORE)


def loader(data: ViewDataset, batch_size: int = 2, patch: tuple[int, ...] = (8, 8, 8), **options: Any):
    return TwoStreamLoader(
        data,
        options.pop("labelled_share", 0.5),
        options.pop("min_labelled", 1),
        batch_size=batch_size,
        patch_size=options.pop("initial", patch),
        final_patch_size=patch,
        label_manager=LABELS,
        oversample_foreground_percent=options.pop("oversample", 0.33),
        **options,
    )


@given(batch_size=st.integers(2, 40), share=st.floats(0.01, 1))
def test_the_labelled_share_is_rounded_up_and_both_streams_stay(batch_size, share):
    number = number_labelled(batch_size, share, 1, has_unlabelled=True)
    if share == 1:
        assert number == batch_size
    else:
        assert 1 <= number <= batch_size - 1
        assert number == batch_size - 1 or batch_size * share <= number + 1e-6 < batch_size * share + 1.00001
    assert number_labelled(batch_size, share, 1, has_unlabelled=False) == batch_size


@pytest.mark.parametrize(
    ("size", "share", "least", "labelled"),
    [(1, 0.5, 2, 1), (2, 0.5, 2, 2), (3, 0.5, 2, 2), (4, 0.5, 2, 2), (8, 0.5, 2, 4), (8, 0.1, 2, 2), (4, 0.5, 9, 4)],
)
def test_a_batch_keeps_two_labelled_samples_before_it_takes_unlabelled_ones(size, share, least, labelled):
    assert number_labelled(size, share, least, has_unlabelled=True) == labelled
    keys = loader(views(MemoryDataset()), size, labelled_share=share, min_labelled=least).get_indices()
    assert sum(key.startswith("full") for key in keys) == labelled and len(keys) == size


@pytest.mark.parametrize(("size", "labelled"), [(2, 1), (3, 2), (4, 2), (5, 3), (8, 4), (9, 5)])
def test_every_batch_holds_both_streams_labelled_first(size, labelled, recwarn):
    batches = loader(views(MemoryDataset()), size)
    for _ in range(3):
        keys = batches.generate_train_batch()["keys"]
        assert [key.startswith("full") for key in keys] == [True] * labelled + [False] * (size - labelled)
    assert not [w for w in recwarn if "annotated" in str(w.message)]  # nnU-Net's warning about each unlabelled sample


def test_a_batch_of_one_cannot_hold_both_and_says_what_to_do():
    with pytest.raises(ValueError, match=r"batch_size=2, or rada.labelled_share=1"):
        loader(views(MemoryDataset()), 1)
    assert loader(views(MemoryDataset()), 1, labelled_share=1.0).number_labelled == 1
    assert loader(views(MemoryDataset(unlabelled=0)), 1).number_labelled == 1


def test_labelled_patches_hold_annotations_and_foreground_at_its_rate():
    np.random.seed(0)
    batches = loader(views(MemoryDataset()), 2, patch=(4, 4, 4), oversample=0.33)
    found = []
    for _ in range(300):
        target = batches.generate_train_batch()["target"]
        annotated = (target[0, 0] != IGNORE) & (target[0, 0] >= 0)
        assert annotated.any() and (target[1, 0] != IGNORE).logical_and(target[1, 0] >= 0).sum() == 0
        found.append(bool((target[0, 0] == 2).any()))
    # a patch on a random annotated voxel meets that one voxel in about 2 % of all draws
    assert 0.26 < np.mean(found) < 0.42
    always = loader(views(MemoryDataset()), 2, patch=(4, 4, 4), oversample=1.0)
    assert all((always.generate_train_batch()["target"][0, 0] == 2).any() for _ in range(10))


@pytest.mark.parametrize("dummy_2d", [False, True])
def test_padding_and_what_is_turned_in_are_never_supervised(dummy_2d):
    # volumes smaller than the patch, every sample rotated and scaled by nnU-Net's own augmentation
    torch.manual_seed(0)
    np.random.seed(0)
    patch, initial = (12, 32, 28), (12 if dummy_2d else 16, 40, 36)
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-0.5, 0.5), None, (0, 1, 2), dummy_2d, use_mask_for_norm=[False], ignore_label=IGNORE
    )
    spatial = next(t for t in transforms.transforms if type(t).__name__ == "SpatialTransform")
    spatial.p_rotation = spatial.p_scaling = 1.0
    batches = loader(views(MemoryDataset(shape=(10, 20, 16))), 4, patch, initial=initial, transforms=transforms)
    batch = batches.generate_train_batch()
    label, bits = batch["target"][:, 0], batch["target"][:, 1]
    assert batch["target"].dtype == torch.int16 and set(bits.unique().tolist()) <= {0, *range(INSIDE, 16)}
    outside = bits == 0
    assert outside.float().mean() > 0.3 and bool((label[outside] == 0).any())  # nnU-Net calls it background
    for mask in (0b011, 0b101, 0b110, AXES):
        assert (supervised_target(batch["target"], mask, IGNORE)[:, 0][outside] == IGNORE).all()
    assert not unannotated(batch["target"], IGNORE)[outside].any()
    assert (supervised_target(batch["target"], AXES, IGNORE)[:2] != IGNORE).any()
    assert (supervised_target(batch["target"], AXES, IGNORE)[2:] == IGNORE).all()  # the unlabelled half


# batchgenerators' reading thread complains when its workers are ended
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_loaders_work_under_every_start_method(method, sparse_tiny):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    # nothing of this file: a new process cannot import it
    folder = str(sparse_tiny.preprocessed / sparse_tiny.name / "nnUNetPlans_3d_fullres")
    dataset = infer_dataset_class(folder)(folder)
    labelled = dataset.identifiers[:2]
    batches = loader(ViewDataset(dataset, dict.fromkeys(labelled, Planes(((5,), (), ()))), labelled, IGNORE))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        workers = NonDetMultiThreadedAugmenter(batches, None, 1, num_cached=1, wait_time=0.01)
        try:
            batch = next(workers)
        finally:
            workers._finish()
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert [key in labelled for key in batch["keys"]] == [True, False] and batch["target"].shape == (2, 2, 8, 8, 8)
