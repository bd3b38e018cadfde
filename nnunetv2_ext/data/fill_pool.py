"""Filling a dataset's pool (data/pool.py) from a folder of images; leaks are looked for before anything is done."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle

from nnunetv2_ext.core.files import read_json, require_writable
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import short
from nnunetv2_ext.data.channels import channel_names
from nnunetv2_ext.data.folders import cases_of_images, preprocess_case
from nnunetv2_ext.data.pool import Pool, PoolCase, pools_folder, preprocessing_key, read_pool, require_key
from nnunetv2_ext.data.preprocessed import WRITTEN, Preprocessed, open_preprocessed
from nnunetv2_ext.data.raw import RawDataset, open_raw
from nnunetv2_ext.data.subjects import divided, pairs_suggested, subjects_of_dataset

_TOLERANCE = 0.01  # a spacing this share outside of the labelled ones is told
_GZIP = 18  # bytes of an empty gzip file
_PIECE = 2**20  # bytes read at once


def fill_pool(
    dataset: int | str,
    configuration: str,
    plans: str,
    images: Path,
    processes: int = 1,
    regex: str | None = None,
    table: Path | None = None,
    say: Callable[[str], None] = print,
) -> Pool:
    """Preprocess the images of a folder into the dataset's pool; cases that are there with the same content stay.

    Args:
        dataset: id or name; planned, and its raw images are there to be compared with.
        configuration, plans: that the pool is for.
        images: named CASE_0000 as nnU-Net's; no labels.
        processes: that preprocess; 1: this one.
        regex, table: which cases are of one subject (data/subjects.py); None: what dataset.json records.
        say: gets lines for people.

    Raises:
        ValueError: no such dataset or plans; no image; a case that is labelled, a test case, or a test case's subject;
            a file that is one of those under another name; a pool of other plans; a damaged image. What was done
            before a damaged image stays, and the same command goes on.
    """
    target = open_preprocessed(dataset, configuration, plans, files=False)
    raw = open_raw(target.base.name, complete=False)
    found = cases_of_images(images, raw.ending)
    if not found:
        raise ValueError(f"{images} holds no image CASE_0000{raw.ending}: name the folder of the unlabelled images")
    per_case = len(next(iter(raw.files.values()))["images"])
    for case, files in found.items():
        wanted = [f"{case}_{number:04d}{raw.ending}" for number in range(per_case)]
        if wanted != [file.name for file in files]:
            there = ", ".join(file.name for file in files)
            raise ValueError(f"case {case} has the channels {there}, and the dataset's cases have {', '.join(wanted)}: "
                             "add or move files")  # fmt: skip
    tests = _tests(raw)
    _require_other_names(found, raw, tests)
    subjects = _subjects(found, raw, tests, regex, table, say)

    folder = pools_folder(target.base) / target.configuration.data_identifier
    pool = read_pool(folder)
    if pool is None:
        pool = Pool(folder, preprocessing_key(target.plans, target.configuration), configuration)
    require_key(pool, target.plans, target.configuration)
    hashes = {case: tuple(map(content_hash, files)) for case, files in progress_bar(list(found.items()), "hashing")}
    _require_other_content(hashes, found, raw, tests)
    require_writable(pool.data_folder)
    todo = {case: files for case, files in found.items() if not _is_there(pool, case, hashes[case])}
    if both := _twice({**{c: k.sha256 for c, k in pool.cases.items()}, **hashes}):
        raise ValueError(f"the cases {both[0]} and {both[1]} are the same image: move one of them away")
    pool.cases = {case: known for case, known in pool.cases.items() if case not in todo}
    pool.subjects = subjects if subjects is None else {**(pool.subjects or {}), **subjects}
    pool.wanted = len(pool.cases) + len(todo)
    pool.write()  # from now on the pool is known to lack what is still to come
    if len(todo) < len(found):
        say(f"{len(found) - len(todo)} of {len(found)} cases are in the pool already")
    _preprocess(pool, todo, hashes, target, processes)
    for line in _outside_spacing(pool, todo, target):
        say(line)
    say(f"unlabelled cases in {pool.folder}: {len(pool.cases)}")
    return pool


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content; of .gz the unpacked content, as gzip writes the time into each file."""
    digest = hashlib.sha256()
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            while piece := content.read(_PIECE):
                digest.update(piece)
    except (OSError, EOFError) as error:
        raise ValueError(f"the image {file} cannot be read ({error}): replace the file") from error
    return digest.hexdigest()


