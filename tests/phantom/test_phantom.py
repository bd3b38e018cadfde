import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import label as connected_components

from nnunetv2_ext.phantom import MAX_ORGANS, MIN_VOXELS, make_phantom, write_phantom_dataset

TINY = (24, 32, 24)


def test_same_arguments_give_the_same_case():
    first, second = make_phantom(5, TINY), make_phantom(5, TINY)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


def test_another_seed_is_another_patient_and_other_noise():
    (image_a, label_a), (image_b, label_b) = make_phantom(5, TINY), make_phantom(6, TINY)
    assert (label_a != label_b).any()
    air = (slice(0, 1),) * 3
    assert image_a[air] != image_b[air]


def test_types_shapes_and_range():
    image, label = make_phantom(0, (20, 25, 30), num_organs=4)
    assert image.dtype == np.float32 and label.dtype == np.uint8
    assert image.shape == label.shape == (20, 25, 30)
    assert np.isfinite(image).all() and image.min() >= 0
    assert set(np.unique(label)) == set(range(5))


def test_input_random_state_is_left_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    make_phantom(0, TINY)
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize("shape", [(MIN_VOXELS,) * 3, TINY])
def test_every_organ_is_there_even_in_the_smallest_scan(shape):
    for seed in range(40):
        assert len(np.unique(make_phantom(seed, shape, num_organs=MAX_ORGANS)[1])) == MAX_ORGANS + 1


def test_organs_are_inside_the_body_and_mostly_one_piece():
    for seed in range(5):
        image, label = make_phantom(seed, (40, 40, 40), noise=0.0, bias_field=0.0)
        assert not any(label.take((0, -1), axis=axis).any() for axis in range(3))
        assert image[0, 0, 0] == 0  # a corner is air
        for organ in (1, 2, 3):
            pieces, number = connected_components(label == organ)
            assert np.bincount(pieces.ravel())[1:].max() > 0.97 * (label == organ).sum(), number


def test_organs_keep_their_place_between_cases_but_not_their_shape():
    labels = [make_phantom(seed, (32, 32, 32))[1] for seed in range(12)]
    for organ in (1, 2, 3):
        masks = np.array([label == organ for label in labels])
        centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
        others = [np.argwhere(labels[0] == k).mean(0) for k in (1, 2, 3) if k != organ]
        spread = np.linalg.norm(centres - centres.mean(0), axis=1).max()
        assert spread < min(np.linalg.norm(centres.mean(0) - other) for other in others) / 2
        overlap = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
        assert 0.3 < overlap < 0.95


def test_two_contrasts_of_a_seed_show_one_anatomy_in_another_order_of_brightness():
    settings = {"shape": (32, 32, 32), "bias_field": 0.0, "noise": 0.0, "num_organs": 2}
    t1, label = make_phantom(7, contrast="T1", **settings)
    t2, label_t2 = make_phantom(7, contrast="T2", **settings)
    assert np.array_equal(label, label_t2)
    assert np.median(t1[label == 1]) > np.median(t1[label == 2])
    assert np.median(t2[label == 1]) < np.median(t2[label == 2])


def test_fewer_organs_leave_the_others_where_they_are():
    two, five = (make_phantom(7, TINY, num_organs=n)[1] for n in (2, 5))
    assert (five > 2).any()
    assert ((five == 1) <= (two == 1)).all()  # a new neighbour may take a border voxel, nothing is added


def test_the_anatomy_does_not_depend_on_the_grid():
    coarse = make_phantom(3, (16, 16, 16))[1]
    fine = make_phantom(3, (48, 48, 48))[1]
    resampled = fine[1::3, 1::3, 1::3]  # centres of the coarse voxels
    assert (coarse == resampled).mean() > 0.97
    assert make_phantom(3, (48, 48, 16), spacing=(1, 1, 3))[1].shape == (48, 48, 16)


