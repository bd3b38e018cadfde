"""The dataset that ``pseudo-label`` writes: labelled cases as they are, and cases of the pool with a model's labels."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle

from nnunetv2_ext import __version__
from nnunetv2_ext.core.files import atomic_write_text, read_json
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
from nnunetv2_ext.data.fill_pool import content_hash
from nnunetv2_ext.data.find import PREPROCESSED, find_dataset
from nnunetv2_ext.data.folders import cases_of_images
from nnunetv2_ext.data.pool import Pool, open_pool
from nnunetv2_ext.data.raw import RawDataset, declared_values, open_raw, require_free_id
from nnunetv2_ext.data.split import SPLIT, Split, labelled_splits, read_split
from nnunetv2_ext.data.subjects import BLOCK
from nnunetv2_ext.parts.prediction import FoldPredictor, require_one_stage
from nnunetv2_ext.pseudo_label.labeller import PROVENANCE, Labeller, open_labeller, require_untaught
from nnunetv2_ext.pseudo_label.labelling import Labelled, label_pool
from nnunetv2_ext.pseudo_label.panel import draw_panel
from nnunetv2_ext.pseudo_label.verdict import FLOOR, Ranked, ranked

TABLE, PANEL = "pseudo_labels.csv", "pseudo_labels.png"  # in the new dataset's folder


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        dataset: id or name of the labelled dataset.
        model: folder of the model that labels.
        target_id: of the new dataset.
        folds: that label; None: all that are finished.
        checkpoint: file name.
        round: 1, or one more than that of the dataset on which the model was trained.
        confidence: probability below which a voxel is ignored, 0..1.
        keep: share of the pool's cases that is kept at most, 0..1.
    """

    dataset: int | str
    model: Path
    target_id: int
    folds: Sequence[str] | None = None
    checkpoint: str = "checkpoint_final.pth"
    round: int = 1
    confidence: float = 0.7
    keep: float = 0.8

    def __post_init__(self) -> None:
        for option, value in (("--confidence", self.confidence), ("--keep", self.keep)):
            if not 0 < value <= 1:
                raise ValueError(f"{option} lies above 0 and is at most 1, got {value:g}")
        if self.round < 1:
            raise ValueError(f"--round is 1 or more, got {self.round}")

    @property
    def suffix(self) -> str:
        """Of the new dataset's name."""
        return "_pseudo" + (str(self.round) if self.round > 1 else "")


def pseudo_label(request: Request, device: str = "cpu", say: Callable[[str], None] = print) -> Path:
    """Label the pool of a dataset by a model, and write a dataset with the best cases beside the labelled ones.

    Voxels in doubt are under the ignore label. The split has the pool's cases in every fold's training part, except
    where their subject validates. Plans and fingerprint are those of the labelled dataset.

    Args:
        request: what to do.
        device: of torch.
        say: gets lines for people.

    Returns:
        The new dataset's folder in nnUNet_raw.

    Raises:
        ValueError: no pool, one of other plans, or images that are gone or have changed; a model that may not label
            (`labeller.require_untaught`); no case that is good enough; a target that exists or cannot be written.
            Labels that were made by then stay for the next try.
    """
    require_free_id(request.target_id)
    source = open_raw(request.dataset)
    base = find_dataset(source.name, PREPROCESSED)
    labeller = open_labeller(request.model, request.folds, request.checkpoint)
    plans, name = labeller.plans, labeller.model.configuration
    configuration = plans.get_configuration(name)
    require_one_stage(configuration, labeller.model.folder)
    pool = open_pool(base, plans, configuration, name)
    require_untaught(labeller, source.name, source.json["labels"], pool.cases, request.round)
    _require_unlabelled(pool, source)
    _require_images(pool, name)

    folds: list[int | str] = [int(fold) if fold.isdecimal() else fold for fold in labeller.folds]
    predictor = FoldPredictor(labeller.model.folder, folds, request.checkpoint, device)
    labelled = label_pool(pool, predictor, labeller.hashes, request.confidence)
    order = ranked({case: own.agreement for case, own in labelled.items()}, request.keep)
    kept = [one.case for one in order if not one.why]
    if not kept:
        best = order[0].agreement
        what = "found nothing in any case" if math.isnan(best) else f"agree on no case (the best has {best:.2f})"
        raise ValueError(
            f"{labeller.title}: {what}, and such labels would teach errors. Train the model longer, or label some of "
            "these cases by hand"
        )
    both = replace(source, files={**source.files, **{c: {"images": list(pool.cases[c].files)} for c in kept}})
    ignore = source.ignore if source.ignore is not None else max(declared_values(source.json["labels"])) + 1
    with new_dataset(source, request.target_id, request.suffix) as folder:
        for case in source.cases:
            link_images(source, case, folder / "imagesTr")
            link_label(source, case, folder / "labelsTr")
        for case in progress_bar(kept, "dataset"):
            link_images(both, case, folder / "imagesTr")
            _write_label(case, labelled[case], ignore, pool, source, folder)
        for sub in ("imagesTs", "labelsTs"):
            link_folder(source.folder / sub, folder / sub)
        block = _provenance(request, source, labeller, pool, labelled, order)
        changes = {"labels": {**source.json["labels"], "ignore": ignore}, BLOCK: block}
        write_json(both, request.target_id, folder, [*source.cases, *kept], changes, request.suffix)
        atomic_write_text(folder / TABLE, _table(order, labelled))
        title = f"{source.name}, round {request.round}: {len(kept)} of {len(order)} cases kept, by {labeller.title}"
        draw_panel(order, labelled, pool, source, title, folder / PANEL)
    written = final_folder(source, request.target_id, request.suffix)
    _write_plans(base, written, plans.plans_name, source.cases, kept, pool.subjects)
    for line in _told(request, labeller, order, labelled, written):
        say(line)
    return written


