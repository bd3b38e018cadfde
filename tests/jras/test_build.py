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

from nnunetv2_ext.jras.build import BankContent, draw_bank


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


def draw(dataset, manager=MANAGER, cases=None, patch=(8, 8, 8), size=16, share=0.75, seed=0) -> BankContent:
    cases = dataset.identifiers if cases is None else cases
    return draw_bank(dataset, cases, patch, size, share, manager, seed)


def corners(dataset: Cases, content: BankContent) -> list[tuple[int, ...]]:
    """Lowest voxel of every patch that lies inside its image."""
    firsts = [int(image[0].flatten()[0]) for image in content.images]
    return [np.unravel_index(n, dataset.segmentations[case].shape) for n, case in zip(firsts, content.cases)]


def centred(dataset: Cases, content: BankContent) -> int:
    """Patches with foreground in the middle."""
    return sum(int(label[tuple(n // 2 for n in label.shape)]) not in (0, 255) for label in content.labels)


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
        manager=plans.get_label_manager(tiny.dataset_json()),
    )


# ---- real data


def test_content_of_a_bank_of_preprocessed_data(real):
    content = draw_bank(real.dataset, real.train, real.patch, 22, 0.75, real.manager, 3)
    channels = real.dataset.load_case(real.train[0])[0].shape[0]
    number = len(content.cases)
    assert 18 <= number <= 22 and content.images.shape == (number, channels, *real.patch)
    assert content.labels.shape == (number, *real.patch) and set(content.cases) == set(real.train)
    assert len({image.numpy().tobytes() for image in content.images}) == number
    assert content.labels.max() <= 2 and (content.labels > 0).any()
    # a guide is somewhere in its volume, image and label at the same place
    data, seg, _, _ = real.dataset.load_case(content.cases[0])
    patch = (1, *real.patch) if len(real.patch) == 2 else real.patch
    guide = content.images[0, 0].numpy().reshape(patch)
    image, label = np.pad(data[0], 24), np.pad(seg[0].clip(0), 24)
    middle = tuple(n // 2 for n in patch)
    places = [place - np.array(middle) for place in np.argwhere(image == guide[middle])]
    boxes = [tuple(slice(c, c + p) for c, p in zip(place, patch)) for place in places]
    (box,) = (box for box in boxes if image[box].shape == patch and np.array_equal(image[box], guide))
    assert np.array_equal(label[box].reshape(real.patch), content.labels[0].numpy())


def test_the_same_draw_on_every_rank_and_another_with_another_seed(real):
    def draw_again(seed, cases):
        return draw_bank(real.dataset, cases, real.patch, 10, 0.5, real.manager, seed)

    first = draw_again(1, real.train)
    np.random.seed(5)  # ranks differ in their global state
    torch.manual_seed(5)
    second, other = draw_again(1, list(reversed(real.train))), draw_again(2, real.train)
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    assert first.cases == second.cases
    assert first.images.shape != other.images.shape or not torch.equal(first.images, other.images)


def test_drawing_touches_no_global_random_state():
    dataset = Cases({n: with_boxes() for n in "ab"}, MANAGER)
    np.random.seed(0)
    before = random.getstate(), torch.get_rng_state()
    draw(dataset)
    after = np.random.random()
    np.random.seed(0)
    assert np.random.random() == after
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


# ---- rules


def test_no_other_case_is_read():
    dataset = Cases({name: with_boxes() for name in ("train_1", "train_2", "val_1", "val_2")}, MANAGER)
    content = draw(dataset, cases=["train_2", "train_1"])
    assert set(content.cases) == dataset.read == {"train_1", "train_2"}


@pytest.mark.parametrize(("size", "expected"), [(3, {1}), (5, {1}), (6, {1, 2}), (13, {2, 3})])
def test_patches_are_spread_evenly(size, expected):
    dataset = Cases({f"c{i}": with_boxes() for i in range(5)}, MANAGER)
    counts = Counter(draw(dataset, size=size).cases)
    assert set(counts.values()) == expected and sum(counts.values()) == size and len(counts) == min(size, 5)


def test_more_cases_than_guides_another_seed_takes_others():
    dataset = Cases({f"c{i}": with_boxes() for i in range(5)}, MANAGER)
    assert len({draw(dataset, size=3, seed=seed).cases for seed in range(6)}) > 1


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_share_centred_on_foreground(share):
    segmentations = {f"c{i}": blank((40, 40, 40)) for i in range(4)}
    for seg in segmentations.values():
        seg[18:22, 18:22, 18:22] = 1  # by chance in the middle of a patch once in 500
    dataset = Cases(segmentations, LabelManager({"background": 0, "a": 1}, None))
    content = draw(dataset, size=24, share=share)
    assert share * 24 <= centred(dataset, content) + (24 - len(content.cases)) <= share * 24 + 2


def test_classes_are_drawn_equally_often_although_one_is_large_and_one_is_rare():
    segmentations = {f"c{i}": blank((30, 30, 30)) for i in range(6)}
    for i, seg in enumerate(segmentations.values()):
        seg[5:25, 5:25, 5:15] = 1
        if i < 3:
            seg[10:14, 10:14, 20:24] = 2
    dataset = Cases(segmentations, MANAGER)
    content = draw(dataset, size=24, share=1.0)
    assert Counter(int(label[4, 4, 4]) for label in content.labels) == {1: 12, 2: 12}


def test_equal_patches_are_kept_once():
    """An image as large as a patch has one."""
    dataset = Cases({n: with_boxes((8, 8, 8), (1,)) for n in "ab"}, MANAGER)
    assert draw(dataset, size=10).cases == ("a", "b")


def test_patches_stay_inside_and_outside_is_background_where_the_image_is_smaller():
    dataset = Cases({n: with_boxes((20, 24, 5), (1,)) + 0 for n in "ab"}, MANAGER, channels=2)
    content = draw(dataset, patch=(8, 8, 16), size=40)
    assert content.images.shape[1:] == (2, 8, 8, 16)
    inside = content.images[:, 0, :, :, 5:10].flatten(1)
    assert (inside != 0).any(1).all()
    for part in (content.images[..., :5], content.images[..., 10:], content.labels[..., :5], content.labels[..., 10:]):
        assert not part.any()


def test_with_an_ignore_label_every_patch_shows_annotation():
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    segmentations = {n: np.full((20, 60, 22), 2, dtype=np.int8) for n in ("one", "two", "nothing")}
    for n in ("one", "two"):
        segmentations[n][:, 20:30, :] = 0
        segmentations[n][8:12, 22:26, 8:12] = 1
    content = draw(Cases(segmentations, manager), manager, size=32, share=0.5)
    assert set(content.cases) == {"one", "two"}
    assert (content.labels != 255).flatten(1).any(1).all() and (content.labels == 255).any()
    assert not (content.labels == 2).any()


def test_two_dimensional_patches_are_single_slices_of_the_first_axis():
    dataset = Cases({n: with_boxes() for n in "ab"}, MANAGER)
    content = draw(dataset, patch=(8, 8), size=12)
    for case, (z, y, x), image, label in zip(content.cases, corners(dataset, content), content.images, content.labels):
        assert np.array_equal(image[0].numpy(), dataset.images[case][0, z, y : y + 8, x : x + 8])
        assert np.array_equal(label.numpy(), dataset.segmentations[case][z, y : y + 8, x : x + 8])


def test_data_that_annotate_nothing_and_an_image_with_nan():
    manager = LabelManager({"background": 0, "a": 1, "ignore": 2}, None)
    nothing = Cases({n: np.full((20, 24, 22), 2, dtype=np.int8) for n in "ab"}, manager)
    with pytest.raises(ValueError, match=r"none of the 2 case.*annotated"):
        draw(nothing, manager)
    broken = Cases({n: with_boxes() for n in "ab"}, MANAGER)
    broken.images["b"][:] = np.nan
    with pytest.raises(ValueError, match="case b holds values that are not finite"):
        draw(broken)