def test_without_imperfections_only_the_tissues_remain():
    image, label = make_phantom(1, TINY, num_organs=3, bias_field=0.0, noise=0.0, partial_volume=False)
    assert len(np.unique(image)) == 6  # air, fat, body, three organs
    assert all(len(np.unique(image[label == organ])) == 1 for organ in (1, 2, 3))


def test_partial_volume_mixes_tissues_at_borders_only():
    settings = {"shape": (32, 32, 32), "bias_field": 0.0, "noise": 0.0}
    mixed = make_phantom(1, partial_volume=True, **settings)[0]
    pure = np.unique(make_phantom(1, partial_volume=False, **settings)[0])
    assert mixed.max() <= pure.max() + 1e-6
    unmixed = np.abs(mixed[..., None] - pure).min(-1) < 1e-6
    assert 0.6 < unmixed.mean() < 0.98


def test_thick_slices_mix_more():
    def mixed_share(spacing):
        settings = {"shape": (32, 32, 16), "spacing": spacing, "bias_field": 0.0, "noise": 0.0}
        pure = np.unique(make_phantom(1, partial_volume=False, **settings)[0])
        return (np.abs(make_phantom(1, **settings)[0][..., None] - pure).min(-1) > 1e-6).mean()

    assert mixed_share((1, 1, 4)) > 1.05 * mixed_share((1, 1, 1))


def test_bias_field_is_multiplicative_smooth_and_bounded():
    clean = make_phantom(1, (32, 32, 32), bias_field=0.0, noise=0.0)[0]
    biased = make_phantom(1, (32, 32, 32), bias_field=0.3, noise=0.0)[0]
    inside = clean > 0
    log_gain = np.zeros_like(clean)
    log_gain[inside] = np.log(biased[inside] / clean[inside])
    assert 0.1 < np.abs(log_gain).max() < 0.31
    both = inside[1:] & inside[:-1]
    assert np.abs(np.diff(log_gain, axis=0)[both]).max() < 0.08
    assert (biased[~inside] == 0).all()


def test_noise_in_air_is_rayleigh_distributed():
    # without signal the Rician distribution is Rayleigh's: mean sigma * sqrt(pi / 2), mean square 2 sigma^2
    clean = make_phantom(2, (40, 40, 40), bias_field=0.0, noise=0.0)[0]
    noisy = make_phantom(2, (40, 40, 40), bias_field=0.0, noise=0.05)[0]
    air = noisy[clean == 0]
    assert air.size > 10000
    assert air.mean() == pytest.approx(0.05 * np.sqrt(np.pi / 2), rel=0.02)
    assert (air**2).mean() == pytest.approx(2 * 0.05**2, rel=0.03)


def test_slab_size_does_not_change_the_case(monkeypatch):
    whole = make_phantom(4, TINY)
    monkeypatch.setattr("nnunetv2_ext.phantom.image._SLAB_POINTS", 1)
    slabs = make_phantom(4, TINY)
    assert np.allclose(whole[0], slabs[0], atol=1e-6) and np.array_equal(whole[1], slabs[1])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("shape", (24, 24)),
        ("shape", (24, 24, MIN_VOXELS - 1)),
        ("shape", (24, 24, 20.5)),
        ("spacing", (1, 1, 0)),
        ("spacing", (1, 1, float("nan"))),
        ("num_organs", 0),
        ("num_organs", MAX_ORGANS + 1),
        ("contrast", "CT"),
        ("bias_field", -0.1),
        ("noise", float("inf")),
    ],
)
def test_bad_argument_is_named(argument, value):
    settings = {"seed": 0, "shape": TINY, argument: value}
    with pytest.raises(ValueError, match=f"phantom {argument} must"):
        make_phantom(**settings)


def _read(path):
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), image.GetSpacing()


