"""Intensity statistics of annotated foreground only: nnU-Net counts ignored voxels as foreground (`label > 0`).

Measured on a CT phantom: 0.5 and 99.5 percentiles of 70 and 148 HU become -1036 and 118 HU. Only CT normalisation uses
these figures; other schemes normalise each image by itself. See nnunetv2 2.8's DatasetFingerprintExtractor.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunetv2_ext.core.files import atomic_write_text, read_json
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.data.find import PREPROCESSED, nnunet_folder, plans_files_in, read_plans
from nnunetv2_ext.data.raw import RawDataset, open_raw

PROPERTIES = "foreground_intensity_properties_per_channel"
MARK = "nnunetv2_ext_fingerprint"  # top-level key in plans and fingerprint: plans["nnunetv2_ext"] holds settings only
_STAMP = "corrected_at"  # of the mark: seconds since 1970, as the times of files
_MAX_VOXELS = 10_000_000  # over all cases and per channel; nnU-Net takes up to 1e8, which needs gigabytes


def fix_fingerprint(dataset: int | str, say: Callable[[str], None] = print) -> bool:
    """Recompute the foreground intensities of a planned dataset from annotated voxels, in fingerprint and all plans.

    Returns:
        False if nothing had to be done because no channel is CT.

    Raises:
        ValueError: no ignore label, not planned yet, damaged plans or fingerprint, or no annotated foreground.
    """
    raw = open_raw(dataset)
    if raw.ignore is None:
        raise ValueError(f"{raw.name} has no ignore label: its fingerprint is right as nnU-Net made it")
    base = nnunet_folder(PREPROCESSED) / raw.name
    fingerprint_file = base / "dataset_fingerprint.json"
    plans_files = plans_files_in(base)
    if not (fingerprint_file.is_file() and plans_files):
        raise ValueError(
            f"{raw.name} has not been planned: run nnUNetv2_plan_and_preprocess -d {raw.name} --no_pp first"
        )
    # all is read before anything is measured or written
    plan = f"run nnUNetv2_plan_and_preprocess -d {raw.name} --clean --no_pp"
    contents = {file: read_plans(base, file.stem, plan) for file in plans_files}
    contents |= {fingerprint_file: _read(fingerprint_file)}
    if lacking := [file for file, content in contents.items() if not isinstance(content.get(PROPERTIES), dict)]:
        raise ValueError(f"{lacking[0]} has no {PROPERTIES}: {plan}")
    if not any(uses_ct(contents[file]) for file in plans_files):
        say(f"{raw.name} has no CT channel: each image is normalised by itself, and nothing has to be corrected")
        return False
    properties, mark = measure_intensities(raw)
    mark |= {_STAMP: _first_corrected(fingerprint_file, properties) or time.time()}
    for file in (fingerprint_file, *plans_files):
        content = _read(file)
        mark_of_file = mark | {_STAMP: _first_corrected(file, properties) or mark[_STAMP]}
        atomic_write_text(file, json.dumps(content | {PROPERTIES: properties, MARK: mark_of_file}, indent=4) + "\n")
        for channel, new in properties.items():
            old = content[PROPERTIES].get(channel, {})
            say(
                f"{file.name}  channel {channel}: percentiles 0.5 and 99.5 {_range(old)} -> {_range(new)}, "
                f"mean {old.get('mean', np.nan):.1f} -> {new['mean']:.1f}, "
                f"std {old.get('std', np.nan):.1f} -> {new['std']:.1f}"
            )
    folders = {
        base / c["data_identifier"]: plans
        for plans in map(_read, plans_files)
        for c in plans["configurations"].values()
        if "data_identifier" in c
    }
    for folder in sorted(folders):
        for line in stale_intensities(folders[folder], base, folder):
            say(line)
    return True


def measure_intensities(raw: RawDataset) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """nnU-Net's figures per channel from voxels with 0 < label != ignore, and what they were measured on.

    Each case contributes equally many voxels, drawn with nnU-Net's own function.

    Raises:
        ValueError: no case has annotated foreground, or files of a case are damaged or do not fit together.
    """
    assert raw.ignore is not None
    samples: list[list[np.ndarray]] = []
    per_case = max(1, _MAX_VOXELS // len(raw.cases))
    for case in progress_bar(raw.cases, "reading intensities"):
        label, _ = raw.read_label(case)
        if ((label > 0) & (label != raw.ignore)).any():
            images, label, _ = raw.read_case(case)
            label[label == raw.ignore] = 0
            images, cropped, _ = crop_to_nonzero(images, label[None])
            draw = DatasetFingerprintExtractor.collect_foreground_intensities
            samples.append([np.asarray(d) for d in draw(cropped, images, num_samples=per_case)[0]])
    if not any(len(s[0]) for s in samples):
        raise ValueError(f"no case of {raw.name} has annotated foreground: label some planes through the objects first")
    channels = [np.concatenate(parts) for parts in zip(*samples)]
    properties = {str(channel): _statistics(values) for channel, values in enumerate(channels)}
    return properties, {"foreground": "annotated voxels only", "cases": len(samples)}


def uses_ct(plans: Mapping[str, Any]) -> bool:
    """Whether a configuration normalises a channel with the fingerprint's intensities."""
    return any(
        "CTNormalization" in configuration.get("normalization_schemes", ())
        for configuration in plans["configurations"].values()
    )


