"""nnU-Net's own commands on J-RAS models: ensembles, validation, sharing, every fusion, every kind of label, a cascade.

The commands run by their entry points in this process, which saves the start; test_cli.py has them as processes.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.model_sharing import entry_points as sharing
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunetv2_ext.cli.dispatch import main as ext_main
from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from tests.conftest import TinyDataset
from tests.jras.conftest import SMALL_JRAS

TRAINER = "nnUNetTrainerJRAS"
SHORT = "num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 panel_every=0 seed=1 save_every=1 num_epochs=1"
ENTRIES: dict[str, Callable[[], None]] = {
    "nnUNetv2_train": run_training_entry,
    "nnUNetv2_predict": predict_entry_point,
    "nnUNetv2_export_model_to_zip": sharing.export_pretrained_model_entry,
    "nnUNetv2_install_pretrained_model_from_zip": sharing.install_from_zip_entry_point,
}


_get_context = multiprocessing.get_context


def threads_for_spawned_pools(method: str | None = None) -> Any:
    """nnU-Net's pools write and score a handful of tiny files; each process would import it anew, for 10 s."""
    return SimpleNamespace(Pool=ThreadPool) if method == "spawn" else _get_context(method)


class Commands:
    """Runs nnU-Net's commands on one dataset with results in one folder."""

    def __init__(self, dataset: TinyDataset, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dataset, self.results, self.monkeypatch = dataset, results, monkeypatch

    def run(self, *command: str, settings: str = "", results: Path | None = None) -> None:
        with self.monkeypatch.context() as patch:
            keys = {pair.split("=")[0] for pair in settings.split()}
            base = " ".join(pair for pair in f"{SMALL_JRAS} {SHORT}".split() if pair.split("=")[0] not in keys)
            for key, value in self.dataset.environment(results or self.results, f"{base} {settings}").items():
                patch.setenv(key, value)
            patch.setattr(sys, "argv", list(command))
            patch.setattr(LocalLogger, "plot_progress_png", lambda self, folder: Path(folder, "progress.png").touch())
            patch.setattr(multiprocessing, "get_context", threads_for_spawned_pools)
            patch.setattr(torch, "set_num_threads", lambda number: None)
            patch.setattr(torch, "set_num_interop_threads", lambda number: None)
            ENTRIES[command[0]]()

    def train(
        self,
        configuration: str,
        fold: str,
        *options: str,
        settings: str = "",
        plans: str = "tiny",
        trainer: str = TRAINER,
    ) -> Path:
        where = [str(self.dataset.dataset_id), configuration, fold, "-p", plans, "-tr", trainer, "-device", "cpu"]
        self.run("nnUNetv2_train", *where, *options, settings=settings)
        return self.model(configuration, plans, trainer) / f"fold_{fold}"

    def model(self, configuration: str, plans: str = "tiny", trainer: str = TRAINER) -> Path:
        return self.results / self.dataset.name / f"{trainer}__{plans}__{configuration}"

    def predict(
        self,
        output: Path,
        configuration: str,
        folds: Sequence[str],
        *options: str,
        plans: str = "tiny",
        results: Path | None = None,
    ) -> dict[str, np.ndarray]:
        """Segmentations of the test cases, by file name."""
        model = ["-d", str(self.dataset.dataset_id), "-c", configuration, "-p", plans, "-tr", TRAINER, "-f", *folds]
        files = ["-i", str(self.dataset.images_ts), "-o", str(output), "-npp", "0", "-nps", "0", "-device", "cpu"]
        quick = ["--disable_tta", "--disable_progress_bar"]
        self.run("nnUNetv2_predict", *files, *model, *quick, *options, results=results)
        return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted(output.glob("*.nii.gz"))}


@pytest.fixture(scope="module")
def quiet() -> Iterator[pytest.MonkeyPatch]:
    from nnunetv2_ext.core.logs import EpochLog

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochLog, "plot", lambda self, path=None: None)
        yield patch


