"""The modes that mix patches: continued is never stopped, in either stage; two ranks train one network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.core.randomness import seed_everything
from tests.contract import ddp_worker
from tests.contract.same import differences, finished

pytestmark = pytest.mark.usefixtures("no_pictures")
# six steps in two epochs; the fourth is the first with unlabelled patches, which lie where the teacher looked
LENGTH = "num_epochs=2 num_iterations_per_epoch=3 num_val_iterations_per_epoch=1 save_every=1"
STREAM = "wtbcp.unlabelled=rest train_cases=2 wtbcp.unlabelled_start=0.5 wtbcp.unlabelled_refresh=1"


class KilledError(Exception):
    pass


def ended(trainer: Any, step: int, kill: bool) -> Path:
    """The checkpoint of a training that was stopped after so many steps, or killed and left what was there."""
    train_step, done = trainer.train_step, []

    def counted(batch: dict) -> dict:
        done.append(train_step(batch))
        if len(done) == step and kill:
            raise KilledError
        if len(done) == step:
            Path(trainer.output_folder, "stop").touch()
        return done[-1]

    trainer.train_step = counted
    with pytest.raises(KilledError if kill else SystemExit):
        trainer.run_training()
    return Path(trainer.output_folder, "checkpoint_latest.pth")


@pytest.mark.parametrize("mode", ["bcp", "wtbcp"])
def test_continued_in_either_stage_a_training_is_the_one_that_never_stopped(make_trainer, tmp_path, mode: str) -> None:
    cls, settings = load_trainer("nnUNetTrainerWTBCP"), f"{LENGTH} {STREAM} wtbcp.mode={mode}"
    whole = make_trainer(cls, f"{settings} seed=5", "2d", results=tmp_path / "whole")
    whole.run_training()
    expected = finished(whole)
    assert [row["wtbcp/weight"] for row in expected["epochs.csv"]] == ["0.0", "0.5"]
    for name, step, kill, taken_up in (("first", 2, False, 2), ("border", 5, True, 3), ("second", 5, False, 5)):
        stopped = make_trainer(cls, f"{settings} seed=5", "2d", results=tmp_path / name)
        latest = ended(stopped, step, kill)
        seed_everything(777)
        again = make_trainer(cls, settings, "2d", continued=True, results=tmp_path / name)
        again.load_checkpoint(str(latest))
        assert again.global_step == taken_up
        again.run_training()
        assert differences(finished(again), expected) == [], name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bcp", "wtbcp"])
def test_two_ranks_draw_their_own_patches_and_train_one_network(make_trainer, tiny, tmp_path, mode: str) -> None:
    settings = "batch_size=4 wtbcp.unlabelled=rest train_cases=2 wtbcp.unlabelled_start=0 wtbcp.unlabelled_ramp=0"
    cls = load_trainer("nnUNetTrainerWTBCP")
    make_trainer(cls, f"{LENGTH} {settings} wtbcp.unlabelled_refresh=1 wtbcp.mode={mode}", "2d")  # the environment
    base = tiny.preprocessed / tiny.name
    files = str(base / "tiny.json"), str(base / "dataset.json"), str(tmp_path)
    arguments = cls.__module__, cls.__name__, "2d", *files
    torch.multiprocessing.start_processes(ddp_worker.run, arguments, nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1))
    for moment in ("start", "end"):
        assert [k for k, v in first[moment].items() if not torch.equal(v, second[moment][k])] == []
    still = {name for name, value in first["start"].items() if torch.equal(value, first["end"][name])}
    assert {name for name in still if ".seg_layers.0." not in name} == set()  # nnU-Net's loss leaves the lowest out
    assert first["losses"] != second["losses"]
