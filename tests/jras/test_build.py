"""What is drawn into the bank: from nnU-Net's preprocessed data, and from cases in memory."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_ext.jras.bank import GuideBank
from nnunetv2_ext.jras.build import BankContent, cut_patch, draw_bank
from nnunetv2_ext.jras.labels import adaptive_pool, low_res_labels, low_res_shape, mask_lut


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Cases:
    """nnU-Net's dataset interface on arrays; remembers which cases were read."""

    def __init__(self, segmentations: dict[str, np.ndarray], manager: LabelManager, channels: int = 1) -> None:
        self.segmentations, self.read = segmentations, set()
        self.identifiers = sorted(segmentations)
        wanted = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        if manager.has_ignore_label:
            wanted.append([-1, *manager.all_labels])
        self.locations = {
            name: DefaultPreprocessor._sample_foreground_locations(seg[None], wanted)
            for name, seg in segmentations.items()
        }
        # the value of a voxel tells where it lies
        self.images = {
            name: np.stack([np.arange(seg.size, dtype=np.float32).reshape(seg.shape)] * channels)
            for name, seg in segmentations.items()
        }

    def load_case(self, name):
        self.read.add(name)
        return self.images[name], self.segmentations[name][None], None, {"class_locations": self.locations[name]}


def blank(shape=(20, 24, 22)) -> np.ndarray:
    return np.zeros(shape, dtype=np.int8)


def with_boxes(shape=(20, 24, 22), classes=(1, 2)) -> np.ndarray:
    seg = blank(shape)
    for i, value in enumerate(classes):
        seg[4:12, 2 + 8 * i : 8 + 8 * i, 5:15] = value
    return seg


MANAGER = LabelManager({"background": 0, "a": 1, "b": 2}, None)


def draw(dataset, manager=MANAGER, cases=None, patch=(8, 8, 8), size=16, share=0.75, seed=0, **options) -> BankContent:
    cases = dataset.identifiers if cases is None else cases
    low = low_res_shape(patch)
    return draw_bank(dataset, cases, patch, low, size, share, manager, seed, **options)


@pytest.fixture(params=["3d_fullres", "2d"])
def real(request, tiny):
    """Preprocessed phantom data of fold 0."""
    plans = PlansManager(tiny.plans())
    configuration = plans.get_configuration(request.param)
    folder = tiny.preprocessed / tiny.name / configuration.data_identifier
    everything = infer_dataset_class(str(folder))(str(folder))
    patch = tuple(configuration.patch_size)
    return SimpleNamespace(
        dataset=everything,
        train=everything.identifiers[2:],
        patch=patch,
        low=low_res_shape(patch),
        manager=plans.get_label_manager(tiny.dataset_json()),
    )


# ---- real data -------------------------------------------------------------------------------------------------------
def test_content_of_a_bank_of_preprocessed_data(real):
    content = draw_bank(real.dataset, real.train, real.patch, real.low, 22, 0.75, real.manager, 3)
    channels = real.dataset.load_case(real.train[0])[0].shape[0]
    assert content.images.shape == (22, channels, *real.low)
    assert content.labels.shape == (22, *real.low)
    assert set(Counter(content.cases).values()) == {5, 6}
    assert set(content.cases) == set(real.train)
    assert content.centred.sum() == round(0.75 * 22)
    assert ((content.labels > 0) & (content.labels != 255)).any()
    # every guide again, from the volume
    for i, case in enumerate(content.cases):
        data, seg, _, _ = real.dataset.load_case(case)
        patch = (1, *real.patch) if len(real.patch) == 2 else real.patch
        # the case in the middle of a large frame of what padding must look like
        image = np.pad(data[:], [(0, 0), *[(99, 99)] * 3])
        labels = np.pad(seg[0].astype(np.int16), 99, constant_values=-2)
        box = tuple(slice(c + 99, c + 99 + p) for c, p in zip(content.coordinates[i], patch))
        image, labels = torch.from_numpy(image[(slice(None), *box)]), torch.from_numpy(labels[box])
        if len(real.patch) == 2:
            image, labels = image[:, 0], labels[0]
        assert torch.allclose(content.images[i], adaptive_pool(image[None], real.low)[0], atol=1e-6)
        assert torch.equal(content.labels[i], low_res_labels(labels, real.low, labels == -2))
        assert not content.centred[i] or (labels > 0).any()
        same = cut_patch(data, seg, content.coordinates[i], real.patch)
        assert torch.equal(same[0], image)
        assert torch.equal(same[1], labels)
        assert torch.equal(same[2], labels == -2)