@pytest.fixture(scope="module")
def commands(tiny: TinyDataset, quiet: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Folds 0 and 1 of 3d_fullres are trained, with banks of at most 24 and 15 guides."""
    torch.set_num_threads(1)
    made = Commands(tiny, tmp_path_factory.mktemp("results"), quiet)
    made.train("3d_fullres", "0", settings="num_epochs=2")
    made.train("3d_fullres", "1", settings="jras.bank_size=15")
    return made


def weights(fold: Path, checkpoint: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    return read(fold / checkpoint)["network_weights"]


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    assert list(first) == list(second) and len(first) == 2
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_folds_with_banks_of_different_size_are_an_ensemble(commands, tmp_path):
    model = commands.model("3d_fullres")
    sizes = [len(weights(model / f"fold_{fold}")["bank.images"]) for fold in (0, 1)]
    assert 15 < sizes[0] <= 24 and sizes[1] <= 15
    commands.predict(tmp_path / "both", "3d_fullres", ["0", "1"], "--save_probabilities")
    commands.predict(tmp_path / "reverse", "3d_fullres", ["1", "0"], "--save_probabilities")
    one = [tmp_path / fold for fold in ("0", "1")]
    for path in one:
        commands.predict(path, "3d_fullres", [path.name], "--save_probabilities")

    def probabilities(folder: Path) -> np.ndarray:
        return np.load(sorted(folder.glob("*.npz"))[0])["probabilities"].astype(np.float32)

    both = probabilities(tmp_path / "both")
    assert np.allclose(both, probabilities(tmp_path / "reverse"), atol=1e-3)
    # nnU-Net averages logits, so the ensemble lies between its members voxel by voxel (two classes decide a voxel)
    alone = [probabilities(path) for path in one]
    assert not np.allclose(alone[0], alone[1], atol=1e-3)
    ratio = [np.log(p[1].clip(1e-7) / p[0].clip(1e-7)) for p in (both, *alone)]
    assert np.allclose(ratio[0], (ratio[1] + ratio[2]) / 2, atol=0.05)


@pytest.mark.parametrize("option", ["--val", "--val_best"])
def test_validation_alone_repeats_the_trainings(commands, tmp_path, option):
    copied = Commands(commands.dataset, tmp_path / "results", commands.monkeypatch)
    shutil.copytree(commands.model("3d_fullres"), copied.model("3d_fullres"))
    fold = copied.model("3d_fullres") / "fold_0"
    summary = json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]
    shutil.rmtree(fold / "validation")
    before = (fold / "checkpoint_final.pth").read_bytes()
    copied.train("3d_fullres", "0", "--val", *([] if option == "--val" else [option]), settings="num_epochs=2")
    found = json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]
    assert option == "--val_best" or found == summary
    assert (fold / "checkpoint_final.pth").read_bytes() == before


def test_fold_all_trains_predicts_and_says_that_its_validation_is_void(commands, tmp_path):
    fold = commands.train("3d_fullres", "all")
    assert set(read(fold / "checkpoint_final.pth")[EXTENSION_KEY]["methods"]["jras"]["cases"]) == {
        f"phantom_00{n}" for n in range(6)
    }
    shutil.rmtree(fold / "validation")
    for file in fold.glob("training_log*"):
        file.unlink()
    commands.train("3d_fullres", "all", "--val")
    (text,) = [file.read_text() for file in fold.glob("training_log*")]
    assert "VOID" in text and (fold / "validation" / "summary.json").is_file()
    assert len(commands.predict(tmp_path / "out", "3d_fullres", ["all"])) == 2


def test_other_settings_train_continue_and_predict(commands, tmp_path):
    settings = "jras.retriever=random jras.num_guides=1 jras.guides_with_gradient=1"
    own = Commands(commands.dataset, tmp_path / "results", commands.monkeypatch)
    fold = own.train("3d_fullres", "0", settings=settings)
    first = weights(fold)
    own.train("3d_fullres", "0", "--c", settings=f"{settings} num_epochs=2")
    second = weights(fold)
    assert torch.equal(first["bank.images"], second["bank.images"])
    assert not torch.equal(first["reader.value.weight"], second["reader.value.weight"])
    assert len(own.predict(tmp_path / "out", "3d_fullres", ["0"])) == 2
    assert ext_main(["export", str(fold.parent), str(tmp_path / "plain")]) == 0
    plain = weights(tmp_path / "plain" / "fold_0")
    assert not any(name.startswith(("bank.", "reader.", "columns.", "backbone.")) for name in plain)


def test_groups_can_be_blanked_without_changing_a_prediction(commands, tmp_path, capsys):
    blank = tmp_path / "results" / commands.dataset.name / commands.model("3d_fullres").name
    blank.parent.mkdir(parents=True)
    assert ext_main(["export", str(commands.model("3d_fullres")), str(blank), "--blank-groups"]) == 0
    assert "PRIVACY" in capsys.readouterr().out
    for fold in ("fold_0", "fold_1"):
        checkpoint = read(blank / fold / "checkpoint_final.pth")
        assert int(checkpoint["network_weights"]["bank.groups"].abs().max()) == 0
        assert len(checkpoint["network_weights"]["bank.images"]) > 0 and EXTENSION_KEY not in checkpoint
    expected = commands.predict(tmp_path / "expected", "3d_fullres", ["0"])
    assert same(expected, commands.predict(tmp_path / "out", "3d_fullres", ["0"], results=tmp_path / "results"))
    assert ext_main(["export", str(blank), str(tmp_path / "x"), "--blank-groups", "--strip-bank"]) == 2
    assert "--strip-bank and --blank-groups exclude each other" in capsys.readouterr().err


def test_a_model_without_guides_has_no_groups_to_blank(commands, tmp_path, capsys):
    own = Commands(commands.dataset, tmp_path / "results", commands.monkeypatch)
    fold = own.train("3d_fullres", "0", settings="jras.retriever=none")
    for option in ("--blank-groups", "--strip-bank"):
        assert ext_main(["export", str(fold.parent), str(tmp_path / "out"), option]) == 2
        assert f"export it without {option}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cascade(tiny, quiet, tmp_path):
    """Guides for both stages; the one-hot channels of the first stage's result are no part of a guide."""
    torch.set_num_threads(1)
    dataset, commands = tiny, Commands(tiny, tmp_path / "results", quiet)
    plans = dataset.plans()
    plans["plans_name"] = "jras_cascade"
    lowres = json.loads(json.dumps(plans["configurations"]["3d_fullres"]))
    lowres |= {"data_identifier": "jras_cascade_3d_lowres", "spacing": [1.4] * 3, "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_lowres"] = lowres
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (dataset.preprocessed / dataset.name / "jras_cascade.json").write_text(json.dumps(plans))
    with commands.monkeypatch.context() as patch:
        for key, value in dataset.environment(commands.results).items():
            patch.setenv(key, value)
        preprocess_dataset(1, "jras_cascade", ("3d_lowres",), (1,))
    for fold in ("0", "1"):  # all folds of the low resolution before the cascade, as nnU-Net's documentation has it
        commands.train("3d_lowres", fold, plans="jras_cascade")
    chosen = "train_cases=[phantom_004,phantom_005] jras.num_guides=1"  # those that fold 1 validated
    own = {"plans": "jras_cascade", "settings": chosen}
    stored = weights(commands.train("3d_cascade_fullres", "0", **own))
    assert stored["backbone.encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 3
    assert stored["bank.images"].shape[1] == 1
    commands.predict(tmp_path / "low", "3d_lowres", ["0"], plans="jras_cascade")
    previous = ["-prev_stage_predictions", str(tmp_path / "low")]
    found = commands.predict(tmp_path / "out", "3d_cascade_fullres", ["0"], *previous, plans="jras_cascade")
    assert len(found) == 2
