"""A training that was interrupted and continued is the training that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_ext.core import randomness
from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.core.trainer import ExtTrainer
from nnunetv2_ext.trainers.nnUNetTrainerMedContext import nnUNetTrainerMedContext
from tests.contract.same import differences, epochs, finished

pytestmark = pytest.mark.usefixtures("no_pictures")
LENGTH = "num_epochs=3 num_iterations_per_epoch=3 num_val_iterations_per_epoch=2 save_every=1"
# half of the batch is masked and filled with noise, so the method's own random stream matters
SETTINGS = f"{LENGTH} seed=5 medcontext.masked_fraction=0.5 medcontext.fill=noise medcontext.ramp_fraction=0.5"


class KilledError(Exception):
    """Stands for kill -9: nothing is written after it."""


def file(trainer: nnUNetTrainer, name: str) -> Path:
    return Path(trainer.output_folder) / name


def call_at(trainer: Any, method: str, number: int, action: Callable[[], None]) -> None:
    """Run ``action`` after the ``number``-th call (from 1) of a trainer's method."""
    original, calls = getattr(trainer, method), []

    def wrapped(*args):
        result = original(*args)
        calls.append(1)
        if len(calls) == number:
            action()
        return result

    setattr(trainer, method, wrapped)


def kill() -> None:
    raise KilledError


def touch_stop(trainer: Any) -> Callable[[], None]:
    return file(trainer, "stop").touch


def continued(make_trainer: Callable, settings: str = "", name: str = "checkpoint_latest.pth", **options: Any) -> Any:
    """A fresh trainer that has loaded the fold's checkpoint as ``--c`` does, from some other random state."""
    randomness.seed_everything(777)
    options = {"cls": nnUNetTrainerMedContext, "configuration": "2d", **options}
    changed = {pair.split("=")[0] for pair in settings.split()}
    length = " ".join(pair for pair in LENGTH.split() if pair.split("=")[0] not in changed)
    trainer = make_trainer(settings=f"{length} {settings}", continued=True, **options)
    trainer.load_checkpoint(str(file(trainer, name)))
    return trainer


_uninterrupted: dict[str, Any] = {}


@pytest.fixture
def uninterrupted(make_trainer, tmp_path) -> dict[str, Any]:
    """The oracle: one run from start to end."""
    if not _uninterrupted:
        trainer = make_trainer(nnUNetTrainerMedContext, SETTINGS, "2d", results=tmp_path / "oracle")
        trainer.run_training()
        _uninterrupted.update(finished(trainer))
    return _uninterrupted


def started(make_trainer: Callable) -> Any:
    return make_trainer(nnUNetTrainerMedContext, SETTINGS, configuration="2d")


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("on_epoch_end", 1),  # at the boundary of the first epoch
        ("on_epoch_end", 2),
        ("train_step", 5),  # within the second epoch, of which nothing was saved
        ("validation_step", 3),
    ],
)
def test_a_killed_training_continues_bit_for_bit(make_trainer, uninterrupted, method, number):
    trainer = started(make_trainer)
    call_at(trainer, method, number, kill)
    with pytest.raises(KilledError):
        trainer.run_training()
    again = continued(make_trainer)
    again.run_training()
    assert differences(finished(again), uninterrupted) == []
    assert not file(again, "checkpoint_latest.pth").exists()


@pytest.mark.parametrize(
    ("method", "number", "epoch", "steps"),
    [
        ("train_step", 1, 0, 1),  # in the very first epoch
        ("train_step", 5, 1, 2),
        ("train_step", 6, 1, 3),  # after the last training step: stops at the start of validation
        ("validation_step", 3, 1, 3),
        ("validation_step", 4, 2, 0),  # after the last validation step: stops at the start of the next epoch
    ],
)
def test_a_stopped_training_continues_bit_for_bit(make_trainer, uninterrupted, method, number, epoch, steps):
    trainer = started(make_trainer)
    call_at(trainer, method, number, touch_stop(trainer))
    with pytest.raises(SystemExit) as caught:
        trainer.run_training()
    assert caught.value.code == 0 and not file(trainer, "stop").exists()
    log = Path(trainer.log_file).read_text()
    assert f"in epoch {epoch} after {steps} training steps; checkpoint_latest.pth is written, --c continues" in log
    again = continued(make_trainer)
    assert (again.current_epoch, again.global_step) == (epoch, 3 * epoch + steps)
    again.run_training()
    assert differences(finished(again), uninterrupted) == []