def _require_unlabelled(pool: Pool, source: RawDataset) -> None:
    """ValueError if a case was labelled, or became a test case, after the pool was filled."""
    tests = source.folder / "imagesTs"
    known = {*source.files, *(cases_of_images(tests, source.ending) if tests.is_dir() else ())}
    if both := sorted(known & set(pool.cases)):
        raise ValueError(
            f"{len(both)} cases of the pool, such as {both[0]}, are labelled or test cases of {source.name} by now: "
            f"remove {pool.folder}, and run nnUNetv2_ext unlabelled on the others"
        )


def _require_images(pool: Pool, configuration: str) -> None:
    """ValueError if an image is gone, or is not the one that was preprocessed."""
    command = f"nnUNetv2_ext unlabelled ... -c {configuration} -i FOLDER"
    for case, own in progress_bar(sorted(pool.cases.items()), "hashing"):
        for file, digest in zip(own.files, own.sha256, strict=True):
            if not Path(file).is_file():
                raise ValueError(
                    f"case {case}: the image {file} is gone: put it back, or fill the pool anew ({command})"
                )
            if content_hash(Path(file)) != digest:
                raise ValueError(f"case {case}: {file} has changed since the pool was filled: run {command} again")


def _write_label(case: str, own: Labelled, ignore: int, pool: Pool, source: RawDataset, folder: Path) -> None:
    label, doubtful = own.read()
    properties = load_pickle(str(pool.data_folder / f"{case}.pkl"))
    file = folder / "labelsTr" / f"{case}{source.ending}"
    try:
        source.reader.write_seg(np.where(doubtful, ignore, label), str(file), properties)
    except RuntimeError as error:  # SimpleITK's word for a full disk
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{file.parent} cannot be written ({reason}): look at the free space there. Labels that were "
                         "made stay for the next try") from error  # fmt: skip


def _provenance(
    request: Request,
    source: RawDataset,
    labeller: Labeller,
    pool: Pool,
    labelled: Mapping[str, Labelled],
    order: Sequence[Ranked],
) -> dict[str, Any]:
    """Our block of dataset.json."""
    kept = [one for one in order if not one.why]
    voxels = sum(labelled[one.case].doubtful for one in kept)
    told = (
        f"{len(kept)} of {len(source.cases) + len(kept)} cases have labels by a model ({labeller.title}, round "
        f"{request.round}); {voxels} of their voxels are under ignore",
        _leak(labeller),
    )
    block: dict[str, Any] = {**(source.json.get(BLOCK) or {}), "notices": [*notices(source.json), *told]}
    if pool.subjects is not None:
        block["subjects"] = pool.subjects
    block[PROVENANCE] = {
        "version": __version__,
        "dataset": source.name,
        "round": request.round,
        "model": f"{labeller.model.dataset}/{labeller.model.folder.name}",
        "folds": labeller.folds,
        "checkpoints": labeller.hashes,
        "confidence": request.confidence,
        "keep": request.keep,
        "floor": FLOOR,
        "cases": {one.case: _figures(labelled[one.case]) for one in kept},
        "dropped": {one.case: {**_figures(labelled[one.case]), "why": one.why} for one in order if one.why},
    }
    return block


