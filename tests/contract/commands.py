"""nnU-Net's commands and ours on one dataset, as processes or by their entry points in this one."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import BaseContext
from multiprocessing.pool import ThreadPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from tests.conftest import TinyDataset, run_command
from tests.contract import table

CPU = ["-device", "cpu"]
FORKED = Path(__file__).with_name("forked_command.py")
# A stand-in for an environment in which this package was never installed
BLOCKER = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nnunetv2_ext", "toy_method"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2_ext"]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
"""
_get_context = multiprocessing.get_context


def _threads_for_spawned_pools(method: str | None = None) -> Any:
    """nnU-Net's pools write and score a handful of tiny files; each process would import it anew, for 10 s."""
    return SimpleNamespace(Pool=ThreadPool) if method == "spawn" else _get_context(method)


class Commands:
    """Runs commands for one trainer, with results in one folder."""

    def __init__(self, dataset: TinyDataset, results: Path, trainer: str, configuration: str, settings: str) -> None:
        self.dataset, self.results, self.trainer = dataset, results, trainer
        self.configuration, self.settings = configuration, settings

    @property
    def model(self) -> Path:
        """The model folder."""
        return self.results / self.dataset.name / f"{self.trainer}__tiny__{self.configuration}"

    def elsewhere(self, results: Path, trainer: str | None = None) -> Commands:
        """The same with another results folder."""
        return Commands(self.dataset, results, trainer or self.trainer, self.configuration, self.settings)

    def environment(self, settings: str = "") -> dict[str, str]:
        """Of a process."""
        return {**table.environment(), **self.dataset.environment(self.results, f"{self.settings} {settings}".strip())}

    def train_command(self, fold: int, *options: str) -> list[str]:
        """``nnUNetv2_train``."""
        where = [str(self.dataset.dataset_id), self.configuration, str(fold)]
        return ["nnUNetv2_train", *where, "-p", "tiny", "-tr", self.trainer, *options, *CPU]

    def predict_command(self, output: Path, folds: Sequence[int], *options: str) -> list[str]:
        """``nnUNetv2_predict`` for the test cases, by the names of dataset, configuration, plans and trainer."""
        files = ["-i", str(self._inputs(output)), "-o", str(output), "-f", *map(str, folds)]
        return ["nnUNetv2_predict", *files, *self._by_name(), "-npp", "0", "-nps", "0", "--disable_tta", *CPU, *options]

    def _inputs(self, output: Path) -> Path:
        """The test images; of a model of fewer channels a folder beside the output with those alone."""
        channels = len(json.loads((self.model / "dataset.json").read_text())["channel_names"])
        images = sorted(self.dataset.images_ts.iterdir())
        wanted = [image for image in images if int(image.name.split(".")[0][-4:]) < channels]
        if wanted == images:
            return self.dataset.images_ts
        folder = output.with_name(f"{output.name}_images")
        folder.mkdir()
        for image in wanted:
            shutil.copy(image, folder)
        return folder

    def _by_name(self) -> list[str]:
        where = ["-d", str(self.dataset.dataset_id), "-c", self.configuration]
        return [*where, "-p", "tiny", "-tr", self.trainer]

    def zip_command(self, output: Path) -> list[str]:
        """``nnUNetv2_export_model_to_zip`` of fold 0."""
        return ["nnUNetv2_export_model_to_zip", *self._by_name(), "-f", "0", "-o", str(output)]

    def there(self, command: list[str], settings: str = "") -> str:
        """In a process of its own; what it said."""
        log = self.results / "said.txt"
        process = self._forked(command, settings, log)
        process.join(240)
        said = log.read_text()
        assert process.exitcode == 0, said[-4000:]
        return said

    def started(self, command: list[str], **changes: str) -> str:
        """As a user starts it, by the console script and with a changed environment; what it said."""
        return run_command(command, self.environment() | changes, self.results).stdout

    def here(self, command: list[str], settings: str = "") -> None:
        """By the entry point, in this process, which saves the start."""
        import torch
        from nnunetv2.training.logging.nnunet_logger import LocalLogger

        with pytest.MonkeyPatch.context() as patch:
            for key, value in self.environment(settings).items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", command)
            patch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: Path(folder, "progress.png").touch())
            patch.setattr(multiprocessing, "get_context", _threads_for_spawned_pools)
            patch.setattr(torch, "set_num_threads", lambda number: None)
            patch.setattr(torch, "set_num_interop_threads", lambda number: None)
            entry = _ENTRIES[command[0]]
            getattr(importlib.import_module(entry[0]), entry[1])()

    def killed(self, command: list[str], settings: str, when: Callable[[], bool], log: Path) -> None:
        """In a process of its own that gets ``kill -9`` once ``when()`` is true."""
        process = self._forked(command, settings, log)
        try:
            until = time.monotonic() + 240
            while not when() and process.is_alive() and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-4000:]

    def _forked(self, command: list[str], settings: str, log: Path) -> BaseProcess:
        request = {
            "entry": _ENTRIES[command[0]],
            "argv": command,
            "environment": {**os.environ, **self.environment(settings)},
            "cwd": str(self.results),
            "log": str(log),
        }
        process = _warm().Process(target=runpy.run_path, args=(str(FORKED), {"REQUEST": request}))  # type: ignore[attr-defined]
        process.start()
        return process


@cache
def _warm() -> BaseContext:
    """Its processes are forked from one that has imported nnU-Net."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module for module, _ in _ENTRIES.values()])
    return context


_ENTRIES = {
    "nnUNetv2_train": ("nnunetv2.run.run_training", "run_training_entry"),
    "nnUNetv2_predict": ("nnunetv2.inference.predict_from_raw_data", "predict_entry_point"),
    "nnUNetv2_export_model_to_zip": ("nnunetv2.model_sharing.entry_points", "export_pretrained_model_entry"),
    "nnUNetv2_install_pretrained_model_from_zip": (
        "nnunetv2.model_sharing.entry_points",
        "install_from_zip_entry_point",
    ),
}


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    """By file name."""
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted(folder.glob("*.nii.gz"))}


def same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    """Whether both hold the same segmentations of the two test cases."""
    assert list(first) == list(second) and len(first) == 2
    return all(np.array_equal(first[name], second[name]) for name in first)