@pytest.mark.parametrize("method", ["train_step", "validation_step"])
def test_a_checkpoint_from_within_an_epoch_logs_whole_epochs_only(make_trainer, method):
    """nnU-Net has by then begun the lists of learning rates and start times, or that of training losses."""
    trainer = started(make_trainer)
    call_at(trainer, method, {"train_step": 5, "validation_step": 3}[method], touch_stop(trainer))
    with pytest.raises(SystemExit):
        trainer.run_training()
    checkpoint = read(file(trainer, "checkpoint_latest.pth"))
    assert max(len(values) for values in trainer.logger.get_checkpoint().values()) == 2
    assert checkpoint["current_epoch"] == 1
    assert {name: len(values) for name, values in checkpoint["logging"].items() if len(values) != 1} == {}


def test_many_stops_are_as_good_as_none(make_trainer, uninterrupted):
    trainer = started(make_trainer)
    for _ in range(8):
        call_at(trainer, "train_step", 1, touch_stop(trainer))
        with pytest.raises(SystemExit):
            trainer.run_training()
        trainer = continued(make_trainer)
    trainer.run_training()
    assert differences(finished(trainer), uninterrupted) == []


def test_the_oracle_would_notice_another_random_stream(make_trainer, uninterrupted):
    trainer = started(make_trainer)
    call_at(trainer, "on_epoch_end", 1, kill)
    with pytest.raises(KilledError):
        trainer.run_training()
    again = continued(make_trainer)
    again._random_states = None
    again.run_training()
    assert differences(finished(again), uninterrupted) != []


def test_a_truncated_latest_continues_from_best_bit_for_bit(make_trainer, uninterrupted):
    trainer = started(make_trainer)
    call_at(trainer, "on_epoch_end", 2, kill)
    with pytest.raises(KilledError):
        trainer.run_training()
    latest = file(trainer, "checkpoint_latest.pth")
    latest.write_bytes(latest.read_bytes()[:5000])
    again = continued(make_trainer)
    log = Path(again.log_file).read_text()
    assert "WARNING" in log and str(latest) in log and "Continuing from" in log
    again.run_training()
    assert differences(finished(again), uninterrupted) == []


def test_a_training_that_is_over_is_not_changed_by_c(make_trainer, uninterrupted):
    trainer = started(make_trainer)
    trainer.run_training()
    again = continued(make_trainer, name="checkpoint_final.pth")
    again.train_step = None  # would fail
    again.run_training()
    assert differences(finished(again), uninterrupted) == []


# ---- lengthening, early stop


def test_a_finished_training_can_be_lengthened_and_stopped_again(make_trainer):
    trainer = started(make_trainer)
    trainer.run_training()
    longer = continued(make_trainer, "num_epochs=5", "checkpoint_final.pth")
    assert longer.settings.num_epochs == longer.num_epochs == 5 and longer.settings.seed == 5
    call_at(longer, "train_step", 4, touch_stop(longer))
    with pytest.raises(SystemExit):
        longer.run_training()
    # nnU-Net's --c takes checkpoint_final.pth before checkpoint_latest.pth, so the old final must be gone
    assert not file(longer, "checkpoint_final.pth").exists()
    last = continued(make_trainer, "num_epochs=5")
    assert (last.current_epoch, last.global_step) == (4, 13)
    last.run_training()
    assert read(file(last, "checkpoint_final.pth"))["current_epoch"] == 5
    assert [row["epoch"] for row in epochs(file(last, "epochs.csv"))] == list("01234")


def test_killed_while_it_is_lengthened_a_training_still_has_a_checkpoint(make_trainer):
    trainer = started(make_trainer)
    trainer.run_training()
    longer = continued(make_trainer, "num_epochs=5", "checkpoint_final.pth")
    call_at(longer, "train_step", 1, kill)
    with pytest.raises(KilledError):
        longer.run_training()
    assert continued(make_trainer, "num_epochs=5").current_epoch == 3


