"""``plan-network -network vmunet`` by its command, trained by stock nnU-Net and by trainers of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mambapy", reason="needs the extra mamba")

from nnunetv2_ext.cli import main

SMALL = json.dumps({"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "depths_up": [1, 1, 1, 1]})


@pytest.fixture
def base(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The tiny dataset's preprocessed folder with plans ``wide`` of 32 x 40; cleaned of what a test adds."""
    for key, value in tiny.environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    folder = tiny.preprocessed / tiny.name
    before = set(folder.iterdir())
    plans = tiny.plans()
    plans["configurations"]["2d"]["patch_size"] = [32, 40]
    (folder / "wide.json").write_text(json.dumps(plans | {"plans_name": "wide"}))
    yield folder
    for file in set(folder.iterdir()) - before:
        file.unlink()


def plan(*options: str) -> int:
    return main(["plan-network", "-d", "1", "-network", "vmunet", "--no-timing", *options])


def test_it_trains_and_the_predictor_has_the_same(base: Path, make_trainer: Callable[..., Any], capsys: Any) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunetv2_ext.trainers.nnUNetTrainerExt import nnUNetTrainerExt

    assert plan("-p", "wide", "--kwargs", SMALL) == 0
    said = capsys.readouterr().out
    assert "optimizer=adamw initial_lr=0.0003" in said and "needs nnunetv2_ext installed" in said
    plans = json.loads((base / "wide_vmunet.json").read_text())
    stock = make_trainer(nnUNetTrainer, "", configuration="2d", plans=plans)
    stock.initialize()
    assert type(stock.network).__name__ == "VMUNet" and type(stock.optimizer).__name__ == "SGD"

    trainer = make_trainer(nnUNetTrainerExt, "seed=1", configuration="2d", plans=plans)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert type(trainer.optimizer).__name__ == "AdamW" and trainer.initial_lr == 3e-4
    for _ in range(2):
        assert np.isfinite(trainer.train_step(next(trainer.dataloader_train))["loss"])
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(1, 1, 32, 40)
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(x), trainer.network(x))

    mine = make_trainer(nnUNetTrainerExt, "initial_lr=0.01 optimizer=sgd", configuration="2d", plans=plans)
    assert mine.initial_lr == 0.01 and mine.settings.optimizer == "sgd", "the user's word counts more than the plans'"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-p", "tiny"], "at least 32 x 32"),
        (["-p", "wide", "-c", "3d_fullres"], "use -c 2d"),
        (["-p", "wide", "--kwargs", '{"widths": [8, 16]}'], "four stages"),
        (["-p", "wide", "--width", "2"], "no option --width"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(base: Path, capsys: Any, options: list[str], words: str) -> None:
    before = set(base.iterdir())
    assert plan(*options) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert set(base.iterdir()) == before
