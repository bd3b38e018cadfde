"""Writing a raw dataset derived from another one: complete or not at all, nothing overwritten, images linked."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunetv2_ext.core.files import atomic_write_text, require_writable
from nnunetv2_ext.data.find import RAW, nnunet_folder
from nnunetv2_ext.data.raw import RawDataset, require_free_id
from nnunetv2_ext.data.subjects import BLOCK

DENSE = "labelsTr_dense"  # for evaluation only: nothing that trains opens it


@contextmanager
def new_dataset(source: RawDataset, target_id: int, suffix: str = "") -> Iterator[Path]:
    """A hidden folder to fill, which becomes `final_folder` at the end of the block, or vanishes on error.

    It has empty folders imagesTr and labelsTr.

    Raises:
        ValueError: the id is taken, or nnUNet_raw cannot be written.
    """
    require_free_id(target_id)
    final = final_folder(source, target_id, suffix)
    require_writable(final.parent)
    building = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        for sub in ("imagesTr", "labelsTr"):
            (building / sub).mkdir(parents=True)
        yield building
        require_free_id(target_id)  # another process may have been faster
        os.rename(building, final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def final_folder(source: RawDataset, target_id: int, suffix: str = "") -> Path:
    """Where `new_dataset` puts the finished dataset; its name is the source's with a suffix."""
    return nnunet_folder(RAW) / f"Dataset{target_id:03d}_{source.name.partition('_')[2] or 'derived'}{suffix}"


def notices(dataset_json: dict[str, Any]) -> list[str]:
    """What whoever trains on a derived dataset should know; our trainers print it at their start."""
    found = (dataset_json.get(BLOCK) or {}).get("notices") or []
    return [str(notice) for notice in found]


def link_images(source: RawDataset, case: str, folder: Path) -> None:
    """Link the images of a training case, with the JSON file that holds the spacing of TIFF images.

    Every link has the ending of its file; see `write_json` for a case whose ending is not the dataset's.

    Raises:
        ValueError: `folder` is imagesTs and an ending is not the dataset's.
    """
    folder.mkdir(exist_ok=True)
    for channel, file in enumerate(source.files[case]["images"]):
        ending = source.ending_of(file)
        if folder.name == "imagesTs" and ending != source.ending:
            raise ValueError(
                f"case {case}: {file} does not end in {source.ending}, so that nnUNetv2_predict would not find it: "
                "convert the image, or set no test cases aside"
            )
        link_file(file, folder / f"{case}_{channel:04d}{ending}")
    first = str(source.files[case]["images"][0])
    _link_spacing(first[: -len(f"_0000{source.ending_of(first)}")], case, folder)


def link_label(source: RawDataset, case: str, folder: Path) -> None:
    """Link the label of a training case as it is."""
    folder.mkdir(exist_ok=True)
    label = str(source.files[case]["label"])
    link_file(label, folder / f"{case}{source.ending}")
    _link_spacing(label.removesuffix(source.ending), case, folder)


def link_folder(origin: Path, folder: Path) -> None:
    """Link every file of `origin`, if that folder exists; names that are in `folder` already are left alone."""
    for file in sorted(origin.iterdir()) if origin.is_dir() else ():
        folder.mkdir(exist_ok=True)
        if file.is_file() and not (folder / file.name).exists():
            link_file(file, folder / file.name)


def link_file(origin: str | Path, target: Path) -> None:
    """Hard link; a copy where the file system cannot."""
    real = os.path.realpath(origin)  # a relative symbolic link would point nowhere from its new place
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)


def write_json(
    source: RawDataset,
    target_id: int,
    folder: Path,
    cases: Sequence[str],
    changes: dict[str, Any],
    suffix: str = "",
) -> None:
    """Write dataset.json: the source's with `changes` (None removes a key), and the new number of cases.

    The files are listed only if an image's ending is not the dataset's, by which nnU-Net would not find it.
    """
    content = {key: value for key, value in source.json.items() if key != "dataset"}
    images = {case: [source.ending_of(file) for file in source.files[case]["images"]] for case in cases}
    if any(ending != source.ending for endings in images.values() for ending in endings):
        content["dataset"] = {
            case: {
                "images": [f"imagesTr/{case}_{channel:04d}{ending}" for channel, ending in enumerate(endings)],
                "label": f"labelsTr/{case}{source.ending}",
            }
            for case, endings in images.items()
        }
    content |= {**changes, "numTraining": len(cases), "name": final_folder(source, target_id, suffix).name}
    content = {key: value for key, value in content.items() if value is not None}
    atomic_write_text(folder / "dataset.json", json.dumps(content, indent=2) + "\n")


def _link_spacing(stem: str, case: str, folder: Path) -> None:
    if os.path.isfile(f"{stem}.json"):
        link_file(f"{stem}.json", folder / f"{case}.json")