def test_the_bank_takes_the_content_and_gives_back_the_values(real):
    content = draw_bank(real.dataset, real.train, real.patch, real.low, 8, 0.75, real.manager, 3)
    bank = GuideBank(content.images.shape[1], real.manager.num_segmentation_heads, real.low)
    bank.fill(content.images, content.labels, torch.arange(8), mask_lut(real.manager))
    stored = bank.stored_images(torch.arange(8))
    assert ((stored - content.images).abs() <= 1e-3 * content.images.abs() + 1e-6).all()
    assert torch.equal(bank.masks(torch.arange(8)).argmax(1), content.labels.long())


def test_the_same_draw_on_every_rank_and_another_with_another_seed(real):
    def draw_again(seed, cases):
        return draw_bank(real.dataset, cases, real.patch, real.low, 10, 0.5, real.manager, seed)

    first = draw_again(1, real.train)
    np.random.seed(5)  # ranks differ in their global state
    torch.manual_seed(5)
    second, other = draw_again(1, list(reversed(real.train))), draw_again(2, real.train)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.cases == second.cases
    np.testing.assert_array_equal(first.coordinates, second.coordinates)
    assert not np.array_equal(first.coordinates, other.coordinates)


def test_drawing_touches_no_global_random_state():
    dataset = Cases({n: with_boxes() for n in "ab"}, MANAGER)
    np.random.seed(0)
    before = random.getstate(), torch.get_rng_state()
    draw(dataset)
    after = np.random.random()
    np.random.seed(0)
    assert np.random.random() == after
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# ---- rules -----------------------------------------------------------------------------------------------------------
def test_no_other_case_is_read():
    dataset = Cases({name: with_boxes() for name in ("train_1", "train_2", "val_1", "val_2")}, MANAGER)
    content = draw(dataset, cases=["train_2", "train_1"])
    assert set(content.cases) == dataset.read == {"train_1", "train_2"}


@pytest.mark.parametrize(("size", "expected"), [(3, {1}), (5, {1}), (6, {1, 2}), (13, {2, 3})])
def test_patches_are_spread_evenly(size, expected):
    dataset = Cases({f"c{i}": with_boxes() for i in range(5)}, MANAGER)
    content = draw(dataset, size=size)
    counts = Counter(content.cases)
    assert len(content.cases) == size
    assert set(counts.values()) == expected
    assert len(counts) == min(size, 5)


def test_more_cases_than_guides_another_seed_takes_others():
    dataset = Cases({f"c{i}": with_boxes() for i in range(5)}, MANAGER)
    assert len({draw(dataset, size=3, seed=seed).cases for seed in range(6)}) > 1


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_share_centred_on_foreground(share, seed):
    dataset = Cases({f"c{i}": with_boxes() for i in range(4)}, MANAGER)
    content = draw(dataset, size=24, share=share, seed=seed)
    assert content.centred.sum() == round(share * 24)
    per_case = [content.centred[[c == name for c in content.cases]].sum() for name in dataset.identifiers]
    assert max(per_case) - min(per_case) <= 1
    for case, corner, centred in zip(content.cases, content.coordinates, content.centred):
        centre = tuple(c + 4 for c in corner)
        assert not centred or dataset.segmentations[case][centre] > 0  # no patch touches the border here


def test_classes_are_drawn_equally_often_although_one_is_large_and_one_is_rare():
    segmentations = {f"c{i}": blank((30, 30, 30)) for i in range(6)}
    for i, seg in enumerate(segmentations.values()):
        seg[5:25, 5:25, 5:15] = 1
        if i < 3:
            seg[10:14, 10:14, 20:24] = 2
    dataset = Cases(segmentations, MANAGER)
    content = draw(dataset, size=24, share=1.0)
    values = Counter(
        int(dataset.segmentations[case][tuple(c + 4 for c in corner)])
        for case, corner in zip(content.cases, content.coordinates)
    )
    assert values == {1: 12, 2: 12}


def test_cases_without_foreground_give_other_patches_and_the_share_is_met_by_the_rest():
    dataset = Cases({"empty": blank(), "full": with_boxes()}, MANAGER)
    content = draw(dataset, size=12, share=0.5)
    assert Counter(content.cases) == {"empty": 6, "full": 6}
    assert [bool(c) for c in content.centred] == [case == "full" for case in content.cases]


def test_structures_thinner_than_a_cell_are_background_in_the_bank():
    assert not draw(Cases({"a": blank(), "b": blank()}, MANAGER)).labels.any()
    thin = {n: blank() for n in "ab"}
    for seg in thin.values():
        seg[10, 10, :] = 1  # a line is 1/16 of a cell of 4 x 4 x 4
    manager = LabelManager({"background": 0, "a": 1}, None)
    content = draw_bank(Cases(thin, manager), "ab", (16, 16, 16), (4, 4, 4), 8, 1.0, manager, 0)
    assert not content.labels.any()
    assert content.centred.all()


