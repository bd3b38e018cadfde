"""Writing files so that a reader finds the old content or the new one, never a part of it."""

import errno
import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

# A temporary file that nobody has written to for this long belongs to a process that was killed.
_STALE_AFTER_SECONDS = 3600.0


def atomic_write(path: str | os.PathLike[str], writer: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by what `writer` writes, in one step that survives a crash or a power cut.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed over `path`.
    A new file gets the permissions the umask gives, an existing one keeps its own; a symbolic link keeps pointing
    where it did and its target is replaced.

    Args:
        path: File to write; its folder must exist.
        writer: Called once with a binary file opened for writing. It must not close it.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
        Exception: Whatever `writer` raises. In every case the old file is left as it was and no temporary file stays.
    """
    target = Path(os.path.realpath(path))
    _remove_stale_temporaries(target)
    temporary = target.with_name(f"{_temporary_prefix(target)}{secrets.token_hex(6)}.tmp")
    # Not tempfile.mkstemp: it fixes the mode to 0600, and group members could not read the results.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # no old file, or a file system without permissions
            os.chmod(temporary, target.stat().st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:  # an interrupt too must not leave a half-written file behind
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace `path` by `text` in UTF-8, line ends as given; see `atomic_write` for the guarantees and errors."""
    content = text.encode("utf-8")
    atomic_write(path, lambda file: file.write(content))


def atomic_torch_save(obj: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save(obj, path)` with the guarantees of `atomic_write`.

    Raises:
        OSError: The file cannot be written; also on a full disk, where torch alone reports an internal error.
    """
    import torch

    def write(file: BinaryIO) -> None:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            # torch's zip writer fails a second time while closing and that error hides the one that tells the cause.
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, os.fspath(path)) from error
            raise

    atomic_write(path, write)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is missing, cannot be read or is not JSON; one line that names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Make sure that files can be written to `folder`, which is created if needed.

    Returns:
        The folder as a `Path`.

    Raises:
        ValueError: It cannot be written; one line that names the folder, the cause and what to do.
    """
    folder = Path(folder)
    probe = folder / f".write-test-{secrets.token_hex(6)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "xb") as file:
                file.write(bytes(4096))  # an empty file needs no block and would pass on a full disk
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(OSError):
                probe.unlink()
    except OSError as error:
        cause, remedy = _explain(error)
        raise ValueError(f"cannot write to the folder {folder}: {cause}; {remedy}") from error
    return folder


_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".tif", ".tiff", ".webp")


def require_picture(path: Path, option: str) -> Path:
    """Make sure that a picture can be written to `path`, before what it shows takes its time.

    Raises:
        ValueError: It is a folder or has another ending, its folder is missing or cannot be written; names `option`.
    """
    if path.suffix.lower() not in _PICTURES or path.is_dir():
        raise ValueError(f"{option} {path} does not name a picture: give a file that ends in .png")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: its folder does not exist or is not writable")
    return path


def _explain(error: OSError) -> tuple[str, str]:
    """Cause and remedy of a failed write, in words."""
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "a file is in its place", "move that file away or choose another folder"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "no space is left or the quota is used up", "free some space or choose a folder on another disk"
    if error.errno == errno.EROFS:
        return "the file system is read-only", "mount it for writing or choose another folder (nnUNet_results)"
    if isinstance(error, PermissionError):
        return "permission denied", "give yourself write permission or choose another folder (nnUNet_results)"
    return error.strerror or str(error), "fix that or choose another folder (nnUNet_results)"


def _temporary_prefix(target: Path) -> str:
    return f".{target.name[:150]}."  # names are limited to 255 bytes on common file systems


def _remove_stale_temporaries(target: Path) -> None:
    """Delete what earlier writes of `target` left when they were killed: checkpoints are hundreds of megabytes each."""
    prefix = _temporary_prefix(target)
    oldest_alive = time.time() - _STALE_AFTER_SECONDS
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            name = entry.name
            is_ours = name.startswith(prefix) and name.endswith(".tmp") and len(name) == len(prefix) + 12 + len(".tmp")
            if is_ours and entry.stat(follow_symlinks=False).st_mtime < oldest_alive:
                os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows and some network file systems cannot, and then it is left to them."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
