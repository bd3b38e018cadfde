"""A dataset anew with the doubtful voxels of an audit under the ignore label, for when nobody can correct by hand."""

from pathlib import Path

import numpy as np

from nnunetv2_ext import __version__
from nnunetv2_ext.core.files import atomic_write_text
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.derive import (
    final_folder,
    link_folder,
    link_images,
    link_label,
    new_dataset,
    notices,
    write_json,
)
from nnunetv2_ext.data.find import PREPROCESSED, dataset_if_there, nnunet_folder
from nnunetv2_ext.data.raw import declared_values, require_free_id
from nnunetv2_ext.data.split import SPLIT
from nnunetv2_ext.data.subjects import BLOCK
from nnunetv2_ext.spatialnoise.audit.audit import MAPS, Audited
from nnunetv2_ext.spatialnoise.audit.error_map import read_map

_SUFFIX = "_audited"


def require_request(threshold: float, target_id: int | None) -> int:
    """The free id of the new dataset; ValueError for a threshold outside 0..1, or an id that is missing or taken."""
    if not 0 < threshold < 1:
        raise ValueError(f"--ignore-above is a probability above 0 and below 1, got {threshold}")
    if target_id is None:
        raise ValueError("--ignore-above writes a new dataset: give its id with -d")
    require_free_id(target_id, "-d")
    return target_id


def ignore_doubtful(found: Audited, threshold: float, target_id: int) -> tuple[Path, int, int]:
    """Write the dataset with every voxel under ``ignore`` whose probability of error is above the threshold.

    All other voxels keep their label, cases that were not judged keep theirs, images are linked, the folds stay.

    Returns:
        The folder, the number of voxels and of cases that changed.

    Raises:
        ValueError: as `require_request`, or no voxel is that doubtful.
    """
    require_request(threshold, target_id)
    source = found.dataset
    ignore = source.ignore if source.ignore is not None else max(declared_values(source.json["labels"])) + 1
    judged = {record["case"] for record in found.records}
    changed: dict[str, int] = {}
    with new_dataset(source, target_id, _SUFFIX) as folder:
        for case in progress_bar(source.cases, "dataset"):
            link_images(source, case, folder / "imagesTr")
            if case in judged:
                label, properties = source.read_label(case)
                doubtful = (read_map(found.output / MAPS / f"{case}.nii.gz") > threshold) & (label != ignore)
                if number := int(doubtful.sum()):
                    changed[case] = number
                    file = folder / "labelsTr" / f"{case}{source.ending}"
                    source.reader.write_seg(np.where(doubtful, ignore, label), str(file), properties)
                    continue
            link_label(source, case, folder / "labelsTr")
        if not changed:
            raise ValueError(f"no voxel is wrong with a probability above {threshold:g}: lower --ignore-above")
        for name in ("imagesTs", "labelsTs"):
            link_folder(source.folder / name, folder / name)
        voxels = sum(changed.values())
        told = f"an audit put {voxels} voxels of {len(changed)} cases under ignore (error above {threshold:g})"
        block = {
            **(source.json.get(BLOCK) or {}),
            "notices": [*notices(source.json), told],
            "audit": {
                "version": __version__,
                "dataset": source.name,
                "predictions": found.title,
                "rho": found.rho,
                "ignore_above": threshold,
                "ignored_voxels": changed,
                "not_judged": sorted(set(source.cases) - judged),
            },
        }
        labels = {**source.json["labels"], "ignore": ignore}
        write_json(source, target_id, folder, source.cases, {"labels": labels, BLOCK: block}, _SUFFIX)
    written = final_folder(source, target_id, _SUFFIX)
    base = dataset_if_there(source.name, PREPROCESSED)
    if base is not None and (base / SPLIT).is_file():  # the same folds, so that trainings can be compared
        target = nnunet_folder(PREPROCESSED) / written.name
        target.mkdir(exist_ok=True)
        atomic_write_text(target / SPLIT, (base / SPLIT).read_text(encoding="utf-8"))
    return written, voxels, len(changed)
