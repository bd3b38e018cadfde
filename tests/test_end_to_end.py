"""MedContext through nnU-Net's own commands, on a tiny dataset: train, continue, validate, predict, share, export.

Three commands run as processes of their own; the others by their entry point in this process, which saves the start.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.model_sharing import entry_points as sharing
from nnunetv2.run import run_training
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunetv2_ext.cli import main as ext_main
from tests.conftest import TinyDataset, make_tiny_dataset, run_command

TRAINER = "nnUNetTrainerMedContext"
SHORT = "num_epochs=1 num_iterations_per_epoch=3 num_val_iterations_per_epoch=1 panel_every=0 seed=1"
CPU = ["-device", "cpu"]
QUICK = ["--disable_tta", "--disable_progress_bar", *CPU]
SEQUENTIAL = ["-npp", "0", "-nps", "0", *QUICK]  # nnUNetv2_predict only
ENTRIES: dict[str, Callable[[], None]] = {
    "nnUNetv2_train": run_training.run_training_entry,
    "nnUNetv2_predict": predict_from_raw_data.predict_entry_point,
    "nnUNetv2_predict_from_modelfolder": predict_from_raw_data.predict_entry_point_modelfolder,
    "nnUNetv2_export_model_to_zip": sharing.export_pretrained_model_entry,
    "nnUNetv2_install_pretrained_model_from_zip": sharing.install_from_zip_entry_point,
}
# A stand-in for an environment in which this package was never installed
BLOCKER = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nnunetv2_ext":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] == "nnunetv2_ext"]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
"""


class Commands:
    """Runs nnU-Net's commands on one dataset with results in one folder."""

    def __init__(self, dataset: TinyDataset, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dataset, self.results, self.monkeypatch = dataset, results, monkeypatch

    def environment(self, settings: str = SHORT) -> dict[str, str]:
        return self.dataset.environment(self.results, settings)

    def here(self, *command: str, settings: str = SHORT, results: Path | None = None) -> None:
        """By the entry point, in this process."""
        with self.monkeypatch.context() as patch:
            for key, value in self.dataset.environment(results or self.results, settings).items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", list(command))
            patch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: Path(folder, "progress.png").touch())
            patch.setattr(torch, "set_num_threads", lambda number: None)
            patch.setattr(torch, "set_num_interop_threads", lambda number: None)
            ENTRIES[command[0]]()

    def train(self, configuration: str, fold: int, *options: str, plans: str = "tiny", settings: str = SHORT) -> Path:
        command = [
            "nnUNetv2_train",
            str(self.dataset.dataset_id),
            configuration,
            str(fold),
            "-p",
            plans,
            "-tr",
            TRAINER,
            *options,
            *CPU,
        ]
        self.here(*command, settings=settings)
        return self.model(configuration, plans) / f"fold_{fold}"

    def predict_command(self, output: Path, configuration: str, folds: Sequence[int], plans: str = "tiny") -> list[str]:
        where = ["-i", str(self.dataset.images_ts), "-o", str(output)]
        model = [
            "-d",
            str(self.dataset.dataset_id),
            "-c",
            configuration,
            "-p",
            plans,
            "-tr",
            TRAINER,
            "-f",
            *map(str, folds),
        ]
        return ["nnUNetv2_predict", *where, *model, *SEQUENTIAL]

    def model(self, configuration: str = "3d_fullres", plans: str = "tiny") -> Path:
        return self.results / self.dataset.name / f"{TRAINER}__{plans}__{configuration}"


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
    run_command(commands.predict_command(output, "3d_fullres", [0]), commands.environment(), elsewhere)
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


def test_a_zip_installed_elsewhere_predicts_the_same(commands, trained, predicted, tmp_path):
    fresh = tmp_path / "results"
    fresh.mkdir()
    model = ["-d", "1", "-c", "3d_fullres", "-tr", TRAINER, "-p", "tiny", "-f", "0"]
    commands.here("nnUNetv2_export_model_to_zip", *model, "-o", str(tmp_path / "model.zip"))
    commands.here("nnUNetv2_install_pretrained_model_from_zip", str(tmp_path / "model.zip"), results=fresh)
    command = commands.predict_command(tmp_path / "out", "3d_fullres", [0])
    commands.here(*command, results=fresh)
    assert_equal(predicted, segmentations(tmp_path / "out"))