def _leak(labeller: Labeller) -> str:
    """What the validation of the new dataset is worth."""
    if labeller.folds == ["all"]:
        return "every labelled case has taught the model that labelled the others: judge on test cases only"
    if len(labeller.folds) == 1:
        [fold] = labeller.folds
        return f"fold {fold} labelled: train fold {fold} only, as the other folds' validation cases have taught it"
    return (
        f"the folds {', '.join(labeller.folds)} labelled, and each has learnt from the others' validation labels: "
        "validations are too good; judge on test cases, or label with -f N and train fold N only"
    )


def _figures(own: Labelled) -> dict[str, Any]:
    agreement = None if math.isnan(own.agreement) else round(own.agreement, 4)
    return {"agreement": agreement, "foreground_voxels": own.foreground, "doubtful_voxels": own.doubtful}


def _table(order: Sequence[Ranked], labelled: Mapping[str, Labelled]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "case", "kept", "why_dropped", "agreement", "foreground_voxels", "doubtful_voxels"])
    for rank, one in enumerate(order, 1):
        figures = ["" if value is None else value for value in _figures(labelled[one.case]).values()]
        writer.writerow([rank, one.case, "no" if one.why else "yes", one.why, *figures])
    return text.getvalue()


def _write_plans(
    base: Path,
    written: Path,
    plans_name: str,
    labelled: Sequence[str],
    kept: Sequence[str],
    subjects: Mapping[str, str] | None,
) -> None:
    """Plans, fingerprint and folds of the labelled dataset, as the new one's, with what else nnU-Net's planning leaves.

    A fingerprint of the new dataset would count voxels under ignore as foreground, and shift the intensities of CT.
    """
    folder = base.with_name(written.name)
    folder.mkdir(exist_ok=True)
    atomic_write_text(folder / "dataset.json", (written / "dataset.json").read_text(encoding="utf-8"))
    known = subjects or {}
    if (base / SPLIT).is_file():
        folds: list[Split] = []
        for fold in read_split(base / SPLIT):
            scored = {known.get(case, case) for case in fold["val"]}
            added = [case for case in kept if known.get(case, case) not in scored]
            folds.append({"train": sorted([*fold["train"], *added]), "val": fold["val"]})
    else:
        folds = labelled_splits(labelled, kept, subjects)
    atomic_write_text(folder / SPLIT, json.dumps(folds, indent=4) + "\n")
    for file in (f"{plans_name}.json", "dataset_fingerprint.json"):
        if (base / file).is_file():
            content = read_json(base / file)
            content |= {"dataset_name": written.name} if "dataset_name" in content else {}
            atomic_write_text(folder / file, json.dumps(content, indent=4) + "\n")


def _told(
    request: Request,
    labeller: Labeller,
    order: Sequence[Ranked],
    labelled: Mapping[str, Labelled],
    written: Path,
) -> list[str]:
    kept = [one for one in order if not one.why]
    reasons = {why: sum(one.why == why for one in order) for why in sorted({one.why for one in order} - {""})}
    dropped = ", ".join(f"{number} {why}" for why, number in reasons.items()) or "none"
    foreground, doubtful = (sum(getattr(labelled[one.case], of) for one in kept) for of in ("foreground", "doubtful"))
    identity, configuration = written.name[7:10], labeller.model.configuration
    plans = labeller.plans.plans_name
    fold = labeller.folds[0] if len(labeller.folds) == 1 else "0"
    return [
        f"kept {len(kept)} of {len(order)} cases of the pool, agreement {kept[-1].agreement:.2f} to "
        f"{kept[0].agreement:.2f}; dropped: {dropped}",
        f"{doubtful} voxels of them are in doubt and ignored, beside {foreground} of structures",
        f"NOTE: {_leak(labeller)}",
        f"wrote {written}, with {TABLE} and {PANEL}, which shows patients. Next:",
        f"  nnUNetv2_preprocess -d {identity} -plans_name {plans} -c {configuration}",
        f"  nnUNetv2_train {identity} {configuration} {fold} -p {plans}",
    ]
