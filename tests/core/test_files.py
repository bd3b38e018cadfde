"""Atomic writing: the old file or the new one, never a part of it, and nothing left beside it."""

import errno
import os
import pickle
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from nnunetv2_ext.core import files
from nnunetv2_ext.core.files import (
    atomic_torch_save,
    atomic_write,
    atomic_write_text,
    require_picture,
    require_writable,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_new_content_over_old_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "one\n")
    atomic_write_text(path, "zwei µ\r\n")
    assert path.read_bytes() == b"zwei \xc2\xb5\r\n"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def writer(file):
        file.write(b"x" * 100_000)  # more than the buffer, so that a part does reach the disk
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, writer)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_the_old_file_stands_until_the_writer_is_done(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    seen = []

    def writer(file):
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    atomic_write(path, writer)
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"


def test_content_and_rename_are_synchronised_in_this_order(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(source, target):
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write_text(tmp_path / "a", "text")
    assert calls == ["file", "rename", "folder"]


def test_killed_writer_leaves_the_old_file_whole_and_its_temporary_goes_later(tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"old")
    code = """
        import os, signal, sys
        from nnunetv2_ext.core.files import atomic_write
        def writer(file):
            file.write(b"new" * 100_000)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        atomic_write(sys.argv[1], writer)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], env=_environment(), check=False)
    assert run.returncode == -9
    assert path.read_bytes() == b"old"
    (left,) = [entry for entry in tmp_path.iterdir() if entry != path]

    atomic_write(path, lambda file: None)
    assert left.exists()  # it could belong to a live writer
    old = time.time() - 2 * 3600
    os.utime(left, (old, old))
    bystander = tmp_path / ".checkpoint.pth.notes.tmp"
    bystander.write_text("not ours")
    os.utime(bystander, (old, old))
    atomic_write(path, lambda file: None)
    assert names(tmp_path) == [".checkpoint.pth.notes.tmp", "checkpoint.pth"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    old_umask = os.umask(0o027)
    try:
        atomic_write_text(path, "1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o664)
        atomic_write_text(path, "2")
        assert stat.S_IMODE(path.stat().st_mode) == 0o664
    finally:
        os.umask(old_umask)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links")
def test_symbolic_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a"
    target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_long_names_are_written(tmp_path):
    path = tmp_path / ("n" * 250)
    atomic_write_text(path, "x")
    assert names(tmp_path) == [path.name]


def test_torch_objects_come_back_equal(tmp_path):
    path = tmp_path / "a.pth"
    obj = {"weights": {"w": torch.arange(6.0).reshape(2, 3)}, "epoch": 3}
    atomic_torch_save(obj, path)
    back = torch.load(path, weights_only=True)
    assert torch.equal(back["weights"]["w"], obj["weights"]["w"])
    assert back["epoch"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="file size limit as a stand-in for a full disk")
def test_full_disk_while_saving_is_an_os_error_and_the_old_checkpoint_stays(tmp_path):
    path = tmp_path / "a.pth"
    code = """
        import resource, signal, sys, torch
        from nnunetv2_ext.core.files import atomic_torch_save
        atomic_torch_save({"x": 1}, sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            atomic_torch_save({"x": torch.zeros(1_000_000)}, sys.argv[1])
        except OSError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in run.stdout
    assert "a.pth" in run.stdout
    assert torch.load(path, weights_only=True) == {"x": 1}
    assert names(tmp_path) == ["a.pth"]


def test_other_errors_of_torch_are_passed_on(tmp_path):
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        atomic_torch_save({"f": lambda: 0}, tmp_path / "a.pth")
    assert names(tmp_path) == []


def test_require_writable_creates_the_folder_and_leaves_it_empty(tmp_path):
    folder = require_writable(tmp_path / "model" / "fold_0")
    assert folder.is_dir()
    assert names(folder) == []
    assert require_writable(str(folder)) == folder


@pytest.mark.parametrize("below", ["", "fold_0"])
def test_require_writable_names_a_file_in_the_folders_place(tmp_path, below):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ValueError, match="a file is in its place; move that file away") as caught:
        require_writable(tmp_path / "model" / below)
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "permission denied; give yourself write permission"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only; mount it for writing"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; fix that or choose another folder"),
    ],
)
def test_require_writable_says_cause_and_remedy(tmp_path, monkeypatch, error, words):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(files, "open", refuse, raising=False)  # root may write anywhere, so chmod would not do
    with pytest.raises(ValueError, match=words):
        require_writable(tmp_path)


def test_require_writable_notices_a_full_disk_and_removes_its_probe(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="no space is left or the quota is used up; free some space"):
        require_writable(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_require_writable_refuses_a_folder_without_write_permission(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    with pytest.raises(ValueError, match="permission denied"):
        require_writable(folder)


def _environment():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(files.__file__))))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("name", ["panel.xyz", "panel", "folder.png", "nowhere/panel.png"])
def test_what_is_not_a_picture_is_refused(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"^-o \S+ (does not name a picture|cannot be written)") as error:
        require_picture(tmp_path / name, "-o")
    assert "\n" not in str(error.value) and names(tmp_path) == ["folder.png"]


@pytest.mark.parametrize("name", ["panel.png", "PANEL.PNG", "panel.pdf"])
def test_a_picture_passes(tmp_path, name):
    assert require_picture(tmp_path / name, "-o") == tmp_path / name and names(tmp_path) == []