def test_dataset_is_accepted_by_nnunet_and_holds_the_cases(tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder = write_phantom_dataset(
        tmp_path, 7, num_train=3, num_test=2, shape=TINY, spacing=(1, 1, 2.5), num_organs=2, channels=2
    )
    assert folder == tmp_path / "Dataset007_Phantom"
    verify_dataset_integrity(str(folder), num_processes=1)
    assert sorted(p.name for p in (folder / "imagesTs").iterdir()) == [
        f"phantom_{case}_000{channel}.nii.gz" for case in ("003", "004") for channel in (0, 1)
    ]
    assert len(list((folder / "labelsTs").iterdir())) == 2
    image, spacing = _read(folder / "imagesTr" / "phantom_000_0000.nii.gz")
    label, _ = _read(folder / "labelsTr" / "phantom_000.nii.gz")
    assert spacing == (1, 1, 2.5)
    assert image.shape == label.shape
    assert np.abs(np.array(image.shape) / TINY - 1).max() < 0.1
    assert set(np.unique(label)) == {0, 1, 2}


def test_dataset_is_the_same_for_a_seed_and_no_patient_comes_twice(tmp_path):
    settings = {"num_train": 3, "num_test": 2, "shape": TINY, "num_organs": 2, "vary_size": False}
    first = write_phantom_dataset(tmp_path / "a", 1, **settings)
    second = write_phantom_dataset(tmp_path / "b", 1, **settings)
    other = write_phantom_dataset(tmp_path / "c", 1, seed=1, **settings)
    labels = []
    for split, case in (("Tr", "000"), ("Tr", "001"), ("Tr", "002"), ("Ts", "003"), ("Ts", "004")):
        path = f"labels{split}/phantom_{case}.nii.gz"
        labels.append(_read(first / path)[0])
        assert labels[-1].shape == TINY
        assert np.array_equal(labels[-1], _read(second / path)[0])
        assert not np.array_equal(labels[-1], _read(other / path)[0])
    assert all((a != b).any() for i, a in enumerate(labels) for b in labels[:i])


def test_dataset_with_regions_and_ignore(tmp_path):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    folder = write_phantom_dataset(
        tmp_path, 3, num_train=4, num_test=1, shape=TINY, num_organs=3, regions=True, ignore=True
    )
    description = json.loads((folder / "dataset.json").read_text())
    manager = LabelManager(description["labels"], description["regions_class_order"])
    assert manager.has_regions and manager.ignore_label == 4
    assert manager.foreground_regions == [(1, 2, 3), (2,), (3,)]
    # hand-made logits: `whole` alone is label 1, `whole` and organ_3 is label 3, nothing is 0
    logits = -np.ones((3, 1, 1, 3), dtype=np.float32)
    logits[0, ..., :2] = 1
    logits[2, ..., 1] = 1
    assert manager.convert_logits_to_segmentation(logits).ravel().tolist() == [1, 3, 0]
    first, _ = _read(folder / "labelsTr" / "phantom_000.nii.gz")
    ignored_slices = (first == 4).any(axis=(0, 1))
    assert 0 < ignored_slices.mean() < 0.5
    assert (first[..., ~ignored_slices] > 0).any()
    assert (_read(folder / "labelsTs" / "phantom_004.nii.gz")[0] < 4).all()


def test_existing_dataset_is_not_touched(tmp_path):
    (tmp_path / "Dataset004_Mine").mkdir()
    with pytest.raises(ValueError, match="Dataset004_Mine exists"):
        write_phantom_dataset(tmp_path, 4, shape=TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["Dataset004_Mine"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_id": 0}, "dataset_id"),
        ({"name": "a b"}, "dataset name"),
        ({"num_train": 0}, "num_train"),
        ({"num_test": -1}, "num_test"),
        ({"channels": 3}, "channels"),
        ({"regions": True, "num_organs": 1}, "regions"),
        ({"shape": (8, 8, 8)}, "shape"),
        ({"num_organs": 0}, "num_organs"),
    ],
)
def test_bad_dataset_argument_writes_nothing(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write_phantom_dataset(tmp_path, **{"dataset_id": 1, **settings})
    assert not list(tmp_path.iterdir())