def needs_fix(plans: Mapping[str, Any], dataset_folder: Path) -> bool:
    """Whether plans of a sparse dataset normalise CT by intensities that count ignored voxels as foreground.

    Planning again after the correction copies the fingerprint in `dataset_folder` (``nnUNet_preprocessed/<Dataset>``).
    """
    if not uses_ct(plans) or MARK in plans:
        return False
    file = dataset_folder / "dataset_fingerprint.json"
    fingerprint = _read(file) if file.is_file() else {}
    return MARK not in fingerprint or fingerprint[PROPERTIES] != plans[PROPERTIES]


def stale_intensities(plans: Mapping[str, Any], dataset_folder: Path, folder: Path) -> list[str]:
    """The warning for a dataset that `needs_fix`, or that was preprocessed to `folder` before it was corrected."""
    if needs_fix(plans, dataset_folder):
        return [
            "WARNING: these plans normalise CT by intensities of the whole image, because nnU-Net's fingerprint counts "
            f"the ignore label as foreground: run nnUNetv2_ext fix-fingerprint -d {dataset_folder.name} and preprocess "
            "again"
        ]
    if not uses_ct(plans):
        return []
    # plans that were made again from the corrected fingerprint have no mark of their own
    mark = plans.get(MARK) or _read(dataset_folder / "dataset_fingerprint.json").get(MARK, {})
    # nnU-Net writes these whenever it preprocesses a case; the .npy files are unpacked in trainings
    images = (f for f in folder.glob("*") if f.suffix in (".b2nd", ".npz") and not f.name.endswith("_seg.b2nd"))
    times = {file.name: file.stat().st_mtime for file in images}
    older = sorted(name for name, seconds in times.items() if seconds < mark.get(_STAMP, 0))
    if not older:
        return []
    return [
        f"WARNING: {len(older)} of {len(times)} images in {folder.name} (e.g. {older[0]}) were preprocessed before "
        "nnUNetv2_ext fix-fingerprint corrected the plans, so they are normalised by intensities of the whole image: "
        f"run nnUNetv2_preprocess -d {dataset_folder.name} again"
    ]


def _first_corrected(file: Path, properties: Mapping[str, Any]) -> float | None:
    """When `file` got these very figures, if it has them: a second correction makes no preprocessed data older."""
    content = _read(file)
    return content.get(MARK, {}).get(_STAMP) if content[PROPERTIES] == properties else None


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    of_all = {
        "mean": np.mean(values),
        "median": median,
        "std": np.std(values),
        "min": values.min(),
        "max": values.max(),
    }
    return {name: float(v) for name, v in (of_all | {"percentile_99_5": high, "percentile_00_5": low}).items()}


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file)
    return content if isinstance(content, dict) else {}  # splits_final.json is a list


def _range(properties: Mapping[str, float]) -> str:
    return f"{properties.get('percentile_00_5', np.nan):.1f} and {properties.get('percentile_99_5', np.nan):.1f}"
