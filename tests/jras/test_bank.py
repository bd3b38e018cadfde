"""The bank: exclusion, storage, state, copies, and its place in compiled graphs."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunetv2_ext.jras.bank import STORED_DTYPES, GuideBank

L = (4, 3, 5)
LUT = torch.eye(256, 3, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def filled(number: int = 12, groups: list[int] | None = None, seed: int = 0, **options) -> GuideBank:
    """A bank of random guides; image i holds values around i, so that rows are told apart."""
    generator = torch.Generator().manual_seed(seed)
    bank = GuideBank(2, 3, L, key_dim=8, **options)
    images = torch.randn(number, 2, *L, generator=generator) + torch.arange(number).view(-1, 1, 1, 1, 1)
    labels = torch.randint(0, 3, (number, *L), generator=generator, dtype=torch.uint8)
    of = torch.tensor(groups) if groups is not None else torch.arange(number) // 3
    bank.fill(images, labels, of, LUT)
    bank.set_keys(F.normalize(torch.randn(number, 8, generator=generator), dim=1))
    return bank


def queries(number: int, seed: int = 7) -> torch.Tensor:
    return F.normalize(torch.randn(number, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---- lookup ----------------------------------------------------------------------------------------------------------
def test_the_guides_are_the_rows_of_the_bank():
    bank, q = filled(), queries(3)
    guides = bank.lookup(q, 4)
    assert guides.valid.all()
    assert guides.ids.tolist() == (q @ bank.keys.T).topk(4).indices.tolist()
    assert [tuple(t.shape) for t in guides] == [(3, 4), (3, 4), (3, 4, 2, *L), (3, 4, 3, *L), (3, 4, 8)]
    assert torch.equal(guides.images, bank.images[guides.ids].float())
    assert torch.equal(guides.masks.argmax(2), bank.labels[guides.ids].long())
    assert torch.equal(guides.keys, bank.keys[guides.ids])
    assert guides.images.dtype == guides.masks.dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=15), k=st.integers(1, 6), random=st.booleans())
def test_no_guide_of_the_own_group_ever_and_all_others_as_long_as_there_are(groups, k, random):
    bank = filled(len(groups), groups)
    own = torch.arange(5)
    guides = bank.lookup(queries(5), k, own, random=random)
    for row in range(5):
        others = sum(group != row for group in groups)
        assert guides.valid[row].sum() == min(k, others)
        assert (bank.groups[guides.ids[row, guides.valid[row]]] != row).all()
    assert guides.ids.min() >= 0
    for blank in (guides.images, guides.masks, guides.keys):
        assert not blank[~guides.valid].any()


def test_canary_the_last_guide_is_poison_and_minus_one_would_fetch_it():
    bank = filled(7, [0, 0, 0, 1, 1, 1, 2])
    bank.images[-1] = torch.nan
    for random in (False, True):
        guides = bank.lookup(queries(20), 6, torch.full((20,), 2), random=random)
        assert guides.images.isfinite().all()
        assert bank.lookup(queries(20), 7, random=random).images.isnan().any()  # it can be found, so the canary lives
    # fewer left than asked for: invalid slots hold row 0, blanked
    guides = bank.lookup(queries(20), 40, torch.full((20,), 2))
    assert guides.valid.sum(1).tolist() == [6] * 20
    assert guides.images.isfinite().all()


def test_a_query_in_the_bank_finds_itself_only_where_exclusion_is_off():
    # the leak canary of the method: every training patch is its own nearest guide
    bank = filled(12)
    assert (bank.lookup(bank.keys, 1).ids.flatten() == torch.arange(12)).all()
    honest = bank.lookup(bank.keys, 4, bank.groups)
    assert (bank.groups[honest.ids] != bank.groups[:, None]).all()
    assert honest.valid.all()


def test_one_group_only_leaves_nothing_and_an_empty_bank_is_not_asked():
    guides = filled(5, [3] * 5).lookup(queries(2), 2, torch.tensor([3, 4]))
    assert guides.valid.tolist() == [[False, False], [True, True]]
    assert not guides.images[0].any()
    with pytest.raises(ValueError, match="empty guide bank"):
        GuideBank(2, 3, L, key_dim=8).lookup(queries(2), 4)


def test_more_guides_than_the_bank_holds():
    guides = filled(3).lookup(queries(2), 8)
    assert guides.valid.tolist() == [[True] * 3 + [False] * 5] * 2
    assert not guides.masks[:, 3:].any()


def test_dedup_drops_the_query_itself():
    bank = filled(12, dedup_cosine=0.999)
    assert (bank.lookup(bank.keys, 3).ids != torch.arange(12)[:, None]).all()


def test_lookup_has_no_gradient_and_takes_half_precision_queries():
    q = queries(2).requires_grad_()
    assert not any(t.requires_grad for t in filled().lookup(q, 2))
    assert filled().lookup(q.half(), 2).keys.dtype == torch.float32


def test_an_embedding_that_is_not_finite_names_its_case_and_leaves_the_keys():
    bank = filled()
    before, keys = bank.keys.clone(), bank.keys.clone()
    keys[4, 1] = torch.nan
    keys[5, 0] = torch.inf
    cases = [f"case_{i // 3}" for i in range(12)]
    with pytest.raises(ValueError, match=r"2 of 12 guide embeddings .*\(of: case_1\)"):
        bank.set_keys(keys, cases)
    assert torch.equal(bank.keys, before)


# ---- what is stored --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1.0, 3e3, 5.9e4, 1e6])
def test_half_precision_changes_no_value_by_more_than_a_thousandth(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 2, *L, generator=generator)
    images *= torch.tensor([1.0, size]).view(1, 2, 1, 1, 1) / images.abs().max()
    bank = GuideBank(2, 3, L, key_dim=8)
    bank.fill(images, torch.zeros(4, *L), torch.zeros(4), LUT)
    stored = bank.stored_images(torch.arange(4))
    big = images.abs() > 1e-4 * images.abs().amax(dim=(0, 2, 3, 4), keepdim=True)
    assert ((stored - images).abs() / images.abs())[big].max() < 1e-3
    assert bank.scale[0] == 1  # channels are scaled one by one, and only beyond 6e4
    assert (bank.scale[1] == 1) == (size < 6e4)


def test_masks_are_one_hot_regions_are_membership_and_255_is_nothing():
    bank = GuideBank(1, 3, (2, 2), key_dim=4)
    lut = torch.zeros(256, 3, dtype=torch.uint8)
    lut[1], lut[2], lut[3] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[[0, 1], [2, 3]], [[255, 3], [255, 0]]])
    bank.fill(torch.zeros(2, 1, 2, 2), labels, torch.arange(2), lut)
    masks = bank.masks(torch.tensor([[1, 0]]))
    assert masks.shape == (1, 2, 3, 2, 2)
    assert masks[0, 1].tolist() == [[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[0, 0], [0, 1]]]
    assert masks[0, 0].tolist() == [[[0, 1], [0, 0]]] * 3


def size(bank: GuideBank) -> int:
    return sum(buffer.nbytes for buffer in bank.buffers())


def test_size_in_bytes_is_that_of_the_specification():
    bank = GuideBank(1, 2, (32, 32, 32))
    empty = size(bank)
    bank.fill(torch.zeros(2, 1, 32, 32, 32), torch.zeros(2, 32, 32, 32), torch.zeros(2), LUT[:, :2])
    assert size(bank) - empty == 2 * (65536 + 32768 + 512 + 8)


def test_filling_copies():
    bank, groups = filled(), torch.arange(12)
    bank.fill(torch.ones(12, 2, *L), torch.ones(12, *L, dtype=torch.uint8), groups, LUT)
    groups[0] = 99
    assert bank.groups[0] == 0
    assert not bank.keys.any()


# ---- the search follows the buffers ---------------------------------------------------------------------------------
def test_the_search_follows_writing_into_the_buffers():
    # a DDP broadcast or a moving average writes in place
    bank, q = filled(), queries(3)
    first = bank.lookup(q, 1).ids
    bank.lookup(q, 1, torch.zeros(3))  # the largest group is counted by now
    with torch.no_grad():
        bank.keys.copy_(bank.keys.flip(0))
    assert torch.equal(bank.lookup(q, 1).ids, 11 - first)
    bank.groups.fill_(5)
    assert not bank.lookup(q, 1, torch.full((3,), 5)).valid.any()
    bank.groups = torch.tensor([5] * 11 + [6])
    assert bank.lookup(q, 1, torch.full((3,), 5)).ids.tolist() == [[11]] * 3


@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d])
def test_another_memory_layout_of_the_network_leaves_the_bank_alone(layout):
    bank = filled()
    before = copy.deepcopy(bank.state_dict())
    assert bank.to(memory_format=layout).state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())


def test_types_survive_casting_the_network():
    bank, q = filled(), queries(2)
    before = bank.lookup(q, 2)
    for cast in (bank.double, bank.float):
        cast()
        assert all(getattr(bank, name).dtype == dtype for name, dtype in STORED_DTYPES.items())
    assert all(torch.equal(a, b) for a, b in zip(bank.lookup(q, 2), before))


# ---- state, copies ---------------------------------------------------------------------------------------------------
class Network(nn.Module):
    def __init__(self, bank: GuideBank) -> None:
        super().__init__()
        self.linear, self.bank = nn.Linear(2, 2), bank


@pytest.mark.parametrize("sizes", [(12, 5), (5, 12), (12, 0), (0, 12), (7, 7)])
def test_a_network_takes_a_bank_of_whatever_size(sizes):
    source, target = (Network(filled(n) if n else GuideBank(2, 3, L, key_dim=8)) for n in sizes)
    target.load_state_dict(source.state_dict(), strict=True)
    assert len(target.bank) == sizes[0]
    assert target.bank.is_empty == (sizes[0] == 0)
    assert all(torch.equal(getattr(target.bank, name), getattr(source.bank, name)) for name in STORED_DTYPES)


def test_what_is_loaded_under_inference_mode_can_be_trained_with_later():
    target, sources = Network(GuideBank(2, 3, L, key_dim=8)), [Network(filled(n, seed=n)) for n in (9, 4, 4)]
    for source in sources:  # the predictor, fold after fold
        with torch.inference_mode():
            target.load_state_dict(source.state_dict())
            inside = target.bank.lookup(queries(2), 2)
        for a, b in zip(inside, source.bank.lookup(queries(2), 2)):
            assert torch.equal(a, b)
    target.bank.keys.zero_()  # an inference tensor would refuse
    target.load_state_dict(sources[0].state_dict())
    target.bank.set_keys(filled(9).keys)
    assert not any(buffer.is_inference() for buffer in target.bank.buffers())


def test_a_bank_moved_under_inference_mode_can_be_loaded_outside():
    bank = filled(4)
    with torch.inference_mode():
        bank._apply(lambda t: t.clone())  # what .to(another device) does
    bank.lookup(queries(1), 1)
    bank.load_state_dict(filled(4, seed=2).state_dict())
    assert torch.equal(bank.keys, filled(4, seed=2).keys)


@pytest.mark.parametrize("other", [GuideBank(2, 3, (4, 4, 4), key_dim=8), GuideBank(2, 2, L, key_dim=8)])
def test_a_bank_of_another_patch_size_or_other_labels_is_refused(other):
    with pytest.raises(ValueError, match="patch size, channels, labels") as error:
        Network(other).load_state_dict(Network(filled()).state_dict())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent_and_knows_the_same(duplicate):
    network = Network(filled())
    before = network.bank.lookup(queries(2), 3)
    twin = duplicate(network)
    twin.float().eval().requires_grad_(False)  # as a moving-average teacher does
    assert all(torch.equal(a, b) for a, b in zip(twin.bank.lookup(queries(2), 3), before))
    twin.load_state_dict(Network(filled(5, seed=4)).state_dict())
    assert len(network.bank) == 12
    assert len(twin.bank) == 5
    network.bank.keys.zero_()
    assert twin.bank.keys.any()
    assert all(
        torch.equal(a, b)
        for a, b in zip(twin.bank.lookup(queries(2), 3)[2:], filled(5, seed=4).lookup(queries(2), 3)[2:])
    )


def test_the_state_holds_the_six_buffers():
    bank = filled()
    bank.lookup(queries(1), 1)
    assert set(bank.state_dict()) == set(STORED_DTYPES)


# ---- compiled graphs and processes -----------------------------------------------------------------------------------
def test_neither_groups_nor_the_size_of_the_bank_enter_a_graph():
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bank = filled()

        def forward(self, x, groups):
            if self.bank.is_empty:
                return x
            guides = self.bank.lookup(x * 2, 2, groups)
            return (guides.keys.sum((1, 2)) + x.sum(1)) * guides.valid.sum(1)

    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module = Uses()
    compiled = torch.compile(module, backend=counting)
    x = queries(3)
    assert torch.allclose(compiled(x, torch.tensor([0, 1, 2])), module(x, torch.tensor([0, 1, 2])))
    before = len(graphs)
    for size, groups in ((12, [3, 3, 3]), (30, [0, 1, 2]), (5, [1, 1, 0]), (31, [7, 8, 9])):
        module.bank.load_state_dict(filled(size).state_dict())
        compiled(x, torch.tensor(groups))
    assert len(graphs) == before <= 2
    torch._dynamo.reset()


def _in_child(bank: GuideBank, queue) -> None:
    try:
        bank.lookup(queries(1), 1)
        queue.put("searched")
    except ValueError as error:
        queue.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("used_before", [True, False])
def test_a_forked_child_is_refused_at_once(used_before):
    bank = filled()
    if used_before:
        bank.lookup(queries(1), 1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(bank, queue))
    child.start()
    try:
        assert "forked" in queue.get(timeout=30)
    finally:
        child.kill()
        child.join()
