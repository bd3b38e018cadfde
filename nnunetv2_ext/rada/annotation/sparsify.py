"""A sparse dataset whose planes survive preprocessing: chosen in a dense dataset, or found in a sparse one."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_ext import __version__
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.case import by
from nnunetv2_ext.data.derive import DENSE, final_folder, link_folder, link_images, link_label, new_dataset, write_json
from nnunetv2_ext.data.raw import RawDataset, Target, measure, open_raw, require_free_id, target_grids
from nnunetv2_ext.data.split import write_split_for
from nnunetv2_ext.data.subjects import BLOCK, divided, pairs_suggested, recorded_subjects
from nnunetv2_ext.rada.annotation.choose import choose_planes, draw_cases
from nnunetv2_ext.rada.annotation.planes import Array, Planes, find_planes, on_planes
from nnunetv2_ext.rada.annotation.slabs import Slab, thicken
from nnunetv2_ext.rada.requirements import require_ignore_label, require_plain_labels

Say = Callable[[str], None]
# a case and its non-zero crop to its sparse label, the file's properties, and the planes from the crop's corner
Choose = Callable[[str, tuple[slice, ...]], tuple[Array, dict[str, Any], Planes]]


@dataclass(frozen=True)
class SparsifyOptions:
    """What the simulated annotators did."""

    labelled: int | float  # number of labelled training cases, or their share of the training cases if a float
    axes: tuple[int, ...] = (0, 1, 2)  # array axis (0 = z for NIfTI) of each annotated plane of a labelled case
    rule: str = "largest"  # or middle, see `choose_planes`
    seed: int = 0  # of the draws of labelled and test cases
    test_share: float = 0.0  # of all cases, set aside with dense labels as imagesTs and labelsTs
    subjects: Mapping[str, str] | None = None  # by case; subjects are drawn, set aside and split as a whole
    plans: str | None = None  # of the source dataset, whose target spacing decides the thickness, if they exist
    configuration: str = "3d_fullres"  # 3-D, of those plans
    allow_split_subjects: bool = False  # draw cases instead, whatever is known or suggested by their names


def sparsify(source: int | str, target_id: int, options: SparsifyOptions, say: Say = print) -> Path:
    """Write the sparse copy of a dense dataset; its folder is returned.

    Images are linked. labelsTr holds the planes, thickened so that they survive preprocessing, and the ignore label
    elsewhere; labelsTr_dense the source's labels, for evaluation only. dataset.json records all under ``nnunetv2_ext``,
    and the split goes to nnUNet_preprocessed, where plain nnU-Net reads it too.

    Raises:
        ValueError: the id is taken, the dataset is 2-D, sparse already or has regions, or the options do not fit it.
    """
    dataset = open_raw(source)
    require_free_id(target_id)
    if dataset.ignore is not None:
        raise ValueError(f"{dataset.name} has an ignore label, so it is sparse already: use --thicken-only")
    require_plain_labels(dataset.json["labels"], dataset.name)
    if not options.axes or not set(options.axes) <= {0, 1, 2}:
        raise ValueError(f"planes lie on the array axes 0, 1 and 2, got {list(options.axes)}")
    measure(dataset, dataset.cases[0])  # 2-D data is refused before anything long starts
    test, labelled = _draw(dataset, options)
    ignore = max(dataset.label_values()) + 1

    def choose(case: str, box: tuple[slice, ...]) -> tuple[Array, dict[str, Any], Planes]:
        label, properties = dataset.read_label(case)
        if case not in labelled:
            return np.full_like(label, ignore), properties, Planes()
        sparse, planes = _keep_planes(label, box, ignore, options)
        return sparse, properties, planes

    block = {"source": dataset.name, "rule": options.rule, "axes": list(options.axes), "seed": options.seed}
    block |= {"test": sorted(test), "subjects": dict(options.subjects) if options.subjects else None}
    plans = options.plans, options.configuration
    return _derive(dataset, target_id, ignore, choose, plans, block, options.subjects, say, test=test)


def thicken_dataset(
    source: int | str,
    target_id: int,
    plans: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    subjects: Mapping[str, str] | None = None,
    say: Say = print,
) -> Path:
    """Write a copy of a sparse dataset whose annotated planes survive nnU-Net's resampling; its folder is returned.

    Labels without a plane are linked unchanged. The thickness follows the plans of `source` if it has been planned,
    else nnU-Net's rule for 3d_fullres. The split keeps `subjects` whole (case to subject; None: those that dataset.json
    records).

    Raises:
        ValueError: the id is taken, the dataset is 2-D, has no ignore label or no annotated plane at all.
    """
    dataset = open_raw(source)
    require_free_id(target_id)
    ignore = require_ignore_label(dataset.ignore, dataset.name)
    loose: list[str] = []

    def choose(case: str, box: tuple[slice, ...]) -> tuple[Array, dict[str, Any], Planes]:
        label, properties = dataset.read_label(case)
        planes = find_planes(label[box], ignore)
        if not planes and (label != ignore).any():
            loose.append(case)
        return label, properties, planes

    block = {**((dataset.json.get(BLOCK) or {}).get("sparsify") or {}), "thickened_from": dataset.name}
    if subjects is None:
        subjects = recorded_subjects(dataset.json)
    else:
        block["subjects"] = dict(subjects)
    return _derive(dataset, target_id, ignore, choose, (plans, configuration), block, subjects, say, loose=loose)


def _derive(
    dataset: RawDataset,
    target_id: int,
    ignore: int,
    choose: Choose,
    plans: tuple[str | None, str],
    block: Mapping[str, Any],
    subjects: Mapping[str, str] | None,
    say: Say,
    test: Collection[str] = (),
    loose: Collection[str] = (),
) -> Path:
    """Write the dataset whose training labels hold the chosen planes, thick enough to survive preprocessing.

    Labels without a plane are linked if the source is sparse, written if it is dense. `plans` (name, configuration)
    decide the thickness, `test` becomes imagesTs and labelsTs of a dense dataset, and `loose` (cases with annotations
    on no plane) is complete once every case was chosen from.
    """
    is_dense = dataset.ignore is None
    train = [case for case in dataset.cases if case not in test]
    grids, target = target_grids(dataset, train, *plans)
    planes: dict[str, Planes] = {}
    slabs: dict[str, list[Slab]] = {}
    classes: set[int] = set()
    with new_dataset(dataset, target_id) as folder, progress_bar(dataset.cases, "writing cases") as bar:
        for case in test:
            link_images(dataset, case, folder / "imagesTs")
            link_label(dataset, case, folder / "labelsTs")
            bar.update()
        for case in train:
            link_images(dataset, case, folder / "imagesTr")
            if is_dense:
                link_label(dataset, case, folder / DENSE)
            box = grids[case].box
            label, properties, chosen = choose(case, box)
            if chosen:
                offset, label = [s.start for s in box], label.copy()
                label[box], found = thicken(label[box], ignore, chosen, grids[case].resampled(target.spacing))
                planes[case] = chosen.shifted(offset)
                slabs[case] = [Slab(s.axis, *(i + offset[s.axis] for i in s[1:])) for s in found]
                classes |= set(np.unique(label).tolist())
            if chosen or is_dense:
                dataset.reader.write_seg(label, str(folder / "labelsTr" / f"{case}{dataset.ending}"), properties)
            else:
                link_label(dataset, case, folder / "labelsTr")
            bar.update()
        if not planes:
            raise ValueError(
                f"no case of {dataset.name} has an annotated plane (a slice with at least 95 % of its voxels labelled, "
                "background included): label whole slices"
            )
        if not is_dense:
            link_folder(dataset.folder / DENSE, folder / DENSE)
        if not is_dense or (dataset.folder / "labelsTs").is_dir():
            for name in ("imagesTs", "labelsTs"):
                link_folder(dataset.folder / name, folder / name)
        labels = {**dataset.json["labels"], "ignore": ignore}
        missing = [name for name, value in labels.items() if name != "ignore" and int(value) not in classes]
        # slabs: the slices a plane was thickened to, as (axis, first, last)
        labelled = {
            case: {"planes": planes[case].indices, "slabs": [[s.axis, s.start, s.stop - 1] for s in slabs[case]]}
            for case in sorted(planes)
        }
        block = {**block, "version": __version__, "target_spacing": list(target.spacing), "labelled": labelled}
        block["target_spacing_from"] = target.source
        block["classes_on_no_plane"] = missing
        recorded = {**(dataset.json.get(BLOCK) or {}), "sparsify": block}
        write_json(dataset, target_id, folder, train, {"labels": labels, BLOCK: recorded})
    final = final_folder(dataset, target_id)
    of_all = f"{len(planes)} cases with planes of {len(train)}"
    if is_dense:
        of_all = f"{len(planes)} labelled and {len(train) - len(planes)} unlabelled cases, {len(test)} for testing"
    say(f"{final}: {of_all}")
    for case in loose:
        say(f"{case}  annotations on no plane (scribbles) are left as they are; resampling may thin them out")
    _tell(planes, slabs, target, missing, say)
    known = {*planes, *loose}
    write_split_for(final.name, known, set(train) - known, subjects, say)
    return final


def _tell(
    planes: Mapping[str, Planes], slabs: Mapping[str, Sequence[Slab]], target: Target, missing: Sequence[str], say: Say
) -> None:
    """Say what was thickened, and which classes nobody drew."""
    for case in sorted(planes):
        grown = [s for s in slabs[case] if s.stop - s.start > s.last + 1 - s.first]
        thick = ", ".join(f"axis{s.axis} {s.first}->{s.start}..{s.stop - 1}" for s in grown)
        say(f"{case}  {planes[case].describe()}" + (f"  thickened: {thick}" if thick else ""))
    say(f"target spacing {by(target.spacing)} mm (z, y, x of the file), from {target.source}")
    for name in missing:
        say(f"WARNING: no plane shows {name}: it stays declared, but nothing teaches it; label more cases or planes")


def _draw(dataset: RawDataset, options: SparsifyOptions) -> tuple[set[str], set[str]]:
    """Test cases and labelled training cases."""
    cases = dataset.cases
    if not 0 <= options.test_share < 1:
        raise ValueError(f"--test-share is a share of the cases, 0 to below 1, got {options.test_share}")
    number = round(options.test_share * len(cases))
    if options.test_share and not number:
        raise ValueError(f"--test-share {options.test_share:g} of {len(cases)} cases is none: ask for more, or for 0")
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
