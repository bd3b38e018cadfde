"""State per case: against plain dictionaries, through kill -9, and what is refused."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunetv2_ext.core import files
from nnunetv2_ext.data.store import CaseStore

SHAPES = {"a": (2, 3, 4, 5), "case.b": (2, 4, 3, 3), "c@1": (2, 1, 6, 2)}
FILL = -2.0


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """A test's disk is not pulled out; kill -9 leaves what was written to the kernel."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def shape(case: str) -> tuple[int, ...]:
    return SHAPES[case]


class Reference:
    """The same by whole arrays in dictionaries; a checkpoint is a copy of all."""

    def __init__(self) -> None:
        self.now: dict[str, np.ndarray] = {}
        self.checkpoint: dict[str, np.ndarray] = {}

    @staticmethod
    def voxels(case: str, box: np.ndarray):
        """Every index of the box, in the box and in the case, and whether the case has it."""
        for place in np.ndindex(*(box[:, 1] - box[:, 0])):
            there = tuple(int(a + p) for a, p in zip(box[:, 0], place))
            yield place, there, all(0 <= i < n for i, n in zip(there, shape(case)[1:]))

    def read(self, case: str, box: np.ndarray | None) -> np.ndarray | None:
        if case not in self.now or box is None:
            return self.now.get(case)
        result = np.full((2, *(box[:, 1] - box[:, 0])), FILL, np.float16)
        for place, there, inside in self.voxels(case, box):
            if inside:
                result[(slice(None), *place)] = self.now[case][(slice(None), *there)]
        return result

    def update(self, case: str, box: np.ndarray, patch: np.ndarray) -> None:
        array = self.now.setdefault(case, np.full(shape(case), FILL, np.float16)).copy()
        for place, there, inside in self.voxels(case, box):
            if inside:
                array[(slice(None), *there)] = patch[(slice(None), *place)]
        self.now[case] = array


BOX = st.lists(st.tuples(st.integers(-3, 7), st.integers(0, 6)), min_size=3, max_size=3).map(
    lambda axes: np.array([(a, a + n) for a, n in axes])
)
CASE = st.sampled_from(list(SHAPES))
ACTION = st.one_of(
    st.tuples(st.just("update"), CASE, BOX),
    st.tuples(st.just("write"), CASE, st.none()),
    st.tuples(st.just("read"), CASE, st.none() | BOX),
    st.tuples(st.sampled_from(["checkpoint", "best", "flush", "kill"]), st.none(), st.none()),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTION, max_size=30), seed=st.integers(0, 2**16))
def test_it_is_a_dictionary_of_arrays_that_returns_to_its_checkpoint(tmp_path_factory, actions, seed):
    folder = tmp_path_factory.mktemp("store") / "case_state"
    rng, step, saved = np.random.default_rng(seed), 0, 0
    store, reference = CaseStore(folder, shape, FILL), Reference()
    for kind, case, box in actions:
        step += int(rng.integers(0, 3)) if kind in ("update", "write") else 0
        if kind == "update":
            patch = rng.normal(size=(2, *(box[:, 1] - box[:, 0]))).astype(np.float32)
            store.update(case, box, patch)
            reference.update(case, box, patch)
        elif kind == "write":
            array = rng.normal(size=shape(case))
            store.write(case, array)
            reference.now[case] = array.astype(np.float16)
        elif kind == "read":
            mine, other = store.read(case, box), reference.read(case, box)
            assert (mine is None) == (other is None)
            assert mine is None or (mine.dtype == np.float16 and np.array_equal(mine, other))
        elif kind == "kill":
            step, reference.now = saved, dict(reference.checkpoint)
            store = CaseStore(folder, shape, FILL)
            store.rewind(saved)
        else:
            store.flush(step)
            if kind == "checkpoint":
                store.saved(step)
                saved, reference.checkpoint = step, dict(reference.now)
                for case in store.cases():
                    assert len(list(folder.glob(f"{case}.[0-9]*"))) == 1
            elif kind == "best" and step > saved:
                pass  # a checkpoint that --c does not take
            elif saved == step:  # sealed again at the very step of the checkpoint: that is what it returns to
                reference.checkpoint = dict(reference.now)
    assert store.cases() == sorted(reference.now)
    for case, array in reference.now.items():
        assert np.array_equal(store.read(case), array)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, bool, np.float16, np.float32, np.float64])
def test_floats_are_halved_and_other_numbers_kept(tmp_path, dtype):
    store = CaseStore(tmp_path / "s", shape)
    array = (np.arange(120).reshape(SHAPES["a"]) % 2).astype(dtype)
    store.write("a", array)
    store.flush(1)
    again = CaseStore(tmp_path / "s", shape).read("a")
    assert again.dtype == (np.float16 if np.issubdtype(dtype, np.floating) else dtype)
    assert np.array_equal(again, array)
    size = next((tmp_path / "s").glob("*.npy")).stat().st_size
    assert size == 128 + 28 + array.size * again.dtype.itemsize
    with pytest.raises(ValueError, match=r"case a: a value beyond 65504"):
        CaseStore(tmp_path / "s", shape).write("a", np.full(SHAPES["a"], 1e5))
    with pytest.raises(ValueError, match="cannot be stored"):
        store.write("a", np.full(SHAPES["a"], "x"))


