"""What is kept of each case: found again, replaced, recomputed when damaged, and never required."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_ext.data.cache import CaseCache


def text(file: Path) -> str:
    content = file.read_text()
    if content.endswith("!"):
        return content
    raise RuntimeError("damaged")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, said: list[str]) -> CaseCache:
    return CaseCache(tmp_path, "words", {"size": 3}, ".txt", said.append)


def test_an_entry_belongs_to_case_state_and_parameters(cache: CaseCache, tmp_path: Path) -> None:
    assert cache.read("a", [1, 2], text) is None
    file = cache.write("a", [1, 2], b"hello!")
    cache.write("b", [1, 2], b"other!")
    assert cache.read("a", [1, 2], text) == "hello!" and file.parent == cache.folder
    assert cache.read("a", [1, 3], text) is None and cache.read("c", [1, 2], text) is None
    assert CaseCache(tmp_path, "words", {"size": 4}, ".txt").read("a", [1, 2], text) is None
    assert CaseCache(tmp_path, "words", {"size": 3}, ".txt").read("a", [1, 2], text) == "hello!"
    assert json.loads((cache.folder / "key.json").read_text()) == {"size": 3}


def test_older_entries_of_the_case_go_and_others_stay(cache: CaseCache) -> None:
    for case in ("a", "a.b", "ab"):
        cache.write(case, 1, b"one!")
    cache.write("a", 2, b"two!")
    assert cache.read("a", 1, text) is None and cache.read("a", 2, text) == "two!"
    assert cache.read("a.b", 1, text) == cache.read("ab", 1, text) == "one!"
    assert len(list(cache.folder.glob("*.txt"))) == 3 and not list(cache.folder.glob("*.tmp"))


def test_a_damaged_entry_is_none_and_can_be_replaced(cache: CaseCache) -> None:
    file = cache.write("a", 1, b"hello!")
    file.write_text("hel")
    assert cache.read("a", 1, text) is None
    cache.write("a", 1, b"hello!")
    assert cache.read("a", 1, text) == "hello!"


def test_a_folder_that_cannot_be_written_costs_one_line(cache: CaseCache, said: list[str], tmp_path: Path) -> None:
    (tmp_path / cache.folder.name).write_text("a file is in the way")
    for case in "ab":  # by another object of the same kind
        cache = CaseCache(tmp_path, "words", {"size": 3}, ".txt", said.append)
        assert cache.write(case, 1, case.encode() + b"!").is_file()
        assert cache.read(case, 1, text) == f"{case}!"
    assert len(said) == 1 and str(tmp_path) in said[0] and "computed again next time" in said[0]
    assert "Errno" not in said[0] and "\n" not in said[0]


def test_a_disk_that_fills_up_costs_one_line(
    cache: CaseCache, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunetv2_ext.data import cache as module

    kept = cache.write("a", 1, b"one!")
    write = module.atomic_write

    def full(path: Path, writer) -> None:
        if Path(path).parent == cache.folder:
            raise OSError(28, "No space left on device")
        write(path, writer)

    monkeypatch.setattr(module, "atomic_write", full)
    cache.write("b", 1, b"two!")
    assert cache.read("a", 1, text) == "one!" and kept.is_file() and cache.read("b", 1, text) == "two!"
    assert len(said) == 1 and "No space left" in said[0]


def test_the_temporary_folder_goes_with_the_process(tmp_path: Path) -> None:
    """And outlives the cache, because others read its files by name."""
    (tmp_path / "root").touch()
    code = (
        "from pathlib import Path; from nnunetv2_ext.data.cache import CaseCache\n"
        f"cache = CaseCache(Path({str(tmp_path / 'root')!r}), 'k', {{}}, '.txt', lambda line: None)\n"
        "file = cache.write('a', 1, b'x'); del cache\n"
        "assert file.read_bytes() == b'x'; print(file)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(str(tmp_path)) and not list(tmp_path.glob("nnunetv2_ext_cache_*"))
