"""Search against brute force, with FAISS and without."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_ext.jras import search
from nnunetv2_ext.jras.search import Searcher, check_index, load_faiss, select_from_all, select_nearest

HAS_FAISS = load_faiss() is not None
needs_faiss = pytest.mark.skipif(not HAS_FAISS, reason="FAISS is not installed")
BACKENDS = [pytest.param(True, marks=needs_faiss), False]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unit(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def searcher(keys: torch.Tensor, with_faiss: bool, **options) -> Searcher:
    with mock.patch.object(search, "load_faiss", load_faiss if with_faiss else lambda: None):
        built = Searcher(keys, **options)
    assert (built.backend != "torch") == with_faiss
    return built


def brute_force(query, keys, k, key_groups, group) -> list[int]:
    """One query, one key at a time."""
    scored = [
        (-float(torch.dot(query.double(), key.double())), i)
        for i, key in enumerate(keys)
        if group is None or int(key_groups[i]) != group
    ]
    return [i for _, i in sorted(scored)[:k]]


@pytest.mark.parametrize("with_faiss", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    k=st.integers(1, 8),
    queries=st.integers(1, 25),
    exclude=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_filtered_search_equals_brute_force_for_groups_of_unequal_size(with_faiss, sizes, k, queries, exclude, seed):
    generator = torch.Generator().manual_seed(seed)
    key_groups = torch.repeat_interleave(torch.arange(len(sizes)) - 3, torch.tensor(sizes))
    key_groups = key_groups[torch.randperm(len(key_groups), generator=generator)]
    keys, q = unit(generator, len(key_groups), 16), unit(generator, queries, 16)
    groups = torch.randint(-3, 4, (queries,), generator=generator) if exclude else None
    k = min(k, len(keys))
    ids, valid = select_nearest(searcher(keys, with_faiss), q, k, key_groups, groups, max(sizes))
    everything = select_from_all(q, keys, k, key_groups, groups)
    for row in range(queries):
        expected = brute_force(q[row], keys, k, key_groups, None if groups is None else int(groups[row]))
        assert ids[row, valid[row]].tolist() == expected
        assert valid[row].tolist() == [True] * len(expected) + [False] * (k - len(expected))
        assert not ids[row, ~valid[row]].any()
        assert everything[0][row].tolist() == ids[row].tolist()
        assert everything[1][row].tolist() == valid[row].tolist()


@pytest.mark.parametrize("with_faiss", BACKENDS)
def test_the_result_of_a_query_does_not_depend_on_the_batch(with_faiss):
    # FAISS changes its algorithm at 20 queries
    generator = torch.Generator().manual_seed(1)
    keys, q = unit(generator, 200, 128), unit(generator, 64, 128)
    keys[100:] = keys[:100]  # ties
    key_groups, groups = torch.arange(200) % 7, torch.arange(64) % 7
    built = searcher(keys, with_faiss)
    whole = select_nearest(built, q, 5, key_groups, groups, 30)[0]
    order = torch.randperm(64, generator=generator)
    assert torch.equal(select_nearest(built, q[order], 5, key_groups, groups[order], 30)[0], whole[order])
    single = torch.cat(
        [select_nearest(built, q[i : i + 1], 5, key_groups, groups[i : i + 1], 30)[0] for i in range(64)]
    )
    assert torch.equal(single, whole)


def test_of_equal_keys_the_lower_id_comes_first():
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    ids, _ = select_nearest(Searcher(keys), torch.tensor([[1.0, 0.0]]), 4, torch.zeros(4))
    assert ids.tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("with_faiss", BACKENDS)
def test_a_query_that_is_not_finite_keeps_valid_guides_of_other_groups(with_faiss):
    # then its NaN reaches the loss, which names the case; else it would silently fall to the null guide
    keys = unit(torch.Generator().manual_seed(0), 6, 4)
    key_groups = torch.tensor([0, 0, 1, 1, 2, 2])
    q = torch.stack([torch.full((4,), torch.nan), keys[3]])
    ids, valid = select_nearest(searcher(keys, with_faiss), q, 2, key_groups, torch.tensor([0, 1]), 2)
    assert valid.all()
    assert not (key_groups[ids[0]] == 0).any()
    assert not (key_groups[ids[1]] == 1).any()


def test_random_draw_is_uniform_over_other_groups_without_repeats_and_repeatable():
    keys, q = torch.zeros(6, 4), torch.zeros(4000, 4)
    key_groups = torch.tensor([5, 5, 6, 7, 8, 9])
    groups = torch.full((4000,), 5)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return select_from_all(q, keys, 3, key_groups, groups, random=True, generator=generator)

    ids, valid = draw(0)
    assert valid.all()
    counts = torch.bincount(ids.flatten(), minlength=6)
    assert counts[:2].tolist() == [0, 0]
    # each of four is in a draw of three with p = 3/4: 3000 of 4000, standard deviation 27
    assert (counts[2:] - 3000).abs().max() < 150
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert torch.equal(draw(0)[0], ids)
    assert not torch.equal(draw(1)[0], ids)


def test_dedup_leaves_out_what_is_almost_the_query():
    keys = F.normalize(torch.tensor([[1.0, 0.0], [0.999, 0.01], [0.7, 0.7], [0.0, 1.0]]), dim=1)
    q = keys[:1]
    assert select_from_all(q, keys, 2, torch.zeros(4))[0].tolist() == [[0, 1]]
    ids, valid = select_from_all(q, keys, 3, torch.zeros(4), dedup_cosine=0.99)
    assert ids.tolist() == [[2, 3, 0]]
    assert valid.tolist() == [[True, True, False]]


@needs_faiss
def test_padding_of_an_approximate_index_is_never_an_id():
    generator = torch.Generator().manual_seed(0)
    keys, q = unit(generator, 64, 8), unit(generator, 10, 8)
    built = Searcher(keys, index="IVF16,Flat", nprobe=1)
    assert (built.search(q, 40) == -1).any()  # one list of 16 holds fewer than 40
    ids, valid = select_nearest(built, q, 40, torch.zeros(64))
    assert (ids >= 0).all()
    assert not valid.all()
    assert all(len(set(i[v].tolist())) == int(v.sum()) for i, v in zip(ids, valid))


@needs_faiss
@pytest.mark.parametrize(("index", "option"), [("IVF16,Flat", "nprobe"), ("HNSW8,Flat", "ef_search")])
def test_recall_rises_with_the_effort_and_is_one_for_flat(index, option):
    generator = torch.Generator().manual_seed(0)
    keys, q = unit(generator, 512, 32), unit(generator, 32, 32)
    low, high = (Searcher(keys, index=index, **{option: n}).recall(q, 8) for n in (1, 256))
    assert 0 < low < 0.9
    assert high > 0.98
    assert Searcher(keys).recall(q, 8) == 1.0


@needs_faiss
@pytest.mark.parametrize("index", ["Falt", "", "IVF,Flat"])
def test_an_unknown_index_is_refused_in_one_line(index):
    for build in (lambda: check_index(index), lambda: Searcher(torch.eye(4), index=index)):
        with pytest.raises(ValueError, match=r"jras\.index=.*index_factory") as error:
            build()
        assert "\n" not in str(error.value)
        assert "/" not in str(error.value)  # no source path of FAISS


@needs_faiss
def test_an_index_with_more_lists_than_guides_and_a_parameter_it_does_not_have_are_refused():
    check_index("IVF64,Flat", 4, nprobe=8)
    with pytest.raises(ValueError, match="cannot be built from 4 guides"):
        Searcher(torch.eye(4), index="IVF64,Flat")
    with pytest.raises(ValueError, match="has no parameter nprobe"):
        check_index("Flat", 4, nprobe=8)


def test_without_faiss_one_warning_and_the_same_result(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    keys, q = unit(generator, 50, 8), unit(generator, 3, 8)
    expected = Searcher(keys).search(q, 5)
    monkeypatch.setitem(sys.modules, "faiss", None)  # import faiss now raises ImportError
    load_faiss.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pip install faiss"):
            built = Searcher(keys)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = Searcher(keys, index="IVF8,Flat")
        assert built.backend == again.backend == "torch"
        assert torch.equal(built.search(q, 5), expected)
        assert again.recall(q, 5) == 1.0
    finally:
        load_faiss.cache_clear()


def _in_child(built: Searcher, queue) -> None:
    try:
        built.search(torch.eye(4), 1)
        queue.put("searched")
    except ValueError as error:
        queue.put(str(error))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_is_refused_at_once():
    built = Searcher(torch.eye(4))
    built.search(torch.eye(4), 1)  # FAISS has been used: the dangerous situation
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(built, queue))
    child.start()
    try:
        assert "forked" in queue.get(timeout=30)
    finally:
        child.kill()
        child.join()


_OWN_GUIDES = """
import multiprocessing
import subprocess
import nnunetv2_ext.jras.search as search

def child(queue):
    import torch
    queue.put(search.Searcher(torch.eye(4)).search(torch.eye(4), 1).flatten().tolist())

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get(timeout=30))
    process.join()
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_child_of_a_process_without_guides_may_have_its_own():
    """As a program that starts a training per process, after importing what all of them need."""
    done = subprocess.run([sys.executable, "-c", _OWN_GUIDES], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[0, 1, 2, 3]", done.stderr
