"""Off is plain nnU-Net; continued is never stopped; the seed decides. Bit for bit, for every trainer of the table."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from tests.contract.same import differences, epochs, finished
from tests.contract.table import Row, over, written

pytestmark = pytest.mark.usefixtures("no_pictures")
LENGTH = "num_epochs=2 num_iterations_per_epoch=3 num_val_iterations_per_epoch=1 save_every=1"
SEED, STOP_AFTER = 11, 5  # steps: the second of three in the second epoch


class PlainSeeded(nnUNetTrainer):
    """nnU-Net of `LENGTH`, seeded where ours is, without the choice that its augmentation makes by the clock."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")) -> None:  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1

    def initialize(self) -> None:
        randomness.seed_everything(SEED)
        super().initialize()

    @staticmethod
    def get_training_transforms(*args, **kwargs):
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        randomness.make_repeatable(transforms)
        return transforms


@pytest.fixture(autouse=True)
def same_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method may draw secrets from the operating system (whose patients a model knows), which no seed decides."""
    monkeypatch.setattr(secrets, "token_bytes", lambda number=32: b"s" * (number or 32))


_plain: dict[tuple[str, str], Any] = {}
_whole: dict[str, dict[str, Any]] = {}


@pytest.fixture
def plain(row: Row, make_trainer: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """The oracle for rows that are off: a training of nnUNetTrainer itself."""
    key = row.facts.data, row.configuration
    if key not in _plain:
        dataset = request.getfixturevalue(row.facts.data)
        _plain[key] = make_trainer(PlainSeeded, configuration=row.configuration, dataset=dataset)
        _plain[key].run_training()
    return _plain[key]


@pytest.fixture
def whole(row: Row, build: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    """The oracle for interruptions: one run of the row from start to end."""
    if row.name not in _whole:
        trainer = build(f"{LENGTH} seed={SEED}", results=tmp_path / "whole")
        trainer.run_training()
        _whole[row.name] = finished(trainer)
    return _whole[row.name]


@over(lambda row: row.facts.off is not None)
def test_with_its_method_off_a_trainer_is_plain_nnunet(row: Row, make_trainer, plain, request, tmp_path) -> None:
    ours = make_trainer(
        row.cls,
        f"{LENGTH} seed={SEED} {written(row.facts.off or {})}",
        configuration=row.configuration,
        dataset=request.getfixturevalue(row.facts.data),
        results=tmp_path / "ours",
    )
    ours.run_training()
    assert differences(dict(plain.network.state_dict()), dict(ours.network.state_dict())) == []
    for key in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs"):
        assert plain.logger.get_value(key, None) == ours.logger.get_value(key, None), key
    assert len(ours.logger.get_value("lrs", None)) == 2


@over(lambda row: bool(row.facts.off))
def test_off_is_another_training_than_on(row: Row, plain, whole) -> None:
    """Else the test above would compare nothing."""
    assert plain.logger.get_value("train_losses", None) != whole["logging"]["train_losses"]


@over()
def test_continued_from_within_an_epoch_a_training_is_the_one_that_never_stopped(row: Row, build, whole) -> None:
    stopped = build(f"{LENGTH} seed={SEED}")
    step, done = stopped.train_step, []

    def train_step(batch: dict) -> dict:
        result = step(batch)
        done.append(1)
        if len(done) == STOP_AFTER:
            Path(stopped.output_folder, "stop").touch()
        return result

    stopped.train_step = train_step
    with pytest.raises(SystemExit):
        stopped.run_training()
    assert len(done) == STOP_AFTER
    before = read(Path(stopped.output_folder, "checkpoint_latest.pth"))
    before = {key: before[key] for key in ("network_weights", "optimizer_state", EXTENSION_KEY)}

    randomness.seed_everything(777)
    again = build(LENGTH, continued=True)
    again.load_checkpoint(str(Path(again.output_folder, "checkpoint_latest.pth")))
    assert again.global_step == STOP_AFTER
    again.run_training()
    after = finished(again)
    assert differences(after, whole) == []
    learns = {name.split(".")[0] for name, p in again.network.named_parameters() if p.requires_grad}
    _has_moved(before, after, learns)


def _has_moved(before: dict[str, Any], after: dict[str, Any], learns: set[str]) -> None:
    """One step later each part of the network that learns is another: a training that stands still would pass."""
    moved = {name.split("/")[-1] for name in differences(before["network_weights"], after["network_weights"])}
    floating = {name for name, value in after["network_weights"].items() if _learns(name, value)}
    assert moved and floating
    parts = {name.split(".")[0] for name in floating} & learns
    assert {part for part in parts if not any(name.split(".")[0] == part for name in moved)} == set()
    assert differences(before["optimizer_state"], after["optimizer_state"]) != []
    assert before[EXTENSION_KEY]["global_step"] < after[EXTENSION_KEY]["global_step"]


def _learns(name: str, value: torch.Tensor) -> bool:
    return value.is_floating_point() and name.endswith((".weight", ".bias"))


@over()
def test_the_seed_decides_and_nothing_else_does(row: Row, build, whole, tmp_path) -> None:
    for seed, drawn_before in ((SEED, 1), (SEED + 1, 2)):
        randomness.seed_everything(drawn_before)
        trainer = build(f"{LENGTH} seed={seed}", results=tmp_path / str(seed))
        trainer.run_training()
        table = epochs(Path(trainer.output_folder) / "epochs.csv")
        assert len(table) == 2 and len(table[0]) > 5
        assert (table == whole["epochs.csv"]) == (seed == SEED)
