"""What the bank stores, in how many bytes, and how it is loaded, moved and copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from nnunetv2_ext.jras.bank import STORED_DTYPES, GuideBank, stored

P = (4, 3, 5)
LUT = torch.eye(256, 3, dtype=torch.uint8)


def filled(number: int = 12, seed: int = 0) -> GuideBank:
    generator = torch.Generator().manual_seed(seed)
    bank = GuideBank(2, 3, P)
    images = torch.randn(number, 2, *P, generator=generator)
    labels = torch.randint(0, 3, (number, *P), generator=generator, dtype=torch.uint8)
    bank.fill(stored(images, labels, torch.arange(number) // 3, LUT))
    return bank


@pytest.mark.parametrize("size", [1e-3, 1.0, 3e3, 1e6])
def test_a_byte_holds_an_intensity_to_half_a_step_of_its_patchs_range(size):
    images = size * torch.randn(4, 2, *P, generator=torch.Generator().manual_seed(0)) + 5
    images[:, 1] *= 100  # channels have ranges of their own
    bank = GuideBank(2, 3, P)
    bank.fill(stored(images, torch.zeros(4, *P), torch.zeros(4), LUT))
    flat = images.flatten(2)
    step = (flat.amax(2) - flat.amin(2)) / 255
    assert ((bank.stored_images(torch.arange(4)) - images).flatten(2).abs() <= 0.51 * step[..., None]).all()


def test_single_extreme_voxels_do_not_take_all_the_steps():
    images = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    images[..., 0, :4] = torch.tensor([1e6, -1e6, 1e6, -1e6])
    bank = GuideBank(1, 3, (64, 64))
    bank.fill(stored(images, torch.zeros(1, 64, 64), torch.zeros(1), LUT))
    off = (bank.stored_images(torch.arange(1)) - images).flatten().abs()
    assert off.sort().values[: -(2 * 5 + 4)].max() < 0.02


def test_a_patch_of_one_intensity_is_that_intensity():
    bank = GuideBank(1, 3, P)
    bank.fill(stored(torch.full((2, 1, *P), 7.5), torch.zeros(2, *P), torch.zeros(2), LUT))
    assert (bank.stored_images(torch.arange(2)) == 7.5).all()


def test_masks_are_one_hot_regions_are_membership_and_255_is_unknown():
    bank = GuideBank(1, 3, (2, 2))
    lut = torch.zeros(256, 3, dtype=torch.uint8)
    lut[1], lut[2], lut[3] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[[0, 1], [2, 3]], [[255, 3], [255, 0]]])
    bank.fill(stored(torch.zeros(2, 1, 2, 2), labels, torch.arange(2), lut))
    masks, known = bank.masks(torch.tensor([1, 0]))
    assert masks[1].tolist() == [[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[0, 0], [0, 1]]]
    assert masks[0].tolist() == [[[0, 1], [0, 0]]] * 3
    assert known[0].tolist() == [[[False, True], [False, True]]] and known[1].all()


def test_a_guide_costs_a_byte_a_voxel_for_each_channel_and_the_label():
    bank = GuideBank(2, 3, P)
    empty = sum(buffer.nbytes for buffer in bank.buffers())
    bank.fill(filled(3).state_dict())
    assert sum(buffer.nbytes for buffer in bank.buffers()) - empty == 3 * (60 * 3 + 2 * 2 * 4 + 8)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d])
def test_another_memory_layout_of_the_network_leaves_the_bank_alone(layout):
    bank = filled()
    before = copy.deepcopy(bank.state_dict())
    assert all(torch.equal(v, before[name]) for name, v in bank.to(memory_format=layout).state_dict().items())


def test_types_survive_casting_the_network():
    bank = filled()
    before = copy.deepcopy(bank.state_dict())
    for cast in (bank.double, bank.float):
        cast()
        assert all(getattr(bank, name).dtype == dtype for name, dtype in STORED_DTYPES.items())
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())


class Network(nn.Module):
    def __init__(self, bank: GuideBank) -> None:
        super().__init__()
        self.linear, self.bank = nn.Linear(2, 2), bank


@pytest.mark.parametrize("sizes", [(12, 5), (5, 12), (12, 0), (0, 12), (7, 7)])
def test_a_network_takes_a_bank_of_whatever_size(sizes):
    source, target = (Network(filled(n) if n else GuideBank(2, 3, P)) for n in sizes)
    target.load_state_dict(source.state_dict(), strict=True)
    assert len(target.bank) == sizes[0] and target.bank.is_empty == (sizes[0] == 0)
    assert all(torch.equal(getattr(target.bank, name), getattr(source.bank, name)) for name in STORED_DTYPES)


def test_what_is_loaded_under_inference_mode_can_be_written_to_later():
    target = Network(GuideBank(2, 3, P))
    for number in (9, 4):  # the predictor, fold after fold
        with torch.inference_mode():
            target.load_state_dict(Network(filled(number)).state_dict())
    target.bank.labels.zero_()  # an inference tensor would refuse
    with torch.inference_mode():
        target.bank._apply(lambda t: t.clone())  # what .to(another device) does
    target.load_state_dict(Network(filled(4, seed=2)).state_dict())
    assert torch.equal(target.bank.images, filled(4, seed=2).images)


@pytest.mark.parametrize("other", [GuideBank(2, 3, (4, 4, 4)), GuideBank(2, 2, P)])
def test_a_bank_of_another_patch_size_or_other_labels_is_refused(other):
    with pytest.raises(ValueError, match="patch size, channels or labels") as error:
        Network(other).load_state_dict(Network(filled()).state_dict())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent_and_knows_the_same(duplicate):
    network = Network(filled())
    twin = duplicate(network)
    assert torch.equal(twin.bank.images, network.bank.images)
    twin.load_state_dict(Network(filled(5, seed=4)).state_dict())
    assert len(network.bank) == 12 and len(twin.bank) == 5
