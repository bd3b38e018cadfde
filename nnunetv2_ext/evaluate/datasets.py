"""Finding a dataset.json, and reading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nnunetv2_ext.core.files import read_json


def find_dataset_json(name_or_id: str) -> Path:
    """``4`` or ``Dataset004_x`` -> its dataset.json in nnUNet_preprocessed or nnUNet_raw."""
    prefix = f"Dataset{int(name_or_id):03d}_*" if name_or_id.isdigit() else name_or_id
    bases = [os.environ.get(variable) for variable in ("nnUNet_preprocessed", "nnUNet_raw")]
    for base in filter(None, bases):
        found = sorted(Path(base).glob(f"{prefix}/dataset.json"))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(f.parent.name for f in found)
            raise ValueError(f"-d {name_or_id} is ambiguous in {base}: {names}; give the full name")
    places = " and ".join(filter(None, bases)) or "nnUNet_preprocessed and nnUNet_raw, which are not set"
    raise ValueError(f"-d {name_or_id}: there is no such dataset in {places}; give -djfile FILE instead")


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