def test_a_new_training_in_an_old_folder_cannot_be_taken_for_the_old_one(make_trainer):
    trainer = started(make_trainer)
    trainer.run_training()
    anew = make_trainer(nnUNetTrainerMedContext, f"{LENGTH} seed=6", configuration="2d")
    call_at(anew, "train_step", 1, kill)
    with pytest.raises(KilledError):
        anew.run_training()
    names = sorted(path.name for path in Path(anew.output_folder).glob("*.pth"))
    assert names == ["previous_checkpoint_best.pth", "previous_checkpoint_final.pth"]
    assert "kept as previous_checkpoint_final.pth" in Path(anew.log_file).read_text()


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:Mean of empty slice")
def test_an_undefined_dice_says_nothing_about_progress(make_trainer):
    """nnU-Net's moving average stays NaN after one validation without foreground; a healthy run must not end by it."""
    trainer = make_trainer(
        ExtTrainer, "num_epochs=4 num_iterations_per_epoch=1 early_stop_patience=1 seed=1", configuration="2d"
    )
    nothing = np.zeros(2)
    trainer.validation_step = lambda batch: {
        "loss": np.float32(1),
        "tp_hard": nothing,
        "fp_hard": nothing,
        "fn_hard": nothing,
    }
    trainer.run_training()
    assert trainer.current_epoch == 4


def test_early_stop_ends_the_training_for_good(make_trainer):
    def no_progress(batch: dict) -> dict:
        wrong = np.ones(2)
        return {"loss": np.float32(1), "tp_hard": 0 * wrong, "fp_hard": wrong, "fn_hard": wrong}

    length = "num_epochs=9 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1 save_every=1"
    trainer = make_trainer(ExtTrainer, f"{length} early_stop_patience=2 seed=1", configuration="2d")
    trainer.validation_step = no_progress
    trainer.run_training()
    assert trainer.current_epoch == 3  # best in the first epoch, two more without a better one
    assert "Early stop: 2 epochs" in Path(trainer.log_file).read_text()
    assert read(file(trainer, "checkpoint_final.pth"))["current_epoch"] == 3
    assert not file(trainer, "checkpoint_latest.pth").exists()
    assert read(file(trainer, "checkpoint_best.pth"))[EXTENSION_KEY]["epochs_without_improvement"] == 0
    again = make_trainer(ExtTrainer, length, configuration="2d", continued=True)
    again.load_checkpoint(str(file(again, "checkpoint_final.pth")))
    again.train_step = None
    again.run_training()
    assert again.current_epoch == 3
    patient = make_trainer(ExtTrainer, f"{length} early_stop_patience=3", configuration="2d", continued=True)
    patient.load_checkpoint(str(file(patient, "checkpoint_final.pth")))
    patient.validation_step = no_progress
    patient.run_training()
    assert patient.current_epoch == 4


def test_a_best_checkpoint_counts_from_its_own_epoch(make_trainer):
    dice = iter([0.1, 0.05, 0.9, 0.9])

    def planned(batch: dict) -> dict:
        d = next(dice)
        half = np.full(2, (1 - d) / 2)
        return {"loss": np.float32(1), "tp_hard": np.full(2, d / 2), "fp_hard": half, "fn_hard": half}

    length = "num_epochs=3 num_iterations_per_epoch=1 num_val_iterations_per_epoch=1"
    trainer = make_trainer(ExtTrainer, f"{length} early_stop_patience=5", configuration="2d")
    trainer.validation_step = planned
    trainer.run_training()
    best = read(file(trainer, "checkpoint_best.pth"))
    assert (best["current_epoch"], best[EXTENSION_KEY]["epochs_without_improvement"]) == (3, 0)
    assert best["_best_ema"] == trainer._best_ema == best["logging"]["ema_fg_dice"][-1]


def test_a_later_checkpoint_names_today_s_settings(make_trainer, saved):
    again = continued(make_trainer, "num_epochs=7")
    path = file(again, "checkpoint_best.pth")
    again.save_checkpoint(str(path))
    blocks = [read(p)["init_args"]["plans"]["nnunetv2_ext"] for p in (file(saved, "checkpoint_latest.pth"), path)]
    assert [block["num_epochs"] for block in blocks] == [2, 7]


# ---- what cannot be continued


@pytest.fixture
def saved(make_trainer, fixed_batches) -> Any:
    """A trainer with ``checkpoint_latest.pth`` written after two steps."""
    trainer = make_trainer(nnUNetTrainerMedContext, "seed=5 train_cases=2", configuration="2d")
    trainer.initialize()
    trainer.do_split()
    for batch in fixed_batches(trainer, 2):
        trainer.train_step(batch)
    trainer.save_checkpoint(str(file(trainer, "checkpoint_latest.pth")))
    return trainer


def test_the_teacher_generator_and_steps_come_back(make_trainer, saved, fixed_batches):
    again = continued(make_trainer)
    assert again.global_step == 2 and again.settings.train_cases == 2
    assert differences(again.teacher.state_dict(), saved.teacher.state_dict()) == []
    assert differences(again.optimizer.state_dict(), saved.optimizer.state_dict()) == []
    (batch,) = fixed_batches(saved, 1, seed=9)
    saved_figures = saved.train_step(batch)
    randomness.set_random_state(again._random_states[0], again.generator)
    assert differences(again.train_step(batch), saved_figures) == []
    assert differences(again.teacher.state_dict(), saved.teacher.state_dict()) == []


