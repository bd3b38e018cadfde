"""State per case beside the fold, for methods that write back by place what they learnt about a case."""

import io
import os
import shutil
import struct
import zlib
from bisect import insort
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext.core.files import atomic_write

_MAGIC = b"nnuxcase"
# behind the array, where numpy does not look: magic, step of this version, step of the case's first one; then the
# CRC-32 of all bytes before it
_STAMP, _CHECKSUM = struct.Struct("<8sQQ"), struct.Struct("<I")
_BEHIND = _STAMP.size + _CHECKSUM.size
_CHUNK = 2**20


class CaseStore:
    """An array per case on the disk; each checkpoint finds the arrays as they were when it was written.

    Changes go to a working copy. `flush` seals it as the version of a checkpoint that is about to be written. `saved`
    drops the versions that no checkpoint needs any more. `rewind` goes back to a checkpoint's. ``MethodTrainer`` calls
    these three for its ``case_store``; a method calls `read`, `write` and `update` only.

    One process uses a store: the training one, never a worker of the loader; under DDP the first rank.

    Args:
        folder: ``case_state`` of the fold; made when something is written.
        shape: the array's shape by case id; spatial axes last. A case of another shape is refused.
        fill: value of what nobody has written, and of what lies outside a case.
    """

    def __init__(self, folder: Path, shape: Callable[[str], Sequence[int]], fill: float = 0) -> None:
        self.folder, self._shape, self._fill = Path(folder), shape, fill
        self._process = os.getpid()
        self._working: set[str] = set()
        self._verified: set[Path] = set()
        self._steps: dict[str, list[int]] = {}  # of the sealed versions, ascending
        for path in self.folder.glob("*.npy"):
            step = path.stem.rpartition(".")[2]
            if step.isdigit():
                insort(self._steps.setdefault(_case(path), []), int(step))

    def cases(self) -> list[str]:
        """Ids of the cases with an array."""
        return sorted({*self._steps, *self._working})

    # ---- what a method calls -----------------------------------------------------------------------------------------
    def read(self, case: str, box: Any = None) -> np.ndarray | None:
        """A copy of the array, or of a box of it; None where nothing was written for the case yet.

        Args:
            case: its id.
            box: ``(n, 2)`` first and one past the last index along the last n axes, as ``boxes`` of a
                `PlacedDataLoader`. It may reach beyond the case, where the copy holds ``fill``.

        Raises:
            ValueError: the file is damaged, cut short or gone, belongs to another step, or the case has another shape.
        """
        self._require_own_process()
        if case not in self._working and case not in self._steps:
            return None
        array = self._open(case)
        if box is None:
            return np.array(array)
        inside, in_box, shape = _cut(array.shape, box)
        result = np.full(shape, self._fill, array.dtype)
        result[in_box] = array[inside]
        return result

    def write(self, case: str, array: Any) -> None:
        """Replace the case's array; floats are kept in half precision, other numbers as they are.

        Raises:
            ValueError: not the case's shape, no numbers, or a float too large for half precision.
            OSError: the disk is full, or the folder cannot be written.
        """
        self._require_own_process()
        array = _compact(case, np.asarray(array))
        self._require_shape(case, array.shape, "what is written")
        self._make_working(case, array.dtype, array)

    def update(self, case: str, box: Any, patch: Any) -> None:
        """Replace a box of the array; what lies outside the case is dropped. A new array holds ``fill`` elsewhere.

        The patch has the size of the box (see `read`) along the last axes, and the array's along the ones before.

        Raises:
            ValueError: as `read` and `write`; or the patch does not fit the box.
            OSError: as `write`.
        """
        self._require_own_process()
        patch = _compact(case, np.asarray(patch))
        working = case in self._working
        old = self._open(case, "r+" if working else "r") if working or case in self._steps else None
        dtype = patch.dtype if old is None else old.dtype
        inside, in_box, size = _cut(tuple(self._shape(case)), box)
        if patch.shape != size or not np.can_cast(patch.dtype, dtype, "same_kind"):
            raise ValueError(
                f"case {case}: a patch of {_text(patch.shape)} {patch.dtype} does not fit a box of {_text(size)} in "
                f"the stored {dtype}"
            )
        if old is None or not working:
            old = self._make_working(case, dtype, self._fill if old is None else old)
        old[inside] = patch[in_box]

    # ---- what the trainer calls --------------------------------------------------------------------------------------
    def flush(self, step: int) -> None:
        """Seal all changes as the versions of ``step``; call it before a checkpoint of that step is written.

        Raises:
            ValueError: there is a version of a later step, so `rewind` was not called.
            OSError: the disk is full; what was sealed before stays.
        """
        self._require_own_process()
        for case in sorted(self._working):
            steps = self._steps.get(case, [])
            if steps and steps[-1] > step:
                raise ValueError(f"case {case}: {self._sealed(case)} is later than step {step}; call rewind first")
            first = self._first_step(self._sealed(case), steps[-1]) if steps else step
            array, target = self._open(case), self.folder / f"{case}.{step}.npy"
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
            parts: list[Any] = [header.getvalue(), array.data, _STAMP.pack(_MAGIC, step, first)]
            parts.append(_CHECKSUM.pack(reduce(lambda checksum, part: zlib.crc32(part, checksum), parts, 0)))
            atomic_write(target, lambda file, parts=parts: file.writelines(parts))  # type: ignore[misc]
            self._verified.add(target)
            self._steps[case] = [*(s for s in steps if s != step), step]
            self._working.remove(case)
            self._work_file(case).unlink()

    def saved(self, step: int) -> None:
        """Drop what is older than the checkpoint of ``step``: that from which ``--c`` would continue is written."""
        self._require_own_process()
        for case, steps in self._steps.items():
            needed = max((s for s in steps if s <= step), default=0)
            self._drop(case, [s for s in steps if s < needed])

    def rewind(self, step: int) -> None:
        """Go back to the arrays that belong to the checkpoint of ``step``; what came later is deleted.

        Raises:
            ValueError: a case's array of that time was dropped already; nothing is deleted then.
        """
        self._require_own_process()
        later = {case: [s for s in steps if s > step] for case, steps in self._steps.items()}
        for case, steps in later.items():
            if not steps or steps != self._steps[case]:
                continue
            path = self.folder / f"{case}.{steps[0]}.npy"
            if self._first_step(path, steps[0]) <= step:  # else the case had no array at that time
                raise ValueError(
                    f"case {case}: {path} is of step {steps[0]}, the checkpoint of step {step}, and the older version "
                    f"is gone: continue from a checkpoint of step {steps[0]} or later, or move {self.folder} away to "
                    "start all cases' state anew"
                )
        for case, steps in later.items():
            self._drop(case, steps)
        self._steps = {case: steps for case, steps in self._steps.items() if steps}
        self._working.clear()
        for path in self.folder.glob("*.work"):
            path.unlink()

    def set_aside(self) -> None:
        """Start empty: what an earlier training left is moved to ``previous_case_state``, as its checkpoints are."""
        self._require_own_process()
        if self.folder.is_dir():
            previous = self.folder.with_name(f"previous_{self.folder.name}")
            shutil.rmtree(previous, ignore_errors=True)
            self.folder.replace(previous)
        self._steps, self._working, self._verified = {}, set(), set()

    # ---- files -------------------------------------------------------------------------------------------------------
    def _work_file(self, case: str) -> Path:
        return self.folder / f"{case}.work"

    def _sealed(self, case: str) -> Path:
        return self.folder / f"{case}.{self._steps[case][-1]}.npy"

    def _make_working(self, case: str, dtype: np.dtype, content: Any) -> np.memmap:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._work_file(case)
        array = np.lib.format.open_memmap(path, "w+", dtype, tuple(self._shape(case)))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here; found by the memory map, it ends the process
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        array[...] = content
        self._working.add(case)
        return array

    def _open(self, case: str, mode: Any = "r") -> np.memmap:
        path = self._work_file(case) if case in self._working else self._sealed(case)
        try:
            if case not in self._working and path not in self._verified:
                self._first_step(path, self._steps[case][-1])
                _compare_checksum(path)
                self._verified.add(path)
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        except FileNotFoundError as error:
            raise ValueError(
                f"case {case}: its state {path} is gone; restore the file, or move {self.folder} away to start anew"
            ) from error
        except (OSError, EOFError) as error:
            raise _damaged(path, str(error)) from error
        self._require_shape(case, array.shape, str(path))
        return array

    @staticmethod
    def _first_step(path: Path, step: int) -> int:
        """Step of the case's first version, as the version of ``step`` in ``path`` says."""
        with path.open("rb") as file:
            if path.stat().st_size < _BEHIND:
                raise _damaged(path, "its end is missing")
            file.seek(-_BEHIND, os.SEEK_END)
            magic, own, first = _STAMP.unpack(file.read(_STAMP.size))
        if magic != _MAGIC:
            raise _damaged(path, "its end is missing")
        if own != step:
            raise ValueError(f"case {_case(path)}: {path} was written at step {own}, not {step}; give it its name back")
        return first

    def _drop(self, case: str, steps: Sequence[int]) -> None:
        for step in steps:
            path = self.folder / f"{case}.{step}.npy"
            path.unlink(missing_ok=True)
            self._verified.discard(path)
        self._steps[case] = [s for s in self._steps[case] if s not in steps]

    def _require_shape(self, case: str, shape: Sequence[int], what: str) -> None:
        wanted = tuple(self._shape(case))
        if tuple(shape) != wanted:
            raise ValueError(
                f"case {case}: {what} has the shape {_text(shape)}, the case wants {_text(wanted)}; continue with the "
                f"data the training was started with, or move {self.folder} away to start anew"
            )

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise ValueError(f"the store {self.folder} is used in another process; only the one that made it may")


