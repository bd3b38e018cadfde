"""The pieces of quickstart.py: running commands, linking a dataset, reducing plans, Dice table and picture."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from nnunetv2_ext.core.overlay import add_legend, draw_slice, fullest_slice, take_slice

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

LOG_NAME = "quickstart.log"
SMALL_FEATURES = (16, 32, 64, 128)
SMALL_PATCH_VOXELS = {2: 128 * 128, 3: 32 * 40 * 32}


class QuickstartError(Exception):
    """A step failed; the text says which and what to do."""


class Steps:
    """Runs commands one after the other: says what, writes all output to the log, keeps one live line on a terminal."""

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self.environment = environment
        self.number = 0

    def announce(self, title: str) -> None:
        self.number += 1
        print(f"\n[{self.number}] {title}", flush=True)

    def run(self, title: str, command: list[str], **settings: str) -> None:
        """Run `command` (name of an installed command and its arguments) with extra environment variables."""
        self.announce(title)
        shown = " ".join([*(f"{key}={shlex.quote(value)}" for key, value in settings.items()), shlex.join(command)])
        print(f"    {shown}", flush=True)
        start, tail = time.monotonic(), deque[str](maxlen=20)
        environment = {**self.environment, **settings}
        arguments = [find_command(command[0]), *command[1:]]
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                arguments,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            ) as process,
        ):
            log.write(f"\n$ {shown}\n")
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    if line.strip():
                        tail.append(line.rstrip())
                        live_line(f"{time.monotonic() - start:4.0f} s  {line.strip()}")
            except BaseException:  # Ctrl-C reaches us first: do not leave a training behind
                process.terminate()
                raise
        live_line("")
        if process.returncode != 0:
            last = "\n".join(f"    | {line}" for line in tail)
            raise QuickstartError(
                f"{command[0]} ended with exit status {process.returncode}. Its last lines:\n{last}\n"
                f"Everything it wrote: {self.log}"
            )
        print(f"    done in {time.monotonic() - start:.0f} s", flush=True)


def live_line(text: str) -> None:
    """Replace the terminal's current line; nothing when the output goes to a file."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 6
        print(f"\r\x1b[K    {text[:width]}" if text else "\r\x1b[K", end="", flush=True)