def test_what_is_read_is_a_copy(tmp_path):
    store = CaseStore(tmp_path / "s", shape)
    store.write("a", np.zeros(SHAPES["a"]))
    box = np.array([[0, 2], [1, 3], [0, 1]])
    for read in (store.read("a"), store.read("a", box)):
        read += 1
    assert not store.read("a").any() and store.read("case.b") is None


def test_a_wrong_patch_changes_nothing(tmp_path):
    store = CaseStore(tmp_path / "s", shape)
    box = np.array([[0, 2], [0, 2], [0, 2]])
    for patch in (np.zeros((2, 2, 2, 3)), np.zeros((1, 2, 2, 2))):
        with pytest.raises(ValueError, match="case a: a patch of"):
            store.update("a", box, patch)
    assert store.read("a") is None
    store.write("a", np.zeros(SHAPES["a"], np.uint8))
    with pytest.raises(ValueError, match=r"float16 does not fit .* uint8"):
        store.update("a", box, np.zeros((2, 2, 2, 2)))


# ---- versions


def filled(store: CaseStore, value: float, *cases: str) -> None:
    for case in cases:
        store.write(case, np.full(shape(case), value))


def values(store: CaseStore) -> dict[str, float]:
    return {case: float(store.read(case).flat[0]) for case in store.cases()}


def test_the_checkpoints_version_is_taken_and_two_are_kept(tmp_path):
    folder = tmp_path / "s"
    store = CaseStore(folder, shape)
    for step in (10, 20):
        filled(store, step, "a", "case.b")
        store.flush(step), store.saved(step)
    assert sorted(p.name for p in folder.iterdir()) == ["a.20.npy", "case.b.20.npy"]
    filled(store, 25, "a", "c@1")
    assert values(store) == {"a": 25, "case.b": 20, "c@1": 25}
    store.flush(25)  # the checkpoint itself is never written
    filled(store, 27, "a")
    again = CaseStore(folder, shape)
    again.rewind(20)
    assert values(again) == {"a": 20, "case.b": 20}
    assert sorted(p.name for p in folder.iterdir()) == ["a.20.npy", "case.b.20.npy"]
    filled(again, 30, "a")
    again.flush(30), again.saved(30)
    last = CaseStore(folder, shape)
    last.rewind(35)
    assert values(last) == {"a": 30, "case.b": 20}
    filled(last, 40, "a")
    last.flush(40), last.saved(35)  # that of step 35 is written, that of step 40 not yet
    assert sorted(p.name for p in folder.iterdir()) == ["a.30.npy", "a.40.npy", "case.b.20.npy"]
    filled(last, 41, "a", "c@1")
    last.rewind(35)  # in one process: what is not sealed is forgotten
    assert values(last) == {"a": 30, "case.b": 20}


def test_only_later_versions_left_are_refused_and_nothing_is_deleted(tmp_path):
    folder = tmp_path / "s"
    store = CaseStore(folder, shape)
    for step in (10, 20):
        filled(store, step, "a")
        store.flush(step), store.saved(step)
    filled(store, 30, "case.b")
    store.flush(30)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(ValueError, match=r"case a: .*a\.20\.npy is of step 20, the checkpoint of step 15") as caught:
        CaseStore(folder, shape).rewind(15)
    assert "\n" not in str(caught.value) and sorted(p.name for p in folder.iterdir()) == before
    CaseStore(folder, shape).rewind(20)  # both remedies
    folder.rename(tmp_path / "away")
    empty = CaseStore(folder, shape)
    empty.rewind(15)
    assert empty.cases() == []


def test_a_case_that_had_no_state_at_the_checkpoint_has_none_again(tmp_path):
    store = CaseStore(tmp_path / "s", shape)
    filled(store, 12, "a")
    store.flush(12), store.saved(12)
    filled(store, 14, "a")
    store.flush(14), store.saved(14)
    again = CaseStore(tmp_path / "s", shape)
    again.rewind(5)  # before its first version
    assert again.cases() == [] and again.read("a") is None and not list((tmp_path / "s").iterdir())


def test_sealing_an_older_step_than_there_is_needs_a_rewind(tmp_path):
    store = CaseStore(tmp_path / "s", shape)
    filled(store, 1, "a")
    store.flush(8)
    again = CaseStore(tmp_path / "s", shape)
    filled(again, 2, "a")
    with pytest.raises(ValueError, match=r"case a: .*a\.8\.npy is later than step 3; call rewind first"):
        again.flush(3)