def _content_size(file: Path) -> int:
    """Bytes of the content, modulo 2^32 as gzip notes it; files of different sizes need no hash."""
    if file.suffix != ".gz":
        return file.stat().st_size % 2**32
    if file.stat().st_size < _GZIP:
        raise ValueError(f"the image {file} is no gzip file, with {file.stat().st_size} bytes: replace the file")
    with file.open("rb") as content:
        content.seek(-4, 2)
        return int.from_bytes(content.read(4), "little")


def _tests(raw: RawDataset) -> dict[str, list[Path]]:
    folder = raw.folder / "imagesTs"
    return cases_of_images(folder, raw.ending) if folder.is_dir() else {}


def _require_other_names(found: Iterable[str], raw: RawDataset, tests: Iterable[str]) -> None:
    for known, what in ((raw.files, "labelled"), (tests, "test cases")):
        if both := sorted(set(found) & set(known)):
            names = ", ".join(both[:5]) + (f" and {len(both) - 5} more" if len(both) > 5 else "")
            raise ValueError(f"{names} are {what} of {raw.name}, on which a training is judged: move them out of the "
                             "folder, or rename them if they are other scans")  # fmt: skip


def _subjects(
    found: Iterable[str],
    raw: RawDataset,
    tests: Iterable[str],
    regex: str | None,
    table: Path | None,
    say: Callable[[str], None],
) -> dict[str, str] | None:
    known = subjects_of_dataset(raw.json, [*raw.files, *tests, *found], regex, table)
    if known is None:
        pairs = pairs_suggested([*raw.files, *tests, *found])
        if pairs is not None and divided(found, [*raw.files, *tests], pairs.subjects):
            say(f"WARNING: {pairs}. Nothing says so, and a subject may be scored and trained on: give --group-regex")
        return None
    if both := divided(found, tests, known):
        raise ValueError(f"{len(both)} subjects, such as {both[0]}, have test cases of {raw.name} and images in the "
                         "folder: move their images out of it")  # fmt: skip
    if both := divided(found, raw.files, known):
        say(f"{len(both)} subjects also have labelled cases: a fold leaves them out where they validate")
    return {case: subject for case, subject in known.items() if case not in set(tests)}


def _require_other_content(
    hashes: Mapping[str, Sequence[str]],
    found: Mapping[str, Sequence[Path]],
    raw: RawDataset,
    tests: Mapping[str, Sequence[Path]],
) -> None:
    """Compare with every labelled and test image of the same size."""
    sizes = {_content_size(file) for files in found.values() for file in files}
    known = {digest: case for case, digests in hashes.items() for digest in digests}
    others = [Path(file) for entry in raw.files.values() for file in entry["images"]]
    others += [file for files in tests.values() for file in files]
    for file in progress_bar(others, "comparing with labelled and test images"):
        if file.is_file() and _content_size(file) in sizes and (case := known.get(content_hash(file))):
            raise ValueError(f"case {case} is the image {file} under another name: move it out of the folder")