def test_an_export_predicts_the_same_where_this_package_is_not_installed(commands, trained, predicted, tmp_path):
    """By the name that the command's help recommends, so that -d and -tr find it."""
    stock = Commands(commands.dataset, tmp_path / "results", commands.monkeypatch)
    assert ext_main(["export", str(trained), str(stock.model()).replace(TRAINER, "nnUNetTrainer")]) == 0
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    environment = stock.environment() | {
        "NNUNETV2_EXT_AUTOREGISTER": "0",
        "nnUNet_extTrainer": "",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    check = run_command(["python", "-c", "import nnunetv2_ext.core"], environment, tmp_path, check=False)
    assert "No module named 'nnunetv2_ext" in check.stdout, "the stand-in does not block this package"
    command = stock.predict_command(tmp_path / "out", "3d_fullres", [0])
    command[command.index(TRAINER)] = "nnUNetTrainer"
    run_command(command, environment, tmp_path)
    assert_equal(predicted, segmentations(tmp_path / "out"))


def test_two_folds_are_an_ensemble(commands, trained, predicted, tmp_path):
    commands.train("3d_fullres", 1)
    for folds in ([1], [0, 1]):
        commands.here(
            *commands.predict_command(tmp_path / str(len(folds)), "3d_fullres", folds), "--save_probabilities"
        )
    both, one = segmentations(tmp_path / "2"), segmentations(tmp_path / "1")
    assert list(both) == list(one) == list(predicted)
    for name in both:
        probabilities = np.load(tmp_path / "2" / name.replace("nii.gz", "npz"))["probabilities"]
        alone = np.load(tmp_path / "1" / name.replace("nii.gz", "npz"))["probabilities"]
        assert not np.allclose(probabilities, alone, atol=1e-3)


def test_continue_then_validate_again(commands, trained, tmp_path):
    """In a copy, because other tests predict with the first epoch's model."""
    copied = Commands(commands.dataset, tmp_path / "results", commands.monkeypatch)
    shutil.copytree(trained, copied.model())
    longer = SHORT.replace("num_epochs=1", "num_epochs=2")
    fold = copied.train("3d_fullres", 0, "--c", settings=longer)
    assert [row["epoch"] for row in epochs(fold)] == ["0", "1"]
    stored = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert stored["current_epoch"] == 2 and stored["nnunetv2_ext"]["global_step"] == 6
    first = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)["nnunetv2_ext"]["methods"]
    second = stored["nnunetv2_ext"]["methods"]
    assert any(
        not torch.equal(value, second["medcontext"]["teacher"][key])
        for key, value in first["medcontext"]["teacher"].items()
    )

    summary = json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]
    shutil.rmtree(fold / "validation")
    weights = (fold / "checkpoint_final.pth").read_bytes()
    copied.train("3d_fullres", 0, "--val", settings="")  # whatever the environment says now
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"] == summary
    assert (fold / "checkpoint_final.pth").read_bytes() == weights


def test_2d(commands, tmp_path):
    fold = commands.train("2d", 0, "--val_best", settings=SHORT.replace("panel_every=0", "panel_every=1"))
    assert float(epochs(fold)[0]["loss/consistency"]) > 0 and (fold / "panel_epoch_0000.png").is_file()
    assert (fold / "validation" / "summary.json").is_file(), (
        "of the best checkpoint, loaded after the teacher was freed"
    )
    commands.here(*commands.predict_command(tmp_path / "out", "2d", [0]))
    assert len(segmentations(tmp_path / "out")) == 2


def test_cascade(commands, tmp_path):
    """Low resolution at 1.4 mm, then full resolution with its result as further input channels."""
    plans = commands.dataset.plans()
    plans["plans_name"] = "cascade"
    lowres = json.loads(json.dumps(plans["configurations"]["3d_fullres"]))
    lowres |= {"data_identifier": "cascade_3d_lowres", "spacing": [1.4] * 3, "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_lowres"] = lowres
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (commands.dataset.preprocessed / commands.dataset.name / "cascade.json").write_text(json.dumps(plans))
    with commands.monkeypatch.context() as patch:
        for key, value in commands.environment().items():
            patch.setenv(key, value)
        preprocess_dataset(1, "cascade", ("3d_lowres",), (1,))
    # as nnU-Net's documentation has it: all folds of the low resolution before the cascade
    for fold in (0, 1):
        commands.train("3d_lowres", fold, plans="cascade")
    # fold 0 of the cascade needs the low resolution's result of its training cases: here only of those fold 1 validated
    settings = f"{SHORT} medcontext.fill=noise train_cases=[phantom_004,phantom_005]"
    fold = commands.train("3d_cascade_fullres", 0, plans="cascade", settings=settings)
    assert float(epochs(fold)[0]["loss/consistency"]) > 0
    weights = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 3
    commands.here(*commands.predict_command(tmp_path / "low", "3d_lowres", [0], "cascade"))
    command = commands.predict_command(tmp_path / "out", "3d_cascade_fullres", [0], "cascade")
    commands.here(*command, "-prev_stage_predictions", str(tmp_path / "low"))
    assert len(segmentations(tmp_path / "out")) == 2


def test_regions_with_an_ignore_label(commands, tmp_path):
    phantom = {"num_train": 4, "num_test": 2, "regions": True, "ignore": True}
    dataset = make_tiny_dataset(tmp_path, 2, ("3d_fullres",), **phantom)
    on_regions = Commands(dataset, tmp_path / "results", commands.monkeypatch)
    fold = on_regions.train("3d_fullres", 0, settings=SHORT.replace("panel_every=0", "panel_every=1"))
    (row,) = epochs(fold)
    for term in ("loss/supervised", "loss/masked_supervised", "loss/consistency", "medcontext/gradient_ratio"):
        assert 0 < float(row[term]) < 10, term
    assert (fold / "panel_epoch_0000.png").is_file()
    assert json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] >= 0
    on_regions.here(*on_regions.predict_command(tmp_path / "out", "3d_fullres", [0]))
    values = {int(v) for array in segmentations(tmp_path / "out").values() for v in np.unique(array)}
    assert len(segmentations(tmp_path / "out")) == 2 and values <= {0, 1, 2}


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
    command = commands.predict_command(tmp_path / "out", "3d_fullres", [0])
    commands.here(*command, settings="nonsense=1")
    assert_equal(predicted, segmentations(tmp_path / "out"))
    assert os.environ.get("nnUNet_ext_settings") != "nonsense=1"
