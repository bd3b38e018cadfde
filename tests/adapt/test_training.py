"""The training: what its loss spares, which cases its batches have, and that `--c` loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_ext.adapt.training import hidden_heads
from nnunetv2_ext.core import randomness
from nnunetv2_ext.trainers.nnUNetTrainerAdapt import nnUNetTrainerAdapt
from tests.contract.same import differences, finished


@pytest.fixture
def build(make_trainer: Callable[..., Any], tiny) -> Callable[..., Any]:
    """``build("key=value", replay=True)``: in 2d, with the tiny dataset's own cases as old ones, half of each batch."""

    def make(settings: str = "", replay: bool = True, **options: Any) -> Any:
        old = tiny.preprocessed / tiny.name / "nnUNetPlans_2d"
        names = sorted(file.stem for file in old.glob("*.pkl"))[:2]
        share = "" if "adapt.replay=" in settings else "adapt.replay=0.5 "
        replayed = f"{share}adapt.old_data={old} adapt.old_cases=[{','.join(names)}]"
        return make_trainer(nnUNetTrainerAdapt, f"{settings} {replayed if replay else ''}", "2d", **options)

    return make


def prepared(trainer: Any) -> Any:
    trainer.initialize()
    trainer.dataloader_train, _ = trainer.get_dataloaders()
    return trainer


def test_half_of_each_batch_is_of_the_old_cases(build) -> None:
    trainer = prepared(build())
    old = set(trainer.settings.adapt.old_cases)
    new = set(trainer.do_split()[0])
    assert not old & new  # fold 0 validates on the first two
    for _ in range(5):
        batch = next(trainer.dataloader_train)
        assert batch["domain"] == ("new", "old")
        assert batch["keys"][0] in new and batch["keys"][1] in old
        assert batch["data"].shape[0] == 2 and all(len(level) == 2 for level in batch["target"])


def test_an_old_case_that_is_not_there_is_named(build) -> None:
    trainer = build("adapt.replay=0.5")
    trainer.settings = trainer.settings.model_copy(
        update={"adapt": trainer.settings.adapt.model_copy(update={"old_cases": ["gone"]})}
    )
    trainer.initialize()
    with pytest.raises(ValueError, match="old cases gone are not in"):
        trainer.get_dataloaders()


def test_new_samples_lose_what_is_not_drawn_and_old_ones_keep_all(build) -> None:
    trainer = prepared(build("adapt.not_drawn=[organ_1]"))
    trainer.network.train()
    batch = trainer.on_device(next(trainer.dataloader_train))
    [loss_pass] = trainer.loss_passes(batch)
    found = float(loss_pass.compute()["supervised"].value.detach())

    with torch.no_grad():
        output = trainer.network(batch.data)

        def spared(logits: torch.Tensor) -> torch.Tensor:
            both = torch.log(logits[:, 0].exp() + logits[:, 1].exp())
            return torch.stack((both, logits[:, 2]), 1)

        new = [spared(level[:1]) for level in output]
        target = [torch.where(level[:1] == 2, 1, 0) for level in batch.target]
        of_new = trainer.loss(new, target)
        of_old = trainer.loss([level[1:] for level in output], [level[1:] for level in batch.target])
    assert found == pytest.approx(float(of_new + of_old) / 2, rel=1e-4)


def test_a_hidden_region_is_no_part_of_the_loss(make_trainer, regions) -> None:
    trainer = make_trainer(nnUNetTrainerAdapt, "adapt.not_drawn=[organ_2]", "2d", dataset=regions)
    prepared(trainer)
    batch = trainer.on_device(next(trainer.dataloader_train))
    [loss_pass] = trainer.loss_passes(batch)
    loss_pass.compute()["supervised"].value.backward()
    whole, hidden = trainer.network.decoder.seg_layers[-1].weight.grad.abs().flatten(1).sum(1).tolist()
    assert whole > 0 and hidden == 0


def test_nothing_not_drawn_is_nnunets_loss(build) -> None:
    trainer = prepared(build())
    batch = trainer.on_device(next(trainer.dataloader_train))
    [loss_pass] = trainer.loss_passes(batch)
    with torch.no_grad():
        wanted = trainer.loss(trainer.network(batch.data), batch.target)
    assert float(loss_pass.compute()["supervised"].value.detach()) == pytest.approx(float(wanted), rel=1e-6)


def test_a_short_fine_tune_is_the_default(make_trainer, monkeypatch) -> None:
    monkeypatch.setattr("tests.conftest.TRAINER_SETTINGS", "panel_every=0")
    trainer = make_trainer(nnUNetTrainerAdapt, "", "2d")
    assert (trainer.total_steps, trainer.initial_lr, trainer.num_val_iterations_per_epoch) == (300, 1e-3, 0)
    trainer.initialize()
    assert isinstance(trainer.optimizer, torch.optim.SGD) and trainer.optimizer.param_groups[0]["momentum"] == 0.99
    trainer.lr_scheduler.step(5)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**0.9)


def test_continued_with_replay_it_is_the_training_that_never_stopped(build, tmp_path) -> None:
    settings = "num_epochs=2 num_iterations_per_epoch=3 num_val_iterations_per_epoch=0 adapt.not_drawn=[organ_1]"
    settings += " adapt.replay=0.3"  # of two samples 0.6: drawn each step
    whole = build(f"{settings} seed=3", results=tmp_path / "whole")
    whole.run_training()
    stopped = build(f"{settings} seed=3", results=tmp_path / "stopped")
    step = stopped.train_step

    def train_step(batch: dict) -> dict:
        if stopped.global_step == 3:
            Path(stopped.output_folder, "stop").touch()
        return step(batch)

    stopped.train_step = train_step
    with pytest.raises(SystemExit):
        stopped.run_training()
    assert stopped.global_step == 4
    randomness.seed_everything(777)
    again = build(settings, continued=True, results=tmp_path / "stopped")
    again.load_checkpoint(str(Path(again.output_folder, "checkpoint_latest.pth")))
    again.run_training()
    assert differences(finished(again), finished(whole)) == []


def test_the_panel_shows_both_sites(build, tmp_path) -> None:
    trainer = prepared(build())
    trainer.last_batch = next(trainer.dataloader_train)
    trainer.draw_panel(tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("names", "has_regions", "heads"), [(["b"], False, (2,)), (["c", "a", "a"], False, (3, 1)), (["b"], True, (1,))]
)
def test_heads_of_names(names: list[str], has_regions: bool, heads: tuple[int, ...]) -> None:
    assert hidden_heads(["a", "b", "c"], names, has_regions) == heads


def test_names_that_leave_nothing_or_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="has no class d; it has a, b"):
        hidden_heads(["a", "b"], ["d"], False)
    with pytest.raises(ValueError, match="nothing to learn"):
        hidden_heads(["a", "b"], ["a", "b"], False)