def _compare_checksum(path: Path) -> None:
    checksum, end = 0, path.stat().st_size - _CHECKSUM.size
    with path.open("rb") as file:
        while file.tell() < end:
            checksum = zlib.crc32(file.read(min(end - file.tell(), _CHUNK)), checksum)
        if _CHECKSUM.pack(checksum) != file.read():
            raise _damaged(path, "its content does not match its checksum")


def _cut(shape: Sequence[int], box: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[int, ...]]:
    """Where the box meets an array of ``shape``: there, within the box, and the box's own shape."""
    box = np.asarray(box).astype(int).reshape(-1, 2)
    axes = shape[len(shape) - len(box) :]
    first = np.clip(box[:, 0], 0, axes)
    end = np.maximum(np.clip(box[:, 1], 0, axes), first)
    inside = tuple(map(slice, first, end))
    in_box = tuple(map(slice, first - box[:, 0], end - box[:, 0]))
    return (..., *inside), (..., *in_box), (*shape[: len(shape) - len(box)], *(int(b - a) for a, b in box))


def _compact(case: str, array: np.ndarray) -> np.ndarray:
    """Half precision for floats."""
    if array.dtype.kind not in "fiub":
        raise ValueError(f"case {case}: a state of {array.dtype} cannot be stored; it takes real numbers")
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if (np.isinf(half) & np.isfinite(array)).any():
        raise ValueError(f"case {case}: a value beyond 65504 does not fit half precision; scale the state down")
    return half


def _case(path: Path) -> str:
    """Of a sealed version or a working copy."""
    return path.stem if path.suffix == ".work" else path.stem.rpartition(".")[0]


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"case {_case(path)}: {path} is damaged or cut short ({reason}); restore the file, or move {path.parent} "
        "away to start anew"
    )


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
