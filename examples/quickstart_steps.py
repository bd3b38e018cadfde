"""The pieces of quickstart.py: running commands, reducing plans, Dice table and picture."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from quickstart_data import QuickstartError, read_description

from nnunetv2_ext.core.figures import add_legend, draw_slice, fullest_slice
from nnunetv2_ext.core.orientation import directions_of, view_across
from nnunetv2_ext.data.find import PREPROCESSED, find_dataset

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

LOG_NAME = "quickstart.log"
HEARTBEAT = 15.0  # seconds
SMALL_FEATURES = (16, 32, 64, 128)
SMALL_PATCH_VOXELS = {2: 128 * 128, 3: 32 * 40 * 32}


class Steps:
    """Runs commands one after the other: says what, writes all output to the log, and shows that they go on.

    A terminal has one live line; other output has a line every `HEARTBEAT` seconds.
    """

    def __init__(self, log: Path, environment: dict[str, str], total: int) -> None:
        self.log = log
        self.environment = environment
        self.number, self.total = 0, total

    def announce(self, title: str) -> None:
        self.number += 1
        print(f"\n[{self.number} of {self.total}] {title}", flush=True)

    def run(
        self, title: str, command: list[str], watch: Callable[[str], str | None] | None = None, **settings: str
    ) -> None:
        """Run `command` (name of an installed command and its arguments) with extra environment variables.

        `watch` sees each line of output and returns what is to be shown of it, or None.
        """
        self.announce(title)
        shown = " ".join([*(f"{key}={shlex.quote(value)}" for key, value in settings.items()), shlex.join(command)])
        print(f"    {shown}", flush=True)
        if watch is not None:
            print(f"    log: {self.log}", flush=True)
        start, tail = time.monotonic(), deque[str](maxlen=20)
        told = start
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
                    news = None if watch is None else watch(line)
                    if news is not None:
                        live_line("")
                        print(f"    {news}", flush=True)
                        told = time.monotonic()
                    if line.strip():
                        tail.append(line.rstrip())
                        now = time.monotonic()
                        text = f"{now - start:4.0f} s  {line.strip()}"
                        live_line(text)
                        if now - told > HEARTBEAT and not sys.stdout.isatty():
                            print(f"    {text[:100]}", flush=True)
                            told = now
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


class EpochLines:
    """Reads nnU-Net's training output and gives one line for each finished epoch.

    Args:
        epochs: of the whole training.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._epoch = 0
        self._dice: list[float] = []
        self._seconds: list[float] = []

    def __call__(self, line: str) -> str | None:
        if match := re.search(r": Epoch (\d+)\s*$", line):
            self._epoch = int(match[1])
        elif "Pseudo dice [" in line:
            values = re.sub(r"np\.float\d+", "", line.partition("Pseudo dice [")[2])  # numpy 2 prints np.float64(0.5)
            self._dice = [float(value) for value in re.findall(r"nan|\d+\.?\d*(?:e-?\d+)?", values)]
        elif match := re.search(r"Epoch time: ([\d.]+) s", line):
            self._seconds.append(float(match[1]))
            return self._text()
        return None

    def _text(self) -> str:
        done = self._epoch + 1
        known = [value for value in self._dice if not math.isnan(value)]
        dice = f"{sum(known) / len(known):.3f}" if known else "none (no foreground drawn)"
        left = sum(self._seconds) / len(self._seconds) * (self.epochs - done) / 60
        rest = "" if done >= self.epochs else f", about {left:.1f} minutes left"
        return f"epoch {done} of {self.epochs}: pseudo Dice {dice}, {self._seconds[-1]:.0f} s{rest}"