def test_a_conflicting_setting_is_an_error_that_shows_both_values(make_trainer, saved):
    with pytest.raises(ValueError, match=r"started with initial_lr=0\.01, but nnUNet_ext_settings now says .*=0\.5"):
        continued(make_trainer, "initial_lr=0.5")
    with pytest.raises(ValueError, match=r"medcontext\.beta=2\.0, but plans now says medcontext\.beta=0\.1"):
        plans = saved.plans_manager.plans | {"nnunetv2_ext": {"medcontext": {"beta": 0.1}}}
        continued(make_trainer, plans=plans)
    validating = make_trainer(nnUNetTrainerMedContext, "initial_lr=0.5", configuration="2d")  # --val
    validating.load_checkpoint(str(file(validating, "checkpoint_latest.pth")))
    assert validating.settings.initial_lr == 0.01


def test_other_training_cases_are_an_error(make_trainer, saved, monkeypatch):
    chosen = saved._train_cases
    assert len(chosen) == 2
    monkeypatch.setattr(nnUNetTrainer, "do_split", lambda self: (["new_1", "new_2", "new_3"], []))
    with pytest.raises(ValueError) as caught:
        continued(make_trainer).do_split()
    text = str(caught.value)
    assert all(case in text for case in chosen) and "train_cases now selects new_" in text


def test_another_architecture_is_refused_before_anything_is_loaded(make_trainer, saved, tiny):
    plans = tiny.plans()
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 12]
    trainer = make_trainer(nnUNetTrainerMedContext, LENGTH, configuration="2d", continued=True, plans=plans)
    trainer.initialize()
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    with pytest.raises(ValueError, match=r"was trained with another network: .* is 16 x .*there and 12 x .*here"):
        trainer.load_checkpoint(str(file(trainer, "checkpoint_latest.pth")))
    assert differences(before, dict(trainer.network.state_dict())) == []
    assert trainer.current_epoch == trainer.global_step == 0


def test_a_truncated_final_is_named(make_trainer, saved):
    final = file(saved, "checkpoint_final.pth")
    final.write_bytes(file(saved, "checkpoint_latest.pth").read_bytes()[:4000])
    with pytest.raises(ValueError) as caught:
        continued(make_trainer, name="checkpoint_final.pth")
    assert str(final) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_a_newer_version_is_refused(make_trainer, saved):
    path = file(saved, "checkpoint_latest.pth")
    checkpoint = torch.load(path, weights_only=False)
    checkpoint[EXTENSION_KEY]["format"] += 1
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="newer nnunetv2-ext"):
        continued(make_trainer)


def test_a_checkpoint_of_plain_nnunet_continues_with_a_fresh_teacher(make_trainer, fixed_batches):
    plain = make_trainer(nnUNetTrainer, configuration="2d")
    plain.initialize()
    for batch in fixed_batches(plain, 2):
        plain.train_step(batch)
    trainer = make_trainer(nnUNetTrainerMedContext, LENGTH, configuration="2d", continued=True)
    path = file(trainer, "checkpoint_latest.pth")
    plain.save_checkpoint(str(path))
    trainer.load_checkpoint(str(path))
    log = Path(trainer.log_file).read_text()
    assert "checkpoint of plain nnU-Net" in log and "has no teacher" in log
    assert (trainer.current_epoch, trainer.global_step) == (1, 3)
    student = dict(trainer.network.state_dict())
    assert differences(student, dict(plain.network.state_dict())) == []
    assert differences(dict(trainer.teacher.state_dict()), student) == []
    assert differences(trainer.optimizer.state_dict(), plain.optimizer.state_dict()) == []


def test_a_checkpoint_of_plain_nnunet_is_continued_with_our_weight_decay(make_trainer):
    plain = make_trainer(nnUNetTrainer, configuration="2d")
    plain.initialize()
    assert {group["weight_decay"] for group in plain.optimizer.param_groups} == {3e-5}
    trainer = make_trainer(ExtTrainer, f"{LENGTH} weight_decay=1e-3", configuration="2d", continued=True)
    plain.save_checkpoint(path := str(file(trainer, "checkpoint_latest.pth")))
    trainer.load_checkpoint(path)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {1e-3}
