"""MedContext through nnU-Net's own commands: what tests/contract does not ask of every trainer.

Three commands run as processes of their own; the others by their entry point in this process, which saves the start.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.run import run_training
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from tests.conftest import TinyDataset, run_command

TRAINER = "nnUNetTrainerMedContext"
SHORT = "num_epochs=1 num_iterations_per_epoch=3 num_val_iterations_per_epoch=1 panel_every=0 seed=1"
CPU = ["-device", "cpu"]
QUICK = ["--disable_tta", "--disable_progress_bar", *CPU]
SEQUENTIAL = ["-npp", "0", "-nps", "0", *QUICK]  # nnUNetv2_predict only
ENTRIES: dict[str, Callable[[], None]] = {
    "nnUNetv2_train": run_training.run_training_entry,
    "nnUNetv2_predict": predict_from_raw_data.predict_entry_point,
    "nnUNetv2_predict_from_modelfolder": predict_from_raw_data.predict_entry_point_modelfolder,
}


class Commands:
    """Runs nnU-Net's commands on one dataset with results in one folder."""

    def __init__(self, dataset: TinyDataset, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dataset, self.results, self.monkeypatch = dataset, results, monkeypatch

    def environment(self, settings: str = SHORT) -> dict[str, str]:
        return self.dataset.environment(self.results, settings)

    def here(self, *command: str, settings: str = SHORT) -> None:
        """By the entry point, in this process."""
        with self.monkeypatch.context() as patch:
            for key, value in self.environment(settings).items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", list(command))
            patch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: Path(folder, "progress.png").touch())
            patch.setattr(torch, "set_num_threads", lambda number: None)
            patch.setattr(torch, "set_num_interop_threads", lambda number: None)
            ENTRIES[command[0]]()

    def train(self, configuration: str, fold: int, *options: str, settings: str = SHORT) -> Path:
        where = [str(self.dataset.dataset_id), configuration, str(fold), "-p", "tiny", "-tr", TRAINER]
        self.here("nnUNetv2_train", *where, *options, *CPU, settings=settings)
        return self.model(configuration) / f"fold_{fold}"

    def predict_command(self, output: Path, configuration: str) -> list[str]:
        where = ["-i", str(self.dataset.images_ts), "-o", str(output)]
        model = ["-d", str(self.dataset.dataset_id), "-c", configuration, "-p", "tiny", "-tr", TRAINER, "-f", "0"]
        return ["nnUNetv2_predict", *where, *model, *SEQUENTIAL]

    def model(self, configuration: str = "3d_fullres") -> Path:
        return self.results / self.dataset.name / f"{TRAINER}__tiny__{configuration}"


@pytest.fixture(scope="module")
def commands(tiny: TinyDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        yield Commands(tiny, tmp_path_factory.mktemp("results"), patch)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fold 0 of 3d_fullres, by the real command."""
    command = ["nnUNetv2_train", "1", "3d_fullres", "0", "-p", "tiny", "-tr", TRAINER, "--npz", *CPU]
    done = run_command(command, commands.environment(f"{SHORT} panel_every=1".replace("panel_every=0 ", "")),
                       tmp_path_factory.mktemp("there"))  # fmt: skip
    (commands.results / "log.txt").write_text(done.stdout)
    return commands.model()


@pytest.fixture(scope="module")
def predicted(commands: Commands, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The test cases, by the real command from another working directory."""
    output, elsewhere = tmp_path_factory.mktemp("predicted"), tmp_path_factory.mktemp("elsewhere")
    run_command(commands.predict_command(output, "3d_fullres"), commands.environment(), elsewhere)
    assert list(elsewhere.iterdir()) == [], "nothing is written into the working directory"
    return segmentations(output)


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted(folder.glob("*.nii.gz"))}


def assert_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert list(first) == list(second) and len(first) == 2
    assert all(np.array_equal(first[name], second[name]) for name in first)


def epochs(fold: Path) -> list[dict[str, str]]:
    with open(fold / "epochs.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_training_leaves_everything_a_user_looks_for(commands, trained):
    fold = trained / "fold_0"
    for name in ("checkpoint_final.pth", "progress.png", "panel_epoch_0000.png", "nnunetv2_ext_settings.yaml"):
        assert (fold / name).stat().st_size > 500, name
    (row,) = epochs(fold)
    for term in ("loss/supervised", "loss/masked_supervised", "loss/consistency", "medcontext/gradient_ratio"):
        assert np.isfinite(float(row[term])), term
    assert (fold / "validation" / "summary.json").is_file()
    assert len(list((fold / "validation").glob("*.npz"))) == 2, "--npz"
    plans = json.loads((trained / "plans.json").read_text())
    assert plans["nnunetv2_ext"]["num_iterations_per_epoch"] == 3
    log = (commands.results / "log.txt").read_text()
    assert "medcontext.beta = 2.0" in log and "num_epochs = 1    (nnUNet_ext_settings)" in log
    assert "Traceback" not in log and "WARNING" not in log


def test_prediction_from_another_folder_and_by_model_folder_agree(commands, trained, predicted, tmp_path):
    assert set(predicted) == {p.name.replace("_0000", "") for p in commands.dataset.images_ts.iterdir()}
    assert len({value for array in predicted.values() for value in np.unique(array)}) > 1
    where = ["-i", str(commands.dataset.images_ts), "-o", str(tmp_path / "out")]
    workers = ["-npp", "1", "-nps", "1"]
    commands.here("nnUNetv2_predict_from_modelfolder", *where, "-m", str(trained), "-f", "0", *workers, *QUICK)
    assert_equal(predicted, segmentations(tmp_path / "out"))


def test_2d(commands, tmp_path):
    fold = commands.train("2d", 0, "--val_best", settings=SHORT.replace("panel_every=0", "panel_every=1"))
    assert float(epochs(fold)[0]["loss/consistency"]) > 0 and (fold / "panel_epoch_0000.png").is_file()
    assert (fold / "validation" / "summary.json").is_file(), (
        "of the best checkpoint, loaded after the teacher was freed"
    )
    commands.here(*commands.predict_command(tmp_path / "out", "2d"))
    assert len(segmentations(tmp_path / "out")) == 2


def test_a_misspelt_setting_ends_training_with_one_line_that_names_the_right_one(commands, tmp_path):
    environment = commands.dataset.environment(tmp_path / "results", "medcontext.mask_ratoi=0.5")
    command = ["nnUNetv2_train", "1", "3d_fullres", "0", "-p", "tiny", "-tr", TRAINER, *CPU]
    done = run_command(command, environment, tmp_path, check=False)
    assert done.returncode != 0
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("ValueError: unknown setting 'medcontext.mask_ratoi' (from nnUNet_ext_settings)")
    assert "did you mean medcontext.mask_ratio" in last and f"nnUNetv2_ext settings {TRAINER}" in last
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.pth"))


def test_settings_of_the_environment_do_not_disturb_prediction(commands, trained, predicted, tmp_path):
    command = commands.predict_command(tmp_path / "out", "3d_fullres")
    commands.here(*command, settings="nonsense=1")
    assert_equal(predicted, segmentations(tmp_path / "out"))
    assert os.environ.get("nnUNet_ext_settings") != "nonsense=1"
