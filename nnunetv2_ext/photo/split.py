"""One binary dataset a label, and the way back from binary predictions to one label map."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_ext.core.files import read_json
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import find_reader, read_label_map
from nnunetv2_ext.data.derive import final_folder, link_folder, link_images, new_dataset, write_json
from nnunetv2_ext.data.raw import open_raw, require_free_id
from nnunetv2_ext.data.subjects import BLOCK

Array = npt.NDArray[Any]


def split_labels(source: int | str, target_ids: Sequence[int]) -> list[Path]:
    """For each label but background and ignore a dataset with that label alone; images are linked.

    A voxel of the ignore label stays ignored. Regions keep their voxels, also those they share.

    Returns:
        The folders, in the order of the labels in dataset.json.

    Raises:
        ValueError: not as many ids as labels, an id that is taken or given twice, or a damaged label (names the case).
    """
    dataset = open_raw(source)
    labels = {k: v for k, v in dataset.json["labels"].items() if k not in ("background", "ignore") and v != 0}
    if len(target_ids) != len(labels) or len(set(target_ids)) != len(target_ids):
        raise ValueError(
            f"{dataset.name} has {len(labels)} labels ({', '.join(labels)}) and -o names {len(set(target_ids))} "
            "different ids: give one for each"
        )
    for target_id in target_ids:
        require_free_id(target_id)
    written = []
    for target_id, (name, values) in zip(target_ids, labels.items()):
        part = "_" + "".join(c if c.isalnum() else "-" for c in name)
        with new_dataset(dataset, target_id, part) as folder:
            for case in progress_bar(dataset.cases, f"label {name}"):
                link_images(dataset, case, folder / "imagesTr")
                label, properties = dataset.read_label(case)
                binary = np.isin(label, np.atleast_1d(values)).astype(label.dtype)
                if dataset.ignore is not None:
                    binary[label == dataset.ignore] = 2
                dataset.reader.write_seg(binary, str(folder / "labelsTr" / f"{case}{dataset.ending}"), properties)
            link_folder(dataset.folder / "imagesTs", folder / "imagesTs")
            new = {"background": 0, name: 1, **({} if dataset.ignore is None else {"ignore": 2})}
            block = {**(dataset.json.get(BLOCK) or {}), "split_from": {"dataset": dataset.name, "label": name}}
            changes = {"labels": new, "regions_class_order": None, BLOCK: block}
            write_json(dataset, target_id, folder, dataset.cases, changes, part)
        written.append(final_folder(dataset, target_id, part))
    return written


@dataclass
class Merged:
    """What was merged.

    Attributes:
        cases: their number.
        claimed: voxels that at least one prediction claims.
        overlap: voxels that several claim.
        lost: of those, by label, the voxels it had to leave to another.
    """

    cases: int = 0
    claimed: int = 0
    overlap: int = 0
    lost: dict[int, int] = field(default_factory=dict)


def combine(claims: Array, labels: Sequence[int], scores: Array | None = None) -> Array:
    """One label map of K binary ones.

    Args:
        claims: ``(K, ...)`` bool.
        labels: K values.
        scores: ``(K, ...)``, the highest of those that claim a voxel wins, the later of equals; None: the later.

    Returns:
        ``(...)`` int32, 0 where nobody claims.
    """
    order = np.arange(1, len(labels) + 1).reshape(-1, *(1,) * (claims.ndim - 1))
    rank = np.where(claims, order if scores is None else scores, -np.inf)
    winner = len(labels) - 1 - np.argmax(rank[::-1], 0)  # argmax takes the first of equals
    return np.where(claims.any(0), np.asarray(labels)[winner], 0).astype(np.int32)


def merge_labels(
    folders: Sequence[Path],
    labels: Sequence[int],
    output: Path,
    by: str = "probability",
    order: Sequence[str] = (),
    thresholds: Sequence[float] = (0.5,),
) -> Merged:
    """Put nnU-Net's predictions of K binary models together.

    Args:
        folders: K of them, with the predictions of the same cases; for ``probability`` saved with
            ``--save_probabilities``.
        labels: the value of each in the result.
        output: a new or empty folder.
        by: ``probability``: the most probable of those above their threshold; ``order``: the later in ``order`` wins.
        order: label names, as in the folders' dataset.json, or values; all of them. Empty: as given.
        thresholds: of the foreground's probability, one for all or one each.

    Raises:
        ValueError: a case that one folder lacks, missing probabilities, label maps of different shapes, an unknown
            name, or an output that is not empty.
    """
    if len(folders) < 2 or len(labels) != len(folders) or len(set(labels)) != len(labels) or min(labels) < 1:
        raise ValueError(
            f"-labels names a different positive value for each of at least two folders; got {len(folders)} folders "
            f"and {list(labels)}"
        )
    if len(thresholds) not in (1, len(folders)) or not all(0 <= t <= 1 and math.isfinite(t) for t in thresholds):
        raise ValueError(f"--threshold is one number from 0 to 1, or one for each folder; got {list(thresholds)}")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty, and nothing is overwritten: name another folder")
    contents = [_dataset_json(folder) for folder in folders]
    ranks = _ranks(order, labels, contents)
    ending = str(contents[0]["file_ending"])
    cases = _cases(folders, ending)
    example = folders[0] / f"{cases[0]}{ending}"
    reader = find_reader(ending, contents[0].get("overwrite_image_reader_writer"), example)
    limits = list(thresholds) * (len(folders) if len(thresholds) == 1 else 1)
    if by == "probability":
        _require_probabilities(folders, cases)
    output.mkdir(parents=True, exist_ok=True)
    merged = Merged(len(cases), lost=dict.fromkeys(labels, 0))
    for case in progress_bar(cases, "merging"):
        maps = [read_label_map(case, folder / f"{case}{ending}", reader, "prediction") for folder in folders]
        shapes = {m.shape for m, _ in maps}
        if len(shapes) > 1:
            raise ValueError(f"case {case}: the predictions have different shapes, {sorted(shapes)}")
        claims, scores = np.stack([m == 1 for m, _ in maps]), None
        if by == "probability":
            scores = np.stack([_probability(folder, case, claims.shape[1:]) for folder in folders])
            claims = np.stack([p >= limit for p, limit in zip(scores, limits)])
        chosen = [labels[i] for i in ranks]
        result = combine(claims[ranks], chosen, None if scores is None else scores[ranks])
        merged.claimed += int(claims.any(0).sum())
        merged.overlap += int((claims.sum(0) > 1).sum())
        for value, claim in zip(labels, claims):
            merged.lost[value] += int((claim & (result != value)).sum())
        reader.write_seg(result, str(output / f"{case}{ending}"), maps[0][1])
    return merged


def _dataset_json(folder: Path) -> Mapping[str, Any]:
    if not (folder / "dataset.json").is_file():
        raise ValueError(f"{folder} has no dataset.json: give folders that nnUNetv2_predict has written")
    content: Mapping[str, Any] = read_json(folder / "dataset.json")
    return content


def _ranks(order: Sequence[str], labels: Sequence[int], contents: Sequence[Mapping[str, Any]]) -> list[int]:
    """The folders' indices, the one that wins last."""
    if not order:
        return list(range(len(labels)))
    names = [next((n for n, v in c["labels"].items() if v == 1 or v == [1]), "") for c in contents]
    known = {**{name: i for i, name in enumerate(names)}, **{str(v): i for i, v in enumerate(labels)}}
    unknown = [name for name in order if name not in known]
    ranks = [known[name] for name in order if name in known]
    if unknown or sorted(ranks) != list(range(len(labels))):
        raise ValueError(
            f"--order names every label once, by name ({', '.join(names)}) or value ({', '.join(map(str, labels))}); "
            f"got {' '.join(order)}"
        )
    return ranks


