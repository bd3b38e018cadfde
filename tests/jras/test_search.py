"""Search against brute force, with FAISS and without."""

from __future__ import annotations

import multiprocessing
import os
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
from nnunetv2_ext.jras.search import load_faiss, nearest, select

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


def select_by(with_faiss: bool, *args) -> tuple[torch.Tensor, torch.Tensor]:
    with mock.patch.object(search, "load_faiss", load_faiss if with_faiss else lambda: None):
        return select(*args)


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
    ids, valid = select_by(with_faiss, q, keys, k, key_groups, groups)
    for row in range(queries):
        expected = brute_force(q[row], keys, k, key_groups, None if groups is None else int(groups[row]))
        assert ids[row, valid[row]].tolist() == expected
        assert valid[row].tolist() == [True] * len(expected) + [False] * (k - len(expected))
        assert not ids[row, ~valid[row]].any()


@pytest.mark.parametrize("with_faiss", BACKENDS)
def test_the_result_of_a_query_does_not_depend_on_the_batch(with_faiss):
    # FAISS changes its algorithm at 20 queries
    generator = torch.Generator().manual_seed(1)
    keys, q = unit(generator, 200, 128), unit(generator, 64, 128)
    keys[100:] = keys[:100]  # ties
    key_groups, groups = torch.arange(200) % 7, torch.arange(64) % 7
    whole = select_by(with_faiss, q, keys, 5, key_groups, groups)[0]
    order = torch.randperm(64, generator=generator)
    assert torch.equal(select_by(with_faiss, q[order], keys, 5, key_groups, groups[order])[0], whole[order])
    rows = [slice(i, i + 1) for i in range(64)]
    single = torch.cat([select_by(with_faiss, q[row], keys, 5, key_groups, groups[row])[0] for row in rows])
    assert torch.equal(single, whole)


def test_of_equal_keys_the_lower_id_comes_first():
    keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    ids, _ = select(torch.tensor([[1.0, 0.0]]), keys, 4, torch.zeros(4))
    assert ids.tolist() == [[1, 2, 3, 0]]


@pytest.mark.parametrize("with_faiss", BACKENDS)
def test_a_query_that_is_not_finite_keeps_valid_guides_of_other_groups(with_faiss):
    # then its NaN reaches the loss, which names the case; else nobody would notice
    keys = unit(torch.Generator().manual_seed(0), 6, 4)
    key_groups = torch.tensor([0, 0, 1, 1, 2, 2])
    q = torch.stack([torch.full((4,), torch.nan), keys[3]])
    ids, valid = select_by(with_faiss, q, keys, 2, key_groups, torch.tensor([0, 1]))
    assert valid.all()
    assert not (key_groups[ids[0]] == 0).any()
    assert not (key_groups[ids[1]] == 1).any()


def test_random_draw_is_uniform_over_other_groups_without_repeats_and_repeatable():
    keys, q = torch.zeros(6, 4), torch.zeros(4000, 4)
    key_groups = torch.tensor([5, 5, 6, 7, 8, 9])
    groups = torch.full((4000,), 5)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return select(q, keys, 3, key_groups, groups, generator)

    ids, valid = draw(0)
    assert valid.all()
    counts = torch.bincount(ids.flatten(), minlength=6)
    assert counts[:2].tolist() == [0, 0]
    # each of four is in a draw of three with p = 3/4: 3000 of 4000, standard deviation 27
    assert (counts[2:] - 3000).abs().max() < 150
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert torch.equal(draw(0)[0], ids)
    assert not torch.equal(draw(1)[0], ids)


def test_without_faiss_one_warning_and_the_same_result(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    keys, q = unit(generator, 50, 8), unit(generator, 3, 8)
    expected = nearest(q, keys, 5)
    monkeypatch.setitem(sys.modules, "faiss", None)  # import faiss now raises ImportError
    load_faiss.cache_clear()
    try:
        with pytest.warns(UserWarning, match="pip install faiss"):
            found = nearest(q, keys, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(nearest(q, keys, 5), found) and torch.equal(found, expected)
    finally:
        load_faiss.cache_clear()


_OWN_GUIDES = """
import multiprocessing
import subprocess
import nnunetv2_ext.jras.search as search

def child(queue):
    import torch
    search.require_main_process()
    queue.put(search.nearest(torch.eye(4), torch.eye(4), 1).flatten().tolist())

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get(timeout=30))
    process.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_process_without_guides_may_have_its_own():
    """As a program that starts a training per process, after importing what all of them need."""
    done = subprocess.run([sys.executable, "-c", _OWN_GUIDES], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[0, 1, 2, 3]", done.stderr


def _in_child(queue) -> None:
    try:
        select(torch.eye(4), torch.eye(4), 1, torch.arange(4))
        queue.put("searched")
    except ValueError as error:
        queue.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_from_a_process_that_searched_is_refused_at_once():
    select(torch.eye(4), torch.eye(4), 1, torch.arange(4))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    try:
        assert "forked" in queue.get(timeout=30)
    finally:
        child.kill()
        child.join()
