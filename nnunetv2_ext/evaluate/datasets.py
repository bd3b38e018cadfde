"""What the files of a folder end in, and JSON objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2_ext.core.files import read_json


def file_ending(folder: Path) -> str:
    """The ending that most files of a folder have, of those that nnU-Net reads."""
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    known = sorted({e for reader in LIST_OF_IO_CLASSES for e in reader.supported_file_endings}, key=len, reverse=True)
    names = [p.name for p in folder.iterdir() if p.is_file()]
    counts = {ending: sum(name.endswith(ending) for name in names) for ending in known}
    best = max(counts, key=lambda ending: counts[ending])
    if not counts[best]:
        raise ValueError(f"{folder} has no file that nnU-Net reads ({', '.join(known)})")
    return best


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content