def test_patches_stay_inside_and_outside_is_255_where_the_image_is_smaller():
    dataset = Cases({n: with_boxes((20, 24, 5), (1,)) for n in "ab"}, MANAGER, channels=2)
    content = draw(dataset, patch=(8, 8, 16), size=40)
    low, high = content.coordinates.min(0), content.coordinates.max(0)
    assert (low[:2] >= 0).all()
    assert (high[:2] <= [12, 16]).all()
    assert low[2] == high[2] == -5  # 5 voxels in the middle of 16
    assert content.images.shape[1] == 2
    outside = content.labels == 255
    # cells of 2 voxels: -5..-4, -3..-2 are outside, -1..0 is half and stays, 5..6 and later are outside
    assert outside.all(dim=(0, 1, 2)).tolist() == [True, True, False, False, False, True, True, True]
    assert outside.any(dim=(0, 1, 2)).tolist() == outside.all(dim=(0, 1, 2)).tolist()
    image, labels, beyond = cut_patch(*dataset.load_case("a")[:2], content.coordinates[0], (8, 8, 16))
    assert beyond.sum() == 8 * 8 * 11
    assert not image[:, beyond].any()
    assert (labels[~beyond] >= 0).all()


def test_with_an_ignore_label_every_patch_shows_annotation():
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    segmentations = {n: np.full((20, 60, 22), 2, dtype=np.int8) for n in ("one", "two", "nothing")}
    for n in ("one", "two"):
        segmentations[n][:, 20:30, :] = 0
        segmentations[n][8:12, 22:26, 8:12] = 1
    content = draw(Cases(segmentations, manager), manager, size=32, share=0.5)
    assert set(content.cases) == {"one", "two"}
    for corner, case in zip(content.coordinates, content.cases):
        crop = segmentations[case][tuple(slice(c, c + 8) for c in corner)]
        assert (crop != 2).any()
    assert (content.labels == 255).any()
    assert content.centred.sum() == 16


def test_regions_are_classes_to_centre_on_and_channels_of_the_mask():
    manager = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    content = draw(Cases({n: with_boxes() for n in "ab"}, manager), manager, size=8, share=1.0)
    assert content.centred.all()


@pytest.mark.parametrize("axes", [(0, 1, 2), (1,), ()])
def test_guides_are_stored_in_every_orientation_equally_often(axes):
    dataset = Cases({name: with_boxes() for name in "abcd"}, MANAGER)
    plain, turned = (draw(dataset, size=32, mirror_axes=a) for a in ((), axes))
    assert not plain.mirrored.any()
    assert set(Counter(map(tuple, turned.mirrored.tolist())).values()) == {32 // 2 ** len(axes)}
    assert not turned.mirrored[:, [a for a in range(3) if a not in axes]].any()
    assert np.array_equal(plain.coordinates, turned.coordinates)
    for i, row in enumerate(turned.mirrored.tolist()):
        where = [axis for axis in range(3) if row[axis]]
        assert torch.equal(turned.images[i], plain.images[i].flip([axis + 1 for axis in where]))
        assert torch.equal(turned.labels[i], plain.labels[i].flip(where))


def test_two_dimensional_patches_are_single_slices_of_the_first_axis():
    dataset = Cases({n: with_boxes() for n in "ab"}, MANAGER)
    content = draw(dataset, patch=(8, 8), size=12)
    assert content.images.shape == (12, 1, 8, 8)
    for i, (case, (z, y, x)) in enumerate(zip(content.cases, content.coordinates)):
        assert torch.equal(content.images[i, 0], torch.from_numpy(dataset.images[case][0, z, y : y + 8, x : x + 8]))
        assert not content.centred[i] or dataset.segmentations[case][z, y + 4, x + 4] > 0


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cases", "options", "message"),
    [
        (["a_1"], {}, r"1 of the 1 training case.*1 subject"),
        (["a_1", "a_2"], {"subjects": {"a_1": "a", "a_2": "a"}}, r"2 of the 2 training case.*1 subject.*group_regex"),
    ],
)
def test_mistakes_are_told_in_one_line(cases, options, message):
    dataset = Cases({n: with_boxes() for n in ("a_1", "a_2", "b_1")}, MANAGER)
    with pytest.raises(ValueError, match=message) as error:
        draw(dataset, cases=cases, **options)
    assert "\n" not in str(error.value)


def test_data_that_annotate_nothing_and_an_image_with_nan():
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    nothing = Cases({n: np.full((20, 24, 22), 2, dtype=np.int8) for n in "ab"}, manager)
    with pytest.raises(ValueError, match=r"0 of the 2 training case.*annotated"):
        draw(nothing, manager)
    broken = Cases({n: with_boxes() for n in "ab"}, MANAGER)
    broken.images["b"][:] = np.nan
    with pytest.raises(ValueError, match="case b holds values that are not finite"):
        draw(broken)
