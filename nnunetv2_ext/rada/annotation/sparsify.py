"""A dense dataset made sparse: what annotators would have drawn, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext import __version__
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.derive import (
    DENSE,
    final_folder,
    link_folder,
    link_images,
    link_label,
    new_dataset,
    write_json,
    write_label,
)
from nnunetv2_ext.data.raw import RawDataset, measure, open_raw, require_free_id, target_grids
from nnunetv2_ext.data.split import write_split_for
from nnunetv2_ext.data.subjects import BLOCK, divided, pairs_suggested
from nnunetv2_ext.rada.annotation.choose import choose_planes, draw_cases
from nnunetv2_ext.rada.annotation.planes import Array, Planes, on_planes
from nnunetv2_ext.rada.annotation.thickened import PlaneReport, thicken_case
from nnunetv2_ext.rada.requirements import require_plain_labels


@dataclass(frozen=True)
class SparsifyOptions:
    """What the simulated annotators did.

    Args:
        labelled: Number of labelled training cases, or their share of the training cases if a float.
        axes: Array axis (nnU-Net's reading order; 0 = z for NIfTI) of each annotated plane of a labelled case.
        rule: ``largest`` or ``middle``, see `choose_planes`.
        seed: Of the draws of labelled and test cases.
        test_share: Share of all cases set aside with dense labels as imagesTs and labelsTs.
        subjects: Case to subject: subjects are drawn, set aside and split as a whole.
        allow_split_subjects: Draw cases instead of subjects, whatever is known or suggested by their names.
        plans: Plans of the source dataset whose target spacing decides the thickness, if they exist.
        configuration: 3-D configuration of those plans.
    """

    labelled: int | float
    axes: tuple[int, ...] = (0, 1, 2)
    rule: str = "largest"
    seed: int = 0
    test_share: float = 0.0
    subjects: Mapping[str, str] | None = None
    plans: str | None = None
    configuration: str = "3d_fullres"
    allow_split_subjects: bool = False


def sparsify(source: int | str, target_id: int, options: SparsifyOptions, say: Callable[[str], None] = print) -> Path:
    """Write the sparse copy of a dense dataset; its folder is returned.

    Images are linked. labelsTr holds the planes, thickened so that they survive preprocessing, and the ignore label
    elsewhere; labelsTr_dense the source's labels, for evaluation only. dataset.json records all under ``nnunetv2_ext``,
    and the split goes to nnUNet_preprocessed, where plain nnU-Net reads it too.

    Raises:
        ValueError: the id is taken, the dataset is 2-D, sparse already or has regions, or the options do not fit it.
    """
    dataset = open_raw(source)
    require_free_id(target_id)
    _require_dense(dataset)
    if not options.axes or not set(options.axes) <= {0, 1, 2}:
        raise ValueError(f"planes lie on the array axes 0, 1 and 2, got {list(options.axes)}")
    measure(dataset, dataset.cases[0])  # 2-D data is refused before anything long starts
    test, labelled = _draw(dataset, options)
    train = [case for case in dataset.cases if case not in test]
    grids, target = target_grids(dataset, train, options.plans, options.configuration)
    ignore = max(dataset.label_values()) + 1
    report = PlaneReport()
    with new_dataset(dataset, target_id) as folder, progress_bar(dataset.cases, "writing cases") as bar:
        for case in dataset.cases:
            part = "Ts" if case in test else "Tr"
            link_images(dataset, case, folder / f"images{part}")
            link_label(dataset, case, folder / "labelsTs" if case in test else folder / DENSE)
            if case in labelled:
                label, properties = dataset.read_label(case)
                sparse, planes = _keep_planes(label, grids[case].box, ignore, options)
                sparse = thicken_case(case, sparse, ignore, planes, grids[case], target.spacing, report)
                write_label(dataset, case, sparse, properties, folder / "labelsTr")
            elif case not in test:
                hidden, properties = dataset.reader.read_seg(str(dataset.files[case]["label"]))
                nothing = np.full(hidden.shape[1:], ignore, dtype=np.int16)
                write_label(dataset, case, nothing, properties, folder / "labelsTr")
            bar.update()
        for name in ("imagesTs", "labelsTs") if (dataset.folder / "labelsTs").is_dir() else ():
            link_folder(dataset.folder / name, folder / name)
        block: dict[str, Any] = {
            "source": dataset.name,
            "version": __version__,
            "rule": options.rule,
            "axes": list(options.axes),
            "seed": options.seed,
            "test": sorted(test),
            "subjects": dict(options.subjects) if options.subjects else None,
            **target.provenance(),
            "labelled": report.provenance(),
            "classes_on_no_plane": report.missing(dataset.json["labels"]),
        }
        labels = {**dataset.json["labels"], "ignore": ignore}
        write_json(dataset, target_id, folder, train, {"labels": labels, BLOCK: {"sparsify": block}})
    final = final_folder(dataset, target_id)
    say(f"{final}: {len(labelled)} labelled and {len(train) - len(labelled)} unlabelled cases, {len(test)} for testing")
    report.tell(dataset.json["labels"], target, say)
    write_split_for(final.name, labelled, set(train) - labelled, options.subjects, say)
    return final


def _require_dense(dataset: RawDataset) -> None:
    if dataset.ignore is not None:
        raise ValueError(f"{dataset.name} has an ignore label, so it is sparse already: use --thicken-only")
    require_plain_labels(dataset.json["labels"], dataset.name)


def _draw(dataset: RawDataset, options: SparsifyOptions) -> tuple[set[str], set[str]]:
    """Test cases and labelled training cases."""
    cases = dataset.cases
    if not 0 <= options.test_share < 1:
        raise ValueError(f"--test-share is a share of the cases, 0 to below 1, got {options.test_share}")
    number = round(options.test_share * len(cases))
    subjects = None if options.allow_split_subjects else options.subjects
    test = set(draw_cases(cases, number, options.seed, subjects, why="for the test set")) if number else set()
    rest = [case for case in cases if case not in test]
    suggested = None if options.subjects or options.allow_split_subjects else pairs_suggested(cases)
    if suggested and divided(test, rest, suggested.subjects):
        raise ValueError(
            f"{suggested}. The test set would divide them: give it as --group-regex, or add --allow-split-subjects"
        )
    wanted = options.labelled
    if isinstance(wanted, float):
        if not 0 < wanted <= 1:
            raise ValueError(f"--labelled is a number of cases or a share above 0 and up to 1, got {wanted}")
        wanted = max(1, math.ceil(wanted * len(rest) - 1e-9))
    if not 1 <= wanted <= len(rest):
        raise ValueError(f"--labelled {wanted}: choose 1 to {len(rest)}, the number of training cases")

    def has_foreground(case: str) -> bool:  # nobody draws planes through an organ that is not there
        return bool((dataset.read_label(case)[0] > 0).any())

    seed = options.seed + 1  # another permutation than the test set's
    return test, set(draw_cases(rest, wanted, seed, subjects, has_foreground, "as labelled cases"))


def _keep_planes(label: Array, box: tuple[slice, ...], ignore: int, options: SparsifyOptions) -> tuple[Array, Planes]:
    """A dense label with all but its chosen planes set to ignore, and the planes, counted from the box's corner.

    The planes are drawn across the whole image and chosen inside nnU-Net's non-zero crop, which drops the rest.
    """
    if not (label[box] > 0).any():
        raise ValueError("the foreground lies where the image is zero, which nnU-Net crops away: correct the image")
    planes = choose_planes(label[box], options.axes, options.rule)
    keep = on_planes(label.shape, planes.shifted([s.start for s in box]))
    return np.where(keep, label, ignore).astype(label.dtype), planes