def test_a_new_training_sets_the_old_state_aside(tmp_path):
    for value in (1, 2):
        store = CaseStore(tmp_path / "case_state", shape)
        store.set_aside()
        assert store.cases() == []
        filled(store, value, "a")
        store.flush(value)
    assert values(CaseStore(tmp_path / "previous_case_state", shape)) == {"a": 1}
    assert values(CaseStore(tmp_path / "case_state", shape)) == {"a": 2}


# ---- what is refused


def sealed(tmp_path: Path) -> tuple[Path, Path]:
    store = CaseStore(tmp_path / "s", shape)
    filled(store, 3, "a")
    store.flush(7)
    return tmp_path / "s", tmp_path / "s" / "a.7.npy"


@pytest.mark.parametrize("keep", [0, 5, 60, 128, 200, -30, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    folder, file = sealed(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"case a: {re.escape(str(file))} is damaged or cut short") as caught:
        CaseStore(folder, shape).read("a")
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_found(tmp_path):
    folder, file = sealed(tmp_path)
    whole = bytearray(file.read_bytes())
    for place in [*range(0, len(whole), 5), *range(len(whole) - 28, len(whole))]:
        broken = bytearray(whole)
        broken[place] ^= 1
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="case a: "):
            CaseStore(folder, shape).read("a")
    file.write_bytes(whole)
    assert CaseStore(folder, shape).read("a").shape == SHAPES["a"]


def test_a_file_of_another_step_or_gone_is_refused(tmp_path):
    folder, file = sealed(tmp_path)
    store = CaseStore(folder, shape)
    other = file.with_name("a.9.npy")
    file.rename(other)
    with pytest.raises(ValueError, match=r"case a: .* is gone"):
        store.read("a")
    with pytest.raises(ValueError, match=r"case a: .*a\.9\.npy was written at step 7, not 9"):
        CaseStore(folder, shape).read("a")


def test_a_case_of_another_shape_is_refused(tmp_path):
    folder, file = sealed(tmp_path)
    other = CaseStore(folder, lambda case: (2, 3, 4, 6))
    box = np.array([[0, 1]] * 3)
    for call in (lambda: other.read("a"), lambda: other.update("a", box, np.zeros((2, 1, 1, 1)))):
        with pytest.raises(ValueError, match=rf"case a: {re.escape(str(file))} has the shape 2x3x4x5, .* 2x3x4x6"):
            call()
    with pytest.raises(ValueError, match="case a: what is written has the shape 1x3"):
        other.write("a", np.zeros((1, 3)))


def test_another_process_is_refused(tmp_path, monkeypatch):
    store = CaseStore(tmp_path / "s", shape)
    filled(store, 1, "a")
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a forked worker
    for call in (lambda: store.read("a"), lambda: filled(store, 2, "a"), lambda: store.flush(1)):
        with pytest.raises(ValueError, match="another process"):
            call()


def test_a_full_disk_leaves_the_old_version(tmp_path, monkeypatch):
    store = CaseStore(tmp_path / "s", shape)
    filled(store, 1, "a")
    store.flush(1), store.saved(1)
    filled(store, 2, "a")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            store.flush(2)
    again = CaseStore(tmp_path / "s", shape)
    again.rewind(1)
    assert values(again) == {"a": 1}
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["a.1.npy"]


# ---- kill -9

TRAINING = """
import sys
from pathlib import Path
import numpy as np
from nnunetv2_ext.data.store import CaseStore
folder = Path(sys.argv[1])
shape = (1, 48, 48, 48)
store = CaseStore(folder / "case_state", lambda case: shape)
checkpoint = folder / "checkpoint"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
store.rewind(step)
for case in store.cases():
    assert (store.read(case) == int(case) + step).all(), (case, step)
while step < 2000:
    step += 1
    for case in range(3):
        half = np.array([[0, 48], [0, 48], [0, 24]])
        store.update(str(case), half, np.full((1, 48, 48, 24), case + step))
        store.update(str(case), half + [[0, 0], [0, 0], [24, 24]], np.full((1, 48, 48, 24), case + step))
    store.flush(step)
    (folder / "new").write_text(str(step))
    (folder / "new").replace(checkpoint)
    store.saved(step)
    print(step, flush=True)
"""


def test_a_training_killed_at_any_moment_finds_the_arrays_of_its_checkpoint(tmp_path):
    rng = random.Random(1)
    reached = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline().strip(), "it resumed and made a step"
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        step = int((tmp_path / "checkpoint").read_text())
        assert step > reached
        reached = step
    store = CaseStore(tmp_path / "case_state", lambda case: (1, 48, 48, 48))
    store.rewind(step)
    assert {case: set(np.unique(store.read(case))) for case in store.cases()} == {str(c): {c + step} for c in range(3)}