def _cases(folders: Sequence[Path], ending: str) -> list[str]:
    there = [{p.name.removesuffix(ending) for p in f.glob(f"*{ending}") if p.is_file()} for f in folders]
    for folder, own in zip(folders, there):
        if missing := sorted(set().union(*there) - own):
            raise ValueError(f"{folder} has no prediction of case {missing[0]}, which another folder has: predict it")
    if not there[0]:
        raise ValueError(f"{folders[0]} holds no prediction that ends in {ending}")
    return sorted(there[0])


def _require_probabilities(folders: Sequence[Path], cases: Sequence[str]) -> None:
    for folder in folders:
        if missing := [case for case in cases if not (folder / f"{case}.npz").is_file()]:
            raise ValueError(
                f"{folder} has no probabilities of case {missing[0]} ({missing[0]}.npz): predict with "
                "--save_probabilities, or merge --by order"
            )


def _probability(folder: Path, case: str, shape: tuple[int, ...]) -> Array:
    try:
        with np.load(folder / f"{case}.npz") as content:
            values: Array = content["probabilities"]
    except Exception as error:  # zip, numpy and key errors
        raise ValueError(f"case {case}: {folder / f'{case}.npz'} cannot be read ({error}); predict again") from error
    foreground = values[-1]  # softmax: background, foreground; regions: foreground alone
    if foreground.shape != shape:
        raise ValueError(f"case {case}: probabilities in {folder} have shape {foreground.shape}, the labels {shape}")
    return foreground