def find_command(name: str) -> str:
    """Full path of an installed command, also when the virtual environment is not activated."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise QuickstartError(f"the command {name} is not installed for {sys.executable}: type  pip install .")
    return found


def choose_device(name: str) -> str:
    """Resolve `auto` to cuda, else cpu, and refuse a device that this machine does not have."""
    import torch

    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if present["cuda"] else "cpu"  # mps on request: some 3-D operations are missing on older systems
    if not present[name]:
        raise QuickstartError(f"--device {name}: PyTorch finds no such device here, try --device auto")
    return name


def prepare_output(folder: Path, overwrite: bool, dataset: Path | None) -> None:
    """Make an empty output folder; remove an old one only on request, and only if an earlier quickstart made it."""
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise QuickstartError(
                f"{folder} exists: choose another folder with --output or replace it with --overwrite"
            )
        if not (folder / LOG_NAME).is_file():
            raise QuickstartError(f"{folder} was not made by this script and is not removed: choose another --output")
        if dataset is not None and dataset.resolve().is_relative_to(folder.resolve()):
            raise QuickstartError(
                f"--dataset lies in {folder}, which --overwrite would remove: choose another --output"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG_NAME).touch()


def adopt_dataset(source: Path, raw: Path) -> Path:
    """Link a user's raw dataset into `raw` with unseen cases set apart; `source` is only read.

    Unseen are the cases with both an image in imagesTs and a label in labelsTs; if there are none, the last fifth of
    the training cases (at least one) is held out.

    Raises:
        QuickstartError: `source` is not a raw dataset, or has fewer than two labelled cases.
    """
    if not re.fullmatch(r"Dataset\d{3}_.+", source.name) or not (source / "dataset.json").is_file():
        raise QuickstartError(
            f"--dataset {source} is no nnU-Net raw dataset: expected DatasetXXX_Name with a dataset.json"
        )
    description = read_description(source)
    ending = description["file_ending"]
    training, unseen = (labelled_cases(source, split, description) for split in ("Tr", "Ts"))
    if not unseen:
        if len(training) < 2:
            raise QuickstartError(f"--dataset {source} has {len(training)} labelled case(s): at least 2 are needed")
        for case in sorted(training)[-max(1, len(training) // 5) :]:
            unseen[case] = training.pop(case)
        print(f"    no labelled test cases: the last {len(unseen)} training case(s) are held out as unseen")

    folder = raw / source.name
    for split, cases in (("Tr", training), ("Ts", unseen)):
        for case, files in cases.items():
            *images, label = files
            for channel, image in enumerate(images):
                link(image, folder / f"images{split}" / f"{case}_{channel:04d}{ending}")
            link(label, folder / f"labels{split}" / f"{case}{ending}")
            for kind, file in (("images", images[0]), ("labels", label)):
                sidecar = file.with_name(f"{case}.json")  # spacing of TIFF files
                if sidecar.is_file():
                    link(sidecar, folder / f"{kind}{split}" / sidecar.name)
    description.pop("dataset", None)  # an explicit file list: the links follow the standard layout
    description["numTraining"] = len(training)
    (folder / "dataset.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
    return folder


def labelled_cases(dataset: Path, split: str, description: dict[str, Any]) -> dict[str, list[Path]]:
    """Case -> its images in the order of the channels, then its label; cases without one of both are left out."""
    if split == "Tr" and "dataset" in description:  # an explicit list, relative to the dataset's folder
        listed = description["dataset"].items()
        return {c: [dataset / os.path.expandvars(f) for f in (*files["images"], files["label"])] for c, files in listed}
    ending, cases = description["file_ending"], {}
    images = sorted((dataset / f"images{split}").glob(f"*{ending}"))
    for label in sorted((dataset / f"labels{split}").glob(f"*{ending}")):
        case = label.name[: -len(ending)]
        pattern = re.compile(re.escape(case) + r"_\d{4}" + re.escape(ending))
        channels = [image for image in images if pattern.fullmatch(image.name)]
        if channels:
            cases[case] = [*channels, label]
    return cases


def link(source: Path, target: Path) -> None:
    """Symbolic link, or a copy where the system refuses links (Windows without developer mode)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copy2(source, target)


def reduce_plans(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """A copy of nnU-Net's plans: at most four stages of 16-128 features, one convolution each, small patch, batch of 2.

    Same preprocessed data (`data_identifier` is kept), other name, so that it is chosen with `-p`. See nnU-Net's
    documentation/explanation_plans_files.md on editing plans by hand.
    """
    plans = json.loads(json.dumps(plans))
    settings = plans["configurations"][configuration]
    network = settings["architecture"]["arch_kwargs"]
    stages = min(len(SMALL_FEATURES), network["n_stages"])
    network["n_stages"] = stages
    network["features_per_stage"] = list(SMALL_FEATURES[:stages])
    for key in ("kernel_sizes", "strides"):
        network[key] = network[key][:stages]
    for key in ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        if key in network:
            network[key] = [1] * (stages - 1 if key == "n_conv_per_stage_decoder" else stages)
    total_stride = [math.prod(axis) for axis in zip(*network["strides"])]
    patch = settings["patch_size"]
    scale = min(1.0, (SMALL_PATCH_VOXELS[len(patch)] / math.prod(patch)) ** (1 / len(patch)))
    settings["patch_size"] = [max(s, round(p * scale / s) * s) for p, s in zip(patch, total_stride)]
    settings["batch_size"] = 2
    return {**plans, "plans_name": f"{plans['plans_name']}_small", "configurations": {configuration: settings}}


def read_description(dataset: Path) -> dict[str, Any]:
    """The contents of a dataset's dataset.json."""
    return json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))


