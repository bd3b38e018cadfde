"""Enhancing a raw dataset, and new images as that dataset was, so that training and prediction cannot differ."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from skimage import io

from nnunetv2_ext import __version__
from nnunetv2_ext.core.files import atomic_write_text, read_json, require_writable
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.derive import final_folder, link_folder, link_label, new_dataset, notices, write_json
from nnunetv2_ext.data.find import RAW, find_dataset
from nnunetv2_ext.data.raw import open_raw, require_free_id
from nnunetv2_ext.data.subjects import BLOCK
from nnunetv2_ext.photo.enhancement import Enhancement

RECORD = "enhance.json"
ENDINGS = (".png", ".bmp", ".tif", ".tiff")
Job = tuple[str, Path, Path]  # case, image, where the enhanced one goes


def enhance_dataset(source: int | str, target_id: int, enhancement: Enhancement, processes: int = 1) -> Path:
    """A copy of a dataset with enhanced images; labels are linked as they are. Returns its folder.

    Raises:
        ValueError: an image cannot be enhanced (names case and file), the id is taken, or the dataset is not of
            photographs.
    """
    dataset = open_raw(source)
    require_free_id(target_id)
    if dataset.ending not in ENDINGS:
        raise ValueError(f"{dataset.name} has {dataset.ending} files; photographs end in {', '.join(ENDINGS)}")
    channels = {case: [Path(f) for f in entry["images"]] for case, entry in dataset.files.items()}
    with new_dataset(dataset, target_id) as folder:
        jobs = [(case, file, folder / "imagesTr" / file.name) for case, files in channels.items() for file in files]
        tests = dataset.folder / "imagesTs"
        if tests.is_dir():
            (folder / "imagesTs").mkdir()
            jobs += [(f.stem, f, folder / "imagesTs" / f.name) for f in _images(tests, dataset.ending)]
        for case in dataset.cases:
            link_label(dataset, case, folder / "labelsTr")
        link_folder(dataset.folder / "labelsTs", folder / "labelsTs")
        hashes = _run(jobs, enhancement, processes)
        _write_record(folder, enhancement, dataset.name, hashes)
        known = dict(dataset.json.get(BLOCK) or {})
        notice = (
            f"the images were made by `nnUNetv2_ext enhance`; make new ones the same way before nnUNetv2_predict: "
            f"nnUNetv2_ext enhance -i IMAGES -o ENHANCED --like {target_id}"
        )
        block = {**known, "enhance": asdict(enhancement), "notices": [*notices(dataset.json), notice]}
        write_json(dataset, target_id, folder, dataset.cases, {BLOCK: block})
    return final_folder(dataset, target_id)


def enhance_folder(images: Path, output: Path, like: int | str, processes: int = 1) -> int:
    """Images of a folder, enhanced as the dataset ``like`` was, into a new folder. Returns their number.

    Raises:
        ValueError: the dataset has no record of an enhancement, no image is there, the output is not empty, or an image
            cannot be enhanced.
    """
    folder = find_dataset(like, RAW)
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder} has no {RECORD}, so it was not made by `nnUNetv2_ext enhance`; name one that was")
    record = read_json(folder / RECORD)
    try:
        enhancement = Enhancement(**record["parameters"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RECORD} holds parameters that this version does not know ({error}): pip install -U nnunetv2-ext"
        ) from error
    ending = str(read_json(folder / "dataset.json")["file_ending"])
    if not images.is_dir():
        raise ValueError(f"-i {images} is not a folder")
    files = _images(images, ending)
    if not files:
        raise ValueError(f"{images} holds no image that ends in {ending}, as those of {folder.name} do")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty, and nothing is overwritten: name another folder")
    output.mkdir(parents=True, exist_ok=True)
    require_writable(output)
    hashes = _run([(f.stem, f, output / f.name) for f in files], enhancement, processes)
    _write_record(output, enhancement, str(images.resolve().name), hashes)
    return len(files)


def _images(folder: Path, ending: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(ending) and not p.name.startswith("."))


def _write_record(folder: Path, enhancement: Enhancement, source: str, hashes: Mapping[str, str]) -> None:
    content = {"version": __version__, "parameters": asdict(enhancement), "source": source, "sha256": dict(hashes)}
    atomic_write_text(folder / RECORD, json.dumps(content, indent=2) + "\n")


def _run(jobs: Sequence[Job], enhancement: Enhancement, processes: int) -> dict[str, str]:
    """SHA-256 of each source, by file name."""
    hashes: dict[str, str] = {}
    with progress_bar(range(len(jobs)), "enhancing") as bar:
        for name, digest in _results(jobs, enhancement, min(processes, len(jobs))):
            hashes[name] = digest
            bar.update()
    return dict(sorted(hashes.items()))


def _results(jobs: Sequence[Job], enhancement: Enhancement, processes: int) -> Iterator[tuple[str, str]]:
    if processes <= 1:
        yield from (_enhance(job, enhancement) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_enhance, jobs, [enhancement] * len(jobs), chunksize=1)


def _enhance(job: Job, enhancement: Enhancement) -> tuple[str, str]:
    case, source, target = job
    try:
        image = np.asarray(io.imread(source))
    except Exception as error:  # every format has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"case {case}: the image {source} cannot be read ({reason}): replace the file") from error
    try:
        enhanced = enhancement.apply(image)
    except ValueError as error:
        raise ValueError(f"case {case}: the image {source} cannot be enhanced: {error}") from error
    io.imsave(os.fspath(target), enhanced, check_contrast=False)
    return source.name, hashlib.sha256(source.read_bytes()).hexdigest()
