"""Where a patch was taken: against images whose intensities are the coordinates of their voxels."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.rot90 import Rot90Transform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.data.loaders import PlacedDataLoader

LABELS = SimpleNamespace(all_labels=[1], has_ignore_label=False)
SHAPE = (19, 22, 25)


class Coordinates:
    """Cases whose three channels are the voxel's index along each axis, plus a number of the case's own."""

    identifiers = ("a", "b")

    def load_case(self, identifier: str):
        shape = SHAPE if identifier == "a" else (SHAPE[2], *SHAPE[:2])
        data = np.stack(np.indices(shape)).astype(np.float32)
        seg = np.zeros((1, *shape), np.int16)
        seg[0, 3:6, 4:9, 5] = 1
        return data, seg, None, {"class_locations": {1: np.argwhere(seg)}, "shape": shape}

    __getitem__ = load_case


def spatial(patch, **kwargs) -> SpatialTransform:
    always = {"p_rotation": 1, "rotation": (-0.6, 0.6), "p_scaling": 1, "scaling": (0.7, 1.4)}
    return SpatialTransform(patch, **{"patch_center_dist_from_border": 0, "random_crop": False, **always, **kwargs})


def loader(patch, initial=None, transforms=None, cls=PlacedDataLoader, batch_size=4, **kwargs):
    whole = None if transforms is None else ComposeTransforms(transforms)
    return cls(Coordinates(), batch_size, initial or patch, patch, LABELS, 0.5, transforms=whole, **kwargs)


PIPELINES = {
    "nothing": ((8, 10, 12), None, lambda p: None),
    "crop of even size": ((8, 10, 12), (13, 14, 17), lambda p: [spatial(p, p_rotation=0, p_scaling=0)]),
    "crop of odd size": ((7, 9, 11), (12, 15, 16), lambda p: [spatial(p, p_rotation=0, p_scaling=0)]),
    "rotation": ((7, 10, 11), (12, 15, 16), lambda p: [spatial(p, p_scaling=0)]),
    "rotation, scaling, mirroring": ((8, 10, 12), (14, 16, 18), lambda p: [spatial(p), MirrorTransform((0, 1, 2))]),
    "random centre": ((8, 9, 10), (14, 16, 17), lambda p: [spatial(p, random_crop=True), MirrorTransform((1,))]),
    "random centre, whole voxels": (
        (8, 9, 10),
        (14, 16, 17),
        lambda p: [spatial(p, random_crop=True, p_rotation=0, p_scaling=0), MirrorTransform((0, 2))],
    ),
    "dummy 2-D": (
        (8, 10, 12),
        (8, 16, 18),
        lambda p: [Convert3DTo2DTransform(), spatial(p[1:]), Convert2DTo3DTransform(), MirrorTransform((0, 1, 2))],
    ),
    "2-D": ((10, 12), (16, 18), lambda p: [spatial(p), MirrorTransform((0, 1))]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_matrix_takes_each_voxel_of_the_patch_to_its_place_in_the_case(name):
    patch, initial, make = PIPELINES[name]
    batches = loader(patch, initial, make(patch), with_matrices=True)
    np.random.seed(4), torch.manual_seed(4)
    compared = 0
    for _ in range(6):
        batch = batches.generate_train_batch()
        assert batch["to_case"].shape == (4, 4, 4) and batch["to_case"].dtype == torch.float32
        for sample, key, matrix, box in zip(batch["data"], batch["keys"], batch["to_case"], batch["boxes"].numpy()):
            shape = Coordinates().load_case(key)[0].shape[1:]
            patch_3d = (1, *patch) if len(patch) == 2 else patch
            index = np.indices(patch_3d).reshape(3, -1)
            place = (matrix.numpy() @ np.vstack([index, np.ones_like(index[:1])]))[:3]
            seen = sample.reshape(3, -1).numpy()
            # linear interpolation is exact, where it needs no voxel of the padding
            first, end = np.maximum(box[:, 0], 0), np.minimum(box[:, 1], shape)
            inside = ((place >= first[:, None]) & (place <= end[:, None] - 1)).all(0)
            assert np.abs(seen[:, inside] - place[:, inside]).max(initial=0) < 1e-3
            compared += int(inside.sum())
    assert compared > 6 * 4 * np.prod(patch) / 4, "most of the patches was compared"


@pytest.mark.parametrize("patch", [(8, 10, 12), (30, 9, 33), (10, 12)])
def test_the_box_is_where_the_patch_was_cut_and_negative_where_it_was_padded(patch):
    batches = loader(patch, batch_size=6)
    np.random.seed(1)
    seen_negative = False
    for _ in range(8):
        batch = batches.generate_train_batch()
        assert batch["boxes"].shape == (6, 3, 2) and batch["boxes"].dtype == torch.int64
        assert "to_case" not in batch
        for sample, key, box in zip(batch["data"], batch["keys"], batch["boxes"].numpy()):
            data = Coordinates().load_case(key)[0]
            assert tuple(box[:, 1] - box[:, 0]) == ((1, *patch) if len(patch) == 2 else patch)
            before = np.maximum(-box[:, 0], 0)
            after = np.maximum(box[:, 1] - data.shape[1:], 0)
            cut = data[(slice(None), *(slice(max(a, 0), b) for a, b in box))]
            padded = np.pad(cut, [(0, 0), *zip(before, after)])
            assert np.array_equal(sample.numpy().reshape(padded.shape), padded)
            seen_negative |= bool((box < 0).any())
    assert seen_negative == (patch == (30, 9, 33))


@pytest.mark.parametrize("with_matrices", [False, True])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_nnunets_part_of_the_batches_is_bit_equal(make_trainer, configuration, with_matrices):
    """With the trainer's own data and augmentation."""
    trainer = make_trainer(nnUNetTrainer, configuration=configuration)
    trainer.initialize()
    loaders = []
    for cls, options in ((nnUNetDataLoader, {}), (PlacedDataLoader, {"with_matrices": with_matrices})):
        transforms = trainer.get_dataloaders()[0].data_loader.transforms
        randomness.make_repeatable(transforms)
        loaders.append(
            cls(
                trainer.get_tr_and_val_datasets()[0],
                3,
                trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[2],
                trainer.configuration_manager.patch_size,
                trainer.label_manager,
                oversample_foreground_percent=0.33,
                transforms=transforms,
                **options,
            )
        )
    streams = []
    for one in loaders:
        randomness.seed_everything(9)
        streams.append([next(one) for _ in range(5)])
    for stock, ours in zip(*streams):
        assert torch.equal(stock["data"], ours["data"])
        assert all(torch.equal(a, b) for a, b in zip(stock["target"], ours["target"], strict=True))
        assert list(stock["keys"]) == list(ours["keys"])
        assert set(ours) - set(stock) == {"boxes", *(["to_case"] if with_matrices else [])}
        assert not with_matrices or bool(torch.isfinite(ours["to_case"]).all())


