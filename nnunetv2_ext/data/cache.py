"""What was computed for each case, kept on disk: one file a case, shared between processes, never required."""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from nnunetv2_ext.core.files import atomic_write, atomic_write_text, require_writable

T = TypeVar("T")

# of roots that cannot be written, in this process; deleted at its end
_INSTEAD: dict[Path, tempfile.TemporaryDirectory] = {}


class CaseCache:
    """Files ``ROOT/KIND_HASH/CASE.STATE.ending``: HASH of the parameters, STATE of what the case is computed from.

    An entry is replaced in one step, so that several processes may compute the same one. What cannot be written (a
    read-only folder, a full disk) goes to a temporary folder of this process, and the log says so once.

    Args:
        root: Outside of nnU-Net's configuration folders, where further files are errors.
        kind, ending: Of the file names.
        parameters: What all entries depend on; JSON-serialisable, and kept readable in ``key.json``.
        log: Gets the line about a folder that cannot be written.
    """

    def __init__(
        self, root: Path, kind: str, parameters: Mapping[str, Any], ending: str, log: Callable[[str], None] = print
    ) -> None:
        self.folder = Path(root) / f"{kind}_{digest(parameters)}"
        self._parameters, self._ending, self._log = dict(parameters), ending, log

    def read(self, case: str, state: Any, load: Callable[[Path], T]) -> T | None:
        """``load(file)`` of an entry; None if there is none for this state, or `load` fails because it is damaged.

        `state` is what the entry is computed from (`Preprocessed.file_state`); JSON-serialisable.
        """
        instead = _INSTEAD.get(self.folder.parent)
        for root in (self.folder.parent, *([instead.name] if instead else [])):
            file = Path(root) / self.folder.name / self._name(case, state)
            if file.is_file():
                with suppress(Exception):  # every format has its own errors for a damaged file
                    return load(file)
        return None

    def write(self, case: str, state: Any, content: bytes) -> Path:
        """Keep an entry, instead of older ones of the case; the file it is in now."""
        root = self.folder.parent
        if root not in _INSTEAD:
            try:
                return self._write(self.folder, case, state, content)
            except (OSError, ValueError) as error:
                _INSTEAD[root] = tempfile.TemporaryDirectory(prefix="nnunetv2_ext_cache_", ignore_cleanup_errors=True)
                cause = error.strerror if isinstance(error, OSError) else str(error).partition(";")[0]
                self._log(f"What is computed of the cases is computed again next time: not kept in {root} ({cause})")
        return self._write(Path(_INSTEAD[root].name) / self.folder.name, case, state, content)

    def _write(self, folder: Path, case: str, state: Any, content: bytes) -> Path:
        if not (folder / "key.json").is_file():
            require_writable(folder)
            key = json.dumps(self._parameters, indent=2, sort_keys=True)
            atomic_write_text(folder / "key.json", key + "\n")
        file = folder / self._name(case, state)
        atomic_write(file, lambda out: out.write(content))
        older = re.compile(rf"{re.escape(case)}\.[0-9a-f]{{16}}{re.escape(self._ending)}")
        for other in folder.iterdir():
            if other != file and older.fullmatch(other.name):
                with suppress(OSError):  # another process was faster, or Windows has it open
                    other.unlink()
        return file

    def _name(self, case: str, state: Any) -> str:
        return f"{case}.{digest(state)}{self._ending}"


def file_hash(file: Path) -> str:
    """SHA-256 of a file's content."""
    content = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def digest(value: Any) -> str:
    """16 hexadecimal digits that stand for a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