class CaseLines:
    """Reads nnU-Net's prediction output and gives one line for each case."""

    def __init__(self) -> None:
        self._total, self._done = "?", 0

    def __call__(self, line: str) -> str | None:
        if match := re.search(r"There are (\d+) cases", line):
            self._total = match[1]
        elif match := re.match(r"\s*Predicting (\S+):\s*$", line):
            self._done += 1
            return f"case {self._done} of {self._total}: {match[1]}"
        return None


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
    """Make an empty output folder; remove an old one only on request, and only if an earlier quickstart made it.

    Raises:
        QuickstartError: the folder may not be replaced, or cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()):
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG_NAME).touch()
    except OSError as error:
        raise QuickstartError(
            f"--output {folder} cannot be made ({error.strerror}): choose a folder that you may write to"
        ) from error


def reduce_plans(plans: dict[str, Any], configurations: Sequence[str]) -> dict[str, Any]:
    """A copy of nnU-Net's plans: at most four stages of 16-128 features, one convolution each, small patch, batch of 2.

    Same preprocessed data (`data_identifier` is kept), other name, so that it is chosen with `-p`. See nnU-Net's
    documentation/explanation_plans_files.md on editing plans by hand. Other configurations are left out.
    """
    plans = json.loads(json.dumps(plans))
    reduced = {name: plans["configurations"][name] for name in configurations}
    for settings in reduced.values():
        _reduce(settings)
    return {**plans, "plans_name": f"{plans['plans_name']}_small", "configurations": reduced}


def _reduce(settings: dict[str, Any]) -> None:
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


def write_small_plans(dataset: Path, overwrite: bool) -> Path:
    """Write `nnUNetPlans_small.json` beside the plans of a dataset in nnUNet_preprocessed, and say how to use it.

    All configurations with a network of their own are reduced, so not those of a cascade.

    Raises:
        ValueError: the dataset is not in nnUNet_preprocessed.
        QuickstartError: it is not planned, or there are other plans of this name and `overwrite` is not set.
    """
    name = dataset.resolve().name if dataset.is_dir() else str(dataset)
    folder = find_dataset(name, PREPROCESSED)
    source = folder / "nnUNetPlans.json"
    number = int(folder.name[7:10])
    if not source.is_file():
        raise QuickstartError(f"{source} is missing: run  nnUNetv2_plan_and_preprocess -d {number}")
    plans = json.loads(source.read_text(encoding="utf-8"))
    # a cascade's configuration inherits its network
    names = [name for name, settings in plans["configurations"].items() if "architecture" in settings]
    small = reduce_plans(plans, names)
    path = folder / f"{small['plans_name']}.json"
    text = json.dumps(small, indent=2)
    if path.is_file() and path.read_text(encoding="utf-8") != text and not overwrite:
        raise QuickstartError(f"{path} exists and holds other plans: replace it with --overwrite")
    path.write_text(text, encoding="utf-8")
    print(path)
    for name in names:
        settings = small["configurations"][name]
        features = settings["architecture"]["arch_kwargs"]["features_per_stage"]
        print(f"    {name}: patch {settings['patch_size']}, batch {settings['batch_size']}, features {features}")
    print(f"    nnUNetv2_train {number} {names[-1]} 0 -p {small['plans_name']} -tr nnUNetTrainerExt")
    return path


def reader_for(dataset: Path, file: Path) -> BaseReaderWriter:
    """The reader nnU-Net uses for `dataset`; its arrays are (channel, Z, Y, X).

    Raises:
        QuickstartError: no reader opens `file`.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    description = read_description(dataset)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for each reader that it tries
            return determine_reader_writer_from_dataset_json(description, str(file), verbose=False)()
    except RuntimeError as error:
        raise QuickstartError(
            f"{file.resolve()} cannot be opened by any reader of nnU-Net: replace the file if it is broken, or correct "
            f"the file_ending {description['file_ending']} in dataset.json"
        ) from error


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


def draw_case(dataset: Path, results: dict[str, dict[str, Any]], output: Path) -> None:
    """One picture of a case: rows are three orthogonal slices; columns are image, truth and each trainer's prediction.

    `results` are by trainer its entry of the case in summary.json.
    """
    description = read_description(dataset)
    ending = description["file_ending"]
    reference = Path(next(iter(results.values()))["reference_file"])
    case = reference.name[: -len(ending)]
    first_channel = dataset / "imagesTs" / f"{case}_0000{ending}"
    reader = reader_for(dataset, first_channel)
    image, properties = reader.read_images([str(first_channel)])
    image, truth = image[0], reader.read_seg(str(reference))[0][0]
    labels = {"truth": truth}
    for trainer, result in results.items():
        dice = np.nanmean([metrics["Dice"] for metrics in result["metrics"].values()])
        labels[f"{trainer}\nmean Dice {dice:.3f}"] = reader.read_seg(result["prediction_file"])[0][0]
    spacing, directions, classes = properties["spacing"], directions_of(properties), class_names(description)
    planes = [axis for axis in range(3) if min(image.shape[a] for a in range(3) if a != axis) > 1]
    views = [view_across(axis, directions) for axis in planes]
    heights = [view.height(image.shape, spacing, 2.8) for view in views]
    columns = 1 + len(labels)
    figure = Figure(figsize=(3 * columns, sum(heights) + 1.2), layout="constrained")
    grid = figure.subplots(len(planes), columns, squeeze=False, height_ratios=heights)
    for row, view in zip(grid, views):
        index = fullest_slice(truth, view.axis)
        options = {"spacing": view.spacing(spacing), "letters": view.letters}
        scan = view.cut(image, index)
        draw_slice(row[0], scan, title="image", **options)
        row[0].set_ylabel(view.caption(index))
        for axes, (name, label) in zip(row[1:], labels.items()):
            draw_slice(axes, scan, view.cut(label, index), classes, title=name, **options)
    figure.suptitle(f"{dataset.name}, {case}: not seen in training", fontsize=12, wrap=True)
    add_legend(figure, classes)
    figure.savefig(output, dpi=110)


def report(summaries: dict[str, dict[str, Any]], description: dict[str, Any]) -> float:
    """Print Dice per class and trainer and return the mean over classes of the last one.

    `summaries` are nnU-Net's summary.json by trainer.
    """
    names, last = metric_names(description), list(summaries.values())[-1]
    rows = {names.get(key, key): [s["mean"][key]["Dice"] for s in summaries.values()] for key in last["mean"]}
    rows["mean"] = [s["foreground_mean"]["Dice"] for s in summaries.values()]
    width = max(24, *map(len, rows))
    cells = [max(8, len(trainer)) for trainer in summaries]
    print(f"\nDice on {len(last['metric_per_case'])} unseen case(s), the same number of steps each:")
    print(f"    {'':<{width}}" + "".join(f"  {name:>{n}}" for name, n in zip(summaries, cells)))
    for name, values in rows.items():
        print(f"    {name:<{width}}" + "".join(f"  {value:>{n}.3f}" for value, n in zip(values, cells)))
    if len(summaries) > 1:
        print("    One short training each and few cases: a difference of this size says nothing about the method.")
    for trainer, summary in summaries.items():
        if not any(metrics["Dice"] > 0 for metrics in summary["mean"].values()):
            print(f"    {trainer} has not left the background yet: raise --iterations", flush=True)
    return float(last["foreground_mean"]["Dice"])
