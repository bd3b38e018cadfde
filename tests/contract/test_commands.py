"""The real commands, for every trainer: kill -9, --c, predict, ensemble, zip, export to where we are not installed."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_ext.cli import main as ext_main
from nnunetv2_ext.core.checkpoint import read
from tests.contract.commands import BLOCKER, Commands, same, segmentations
from tests.contract.table import Row, over

pytestmark = pytest.mark.slow
SHORT = "num_iterations_per_epoch=2 num_val_iterations_per_epoch=1 panel_every=0 seed=1 save_every=1"
ENDLESS = "num_epochs=1000"
_trained: dict[str, Commands] = {}
_predicted: dict[str, dict[str, np.ndarray]] = {}


@pytest.fixture
def commands(row: Row, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Of the row; fold 0 was killed after some epochs and went on for one more."""
    if row.name not in _trained:
        dataset, results = request.getfixturevalue(row.facts.data), tmp_path_factory.mktemp("results")
        made = Commands(dataset, results, row.name, row.configuration, row.settings(SHORT))
        fold = made.model / "fold_0"
        latest = fold / "checkpoint_latest.pth"
        made.killed(made.train_command(0), ENDLESS, latest.is_file, results / "killed.txt")
        done = read(latest)["current_epoch"]
        said = made.there(made.train_command(0, "--c"), f"num_epochs={done + 1}")
        assert "Traceback" not in said
        with open(fold / "epochs.csv", newline="") as lines:
            assert [int(line["epoch"]) for line in csv.DictReader(lines)] == list(range(done + 1))
        assert (fold / "checkpoint_final.pth").is_file() and (fold / "validation" / "summary.json").is_file()
        assert not latest.exists()
        _trained[row.name] = made
    return _trained[row.name]


@pytest.fixture
def predicted(row: Row, commands: Commands, tmp_path: Path) -> dict[str, np.ndarray]:
    """The test cases, by the real command."""
    if row.name not in _predicted:
        commands.there(commands.predict_command(tmp_path / "out", [0]))
        _predicted[row.name] = segmentations(tmp_path / "out")
    return _predicted[row.name]


@over()
def test_killed_and_continued_a_training_predicts(row: Row, commands, predicted) -> None:
    images = sorted(commands.dataset.images_ts.glob("*_0000.nii.gz"))
    assert list(predicted) == [image.name.replace("_0000", "") for image in images]
    values = {int(value) for array in predicted.values() for value in np.unique(array)}
    assert len(values) > 1 and values <= {0, 1, 2}


@over()
def test_two_folds_are_an_ensemble(row: Row, commands, predicted, tmp_path) -> None:
    commands.here(commands.train_command(1), "num_epochs=1")
    found: list[np.ndarray] = []
    for folds in ([0], [1], [0, 1]):
        output = tmp_path / "".join(map(str, folds))
        commands.here(commands.predict_command(output, folds, "--save_probabilities"))
        found.append(np.load(min(output.glob("*.npz")))["probabilities"].astype(np.float32))
    zero, one, both = (np.log(p[1].clip(1e-7) / p[0].clip(1e-7)) for p in found)
    # nnU-Net averages logits, so the ensemble lies between its members voxel by voxel (two classes decide a voxel)
    assert not np.allclose(zero, one, atol=1e-3)
    assert np.allclose(both, (zero + one) / 2, atol=0.05)


@over()
def test_a_zip_installed_elsewhere_predicts_the_same(row: Row, commands, predicted, tmp_path) -> None:
    fresh = commands.elsewhere(tmp_path / "results")
    fresh.results.mkdir()
    commands.here(commands.zip_command(tmp_path / "model.zip"))
    fresh.here(["nnUNetv2_install_pretrained_model_from_zip", str(tmp_path / "model.zip")])
    fresh.here(fresh.predict_command(tmp_path / "out", [0]))
    assert same(predicted, segmentations(tmp_path / "out"))


@over()
def test_an_export_predicts_where_this_package_is_not_installed(
    row: Row, commands, predicted, tmp_path, capsys
) -> None:
    """By the name that the command's help recommends, so that -d and -tr find it."""
    stock = commands.elsewhere(tmp_path / "results", "nnUNetTrainer")
    source = read(commands.model / "fold_0" / "checkpoint_final.pth")
    options = [] if _exports_student(row, source) else ["--weights", next(iter(row.method.weights))]  # type: ignore[union-attr]
    status = ext_main(["export", str(commands.model), str(stock.model), *options])
    if words := row.facts.refuses.get("export"):
        said = capsys.readouterr().err
        assert status == 2 and re.search(words, said) and said.count("\n") == 1
        assert not stock.model.exists()
        return
    assert status == 0

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    alone = {
        "NNUNETV2_EXT_AUTOREGISTER": "0",
        "nnUNet_extTrainer": "",
        "nnUNet_ext_settings": "",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    stock.started(["python", "-c", _NOT_IMPORTABLE], **alone)
    stock.started(stock.predict_command(tmp_path / "out", [0]), **alone)
    found = segmentations(tmp_path / "out")
    assert list(found) == list(predicted)
    assert {int(value) for array in found.values() for value in np.unique(array)} <= {0, 1, 2}
    exported = read(stock.model / "fold_0" / "checkpoint_final.pth")
    assert exported["trainer_name"] == "nnUNetTrainer"
    if exported["network_weights"].keys() == source["network_weights"].keys():  # the network is a plain one
        assert same(predicted, found)
    trained = {_content(value) for value in _tensors(source)}
    assert [name for name, value in exported["network_weights"].items() if _content(value) not in trained] == []


_NOT_IMPORTABLE = """
try:
    import nnunetv2_ext.core
except ModuleNotFoundError:
    raise SystemExit(0)
raise SystemExit("the stand-in does not block this package")
"""


def _exports_student(row: Row, checkpoint: dict[str, Any]) -> bool:
    try:
        row.cls.export_weights(checkpoint, "student")
    except ValueError:
        return False
    return True


def _tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors of a checkpoint, wherever they are."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [tensor for value in tree.values() for tensor in _tensors(value)]
    return [tensor for value in tree for tensor in _tensors(value)] if isinstance(tree, (list, tuple)) else []


def _content(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.contiguous().numpy().tobytes()