def _twice(hashes: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    first: dict[tuple[str, ...], str] = {}
    for case, digests in sorted(hashes.items()):
        if (other := first.setdefault(tuple(digests), case)) != case:
            return other, case
    return None


def _is_there(pool: Pool, case: str, digests: tuple[str, ...]) -> bool:
    known = pool.cases.get(case)
    return known is not None and known.sha256 == digests and (pool.data_folder / f"{case}.pkl").is_file()


def _preprocess(
    pool: Pool,
    todo: Mapping[str, Sequence[Path]],
    hashes: Mapping[str, tuple[str, ...]],
    target: Preprocessed,
    processes: int,
) -> None:
    work = partial(_preprocess_one, target.base, target.plans.plans_name, target.configuration_name, pool.data_folder)
    jobs = list(todo.items())

    def take(shapes: Iterable[tuple[int, ...]]) -> None:
        bar = progress_bar(len(jobs), "preprocessing")
        for (case, files), shape in zip(jobs, shapes, strict=True):
            pool.cases[case] = PoolCase(tuple(str(file.absolute()) for file in files), hashes[case], shape)
            pool.write()
            bar.update()
        bar.close()

    processes = min(processes, len(jobs))
    if processes < 2:
        take(map(work, jobs))
        return
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        take(workers.imap(work, jobs))


def _preprocess_one(
    base: Path, plans_name: str, configuration_name: str, folder: Path, job: tuple[str, Sequence[Path]]
) -> tuple[int, ...]:
    """One case as nnU-Net does it, ``CASE.pkl`` last; its shape. At module level: worker processes import it."""
    case, files = job
    target = open_preprocessed(base.name, configuration_name, plans_name, files=False)
    arguments = target.plans, target.configuration, target.dataset_json
    data, inside, properties = preprocess_case(case, files, None, *arguments)
    wanted = len(channel_names(target.dataset_json)) or len(data)
    if len(data) != wanted:
        raise ValueError(
            f"case {case}: {files[0]} gives {len(data)} channels, and the dataset has {wanted}: replace it"
        )
    if not data.size or not (inside >= 0).any():
        raise ValueError(f"case {case}: {files[0]} is 0 everywhere: replace the file")
    # nnU-Net's loader wants to know where the classes are
    done = data, inside, {**properties, "class_locations": {}}
    preprocessor = target.configuration.preprocessor_class(verbose=False)
    preprocessor.run_case = lambda *_: done  # its own way of writing
    _remove(folder, case)  # of a run that was killed: blosc2 writes over nothing
    try:
        preprocessor.run_case_save(str(folder / case), [], None, *arguments)
    except (OSError, RuntimeError) as error:  # blosc2's word for every failed write
        _remove(folder, case)
        raise ValueError(
            f"case {case} cannot be written to {folder} ({error}): look at the free space there, and run the same "
            "command again, which goes on"
        ) from error
    except BaseException:
        _remove(folder, case)
        raise
    return tuple(int(size) for size in data.shape[1:])


def _remove(folder: Path, case: str) -> None:
    for ending in WRITTEN:
        (folder / f"{case}{ending}").unlink(missing_ok=True)


def _outside_spacing(pool: Pool, cases: Iterable[str], target: Preprocessed) -> list[str]:
    """Lines on spacings that no labelled case has."""
    file = target.base / "dataset_fingerprint.json"
    if not file.is_file():
        return []
    labelled = np.asarray(read_json(file)["spacings"], dtype=float)
    low, high = labelled.min(0), labelled.max(0)
    far = []
    for case in cases:
        spacing = np.asarray(load_pickle(str(pool.data_folder / f"{case}.pkl"))["spacing"], dtype=float)
        if (spacing < low * (1 - _TOLERANCE)).any() or (spacing > high * (1 + _TOLERANCE)).any():
            far.append((case, spacing))
    if not far:
        return []
    case, spacing = far[0]
    known = f"{short(low)} to {short(high)}" if (low < high).any() else short(low)
    what = f"spacing of {case} is" if len(far) == 1 else f"spacings of {len(far)} cases, such as {case}, are"
    return [f"WARNING: the {what} outside of the labelled cases' range: {short(spacing)} mm, and there {known} mm"]