def test_worker_processes_hand_out_places_too():
    batches = loader((8, 10, 12), (14, 16, 18), [spatial((8, 10, 12))], with_matrices=True)
    assert pickle.loads(pickle.dumps(batches)).transforms.steps  # spawn pickles it
    workers = NonDetMultiThreadedAugmenter(batches, None, 1, 2, seeds=None)
    try:
        batch = next(workers)
    finally:
        workers._finish()
    assert batch["boxes"].shape == (4, 3, 2) and batch["to_case"].shape == (4, 4, 4)


def test_an_elastic_deformation_has_no_matrix_and_says_nan():
    torch.manual_seed(0), np.random.seed(0)
    step = spatial((8, 10, 12), p_elastic_deform=0.5, elastic_deform_scale=0.2, elastic_deform_magnitude=2)
    batches = loader((8, 10, 12), (14, 16, 18), [step], with_matrices=True)
    drawn = torch.cat([batches.generate_train_batch()["to_case"] for _ in range(4)])
    nan = drawn.isnan().flatten(1)
    assert 0 < int(nan.any(1).sum()) < len(nan)
    assert torch.equal(nan[:, :12].all(1), nan[:, :12].any(1))


@pytest.mark.parametrize("step", [Rot90Transform(1), RandomTransform(MirrorTransform((0,)), 0.5)])
def test_what_moves_voxels_in_another_way_is_refused_where_matrices_are_wanted(step):
    loader((8, 10, 12), transforms=[step])
    with pytest.raises(ValueError, match="with_matrices=False"):
        loader((8, 10, 12), transforms=[step], with_matrices=True)
    harmless = RandomTransform(SimulateLowResolutionTransform((0.5, 1), False, False, None, None), 0.5)
    loader((8, 10, 12), transforms=[harmless], with_matrices=True)