def reader_for(dataset: Path, file: Path) -> BaseReaderWriter:
    """The reader nnU-Net uses for `dataset`; its arrays are (channel, Z, Y, X)."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    return determine_reader_writer_from_dataset_json(read_description(dataset), str(file), verbose=False)()


def is_volume(dataset: Path) -> bool:
    """Whether the unseen images have three axes longer than 1; nnU-Net plans nothing but 2d for others."""
    first = next((dataset / "imagesTs").glob(f"*_0000{read_description(dataset)['file_ending']}"))
    image, _ = reader_for(dataset, first).read_images([str(first)])
    return min(image.shape[1:]) > 1


def class_names(description: dict[str, Any]) -> dict[int, str]:
    """Label value -> name of a dataset.json; with regions, the region that a value ends up with."""
    labels = description["labels"]
    order = description.get("regions_class_order")
    if order is None or not any(isinstance(value, list) for value in labels.values()):
        return {int(value): name for name, value in labels.items()}
    regions = [name for name, value in labels.items() if name != "ignore" and value not in (0, [0])]
    return {0: "background", **dict(zip(order, regions))}


def metric_names(description: dict[str, Any]) -> dict[str, str]:
    """Key in nnU-Net's summary.json -> name, for classes ("1") and for regions ("(1, 2)")."""
    return {str(tuple(v) if isinstance(v, list) else v): name for name, v in description["labels"].items()}


def draw_case(dataset: Path, result: dict[str, Any], output: Path) -> None:
    """One picture of a case of summary.json: rows are three orthogonal slices; columns are image, truth, prediction."""
    description = read_description(dataset)
    ending = description["file_ending"]
    case = Path(result["prediction_file"]).name[: -len(ending)]
    dice = np.nanmean([metrics["Dice"] for metrics in result["metrics"].values()])
    first_channel = dataset / "imagesTs" / f"{case}_0000{ending}"
    reader = reader_for(dataset, first_channel)
    image, properties = reader.read_images([str(first_channel)])
    truth, _ = reader.read_seg(result["reference_file"])
    predicted, _ = reader.read_seg(result["prediction_file"])
    image, truth, predicted = (array[0].transpose() for array in (image, truth, predicted))  # (X, Y, Z)
    spacing = properties["spacing"][::-1]
    classes = class_names(description)
    planes = [axis for axis in (2, 1, 0) if min(image.shape[a] for a in range(3) if a != axis) > 1]
    figure = Figure(figsize=(9, 0.9 + 3 * len(planes)), layout="constrained")
    grid = figure.subplots(len(planes), 3, squeeze=False)
    for row, axis in zip(grid, planes):
        index = fullest_slice(truth, axis)
        columns, rows = (a for a in range(3) if a != axis)
        cut = [take_slice(array, axis, index) for array in (image, truth, predicted)]
        for axes, label, name in zip(row, (None, cut[1], cut[2]), ("image", "truth", "prediction")):
            title = f"{name}, {'xyz'[axis]} = {index} of {image.shape[axis]}"
            draw_slice(axes, cut[0], label, classes, spacing=(spacing[rows], spacing[columns]), title=title)
    figure.suptitle(f"{case}: not seen in training, mean Dice {dice:.2f}", fontsize=12)
    add_legend(figure, classes)
    figure.savefig(output, dpi=110)


def report(summary: dict[str, Any], description: dict[str, Any]) -> float:
    """Print Dice per class and return the mean over classes."""
    names = metric_names(description)
    print(f"\nDice on {len(summary['metric_per_case'])} unseen case(s):")
    for key, metrics in summary["mean"].items():
        print(f"    {names.get(key, key):<24} {metrics['Dice']:.3f}")
    mean = float(summary["foreground_mean"]["Dice"])
    print(f"    {'mean':<24} {mean:.3f}", flush=True)
    return mean
