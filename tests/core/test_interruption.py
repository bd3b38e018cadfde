"""Ending a training early: signals and the stop file, in this process and through nnU-Net's own command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nnunetv2_ext.core.checkpoint import EXTENSION_KEY, read
from nnunetv2_ext.core.interruption import SIGNALS, StopRequest
from nnunetv2_ext.core.trainer import ExtTrainer

# ---- the request itself


def test_nothing_is_requested_at_first(tmp_path):
    with StopRequest(tmp_path / "stop") as stop:
        assert not stop.requested and stop.exit_code == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_request_and_handlers_are_put_back(tmp_path, number):
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopRequest(tmp_path / "stop") as stop:
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == number.name and stop.exit_code == 128 + number
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_handlers_are_put_back_after_an_error(tmp_path):
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(RuntimeError), StopRequest(tmp_path / "stop"):
        raise RuntimeError
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_the_stop_file_is_a_request_with_exit_code_0(tmp_path):
    with StopRequest(tmp_path / "stop") as stop:
        (tmp_path / "stop").touch()
        assert stop.requested and stop.exit_code == 0 and str(tmp_path / "stop") in stop.reason


def test_exit_training_is_another_name_of_the_stop_file(tmp_path):
    with StopRequest(tmp_path / "stop") as stop:
        (tmp_path / "exit_training").touch()
        assert stop.requested and stop.exit_code == 0 and stop.reason == f"the file {tmp_path / 'exit_training'}"
        (tmp_path / "stop").touch()
        stop.remove_files()
        assert not stop.requested and not list(tmp_path.iterdir())


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt), StopRequest(tmp_path / "stop"):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_repeated_sigterm_and_the_sigint_a_dead_parent_causes_do_not_interrupt_the_saving(tmp_path):
    with StopRequest(tmp_path / "stop") as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.reason == "SIGTERM" and stop.exit_code == 143


def test_outside_the_main_thread_the_stop_file_still_works(tmp_path):
    before, seen = [signal.getsignal(s) for s in SIGNALS], []

    def train() -> None:
        with StopRequest(tmp_path / "stop") as stop:
            seen.append(stop.requested)
            (tmp_path / "stop").touch()
            seen.append(stop.requested)
            seen.append([signal.getsignal(s) for s in SIGNALS] == before)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [False, True, True]


# ---- a trainer, in this process


def on_step(trainer, number: int, action) -> None:
    original = trainer.train_step

    def step(batch):
        output = original(batch)
        if trainer.global_step == number:
            action()
        return output

    trainer.train_step = step


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_training_at_the_next_step(make_trainer, no_pictures, number):
    trainer = make_trainer(ExtTrainer, configuration="2d")
    on_step(trainer, 2, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        trainer.run_training()
    assert caught.value.code == 128 + number and signal.getsignal(number) is before
    checkpoint = read(Path(trainer.output_folder) / "checkpoint_latest.pth")
    assert checkpoint[EXTENSION_KEY]["global_step"] == 2
    assert [len(rank) for rank in checkpoint[EXTENSION_KEY]["partial_epoch"]["outputs"]] == [2]
    assert f"Stopped by {number.name} in epoch 0 after 2 training steps" in Path(trainer.log_file).read_text()


def test_a_signal_after_the_last_look_ends_before_the_validation(make_trainer, no_pictures):
    trainer = make_trainer(ExtTrainer, configuration="2d")
    end = trainer.on_epoch_end

    def signal_in_the_last_epoch() -> None:
        end()
        if trainer.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.on_epoch_end = signal_in_the_last_epoch
    with pytest.raises(SystemExit) as caught:
        trainer.run_training()
    assert caught.value.code == 143
    assert read(Path(trainer.output_folder) / "checkpoint_final.pth")["current_epoch"] == 2
    assert "--val runs the validation" in Path(trainer.log_file).read_text()


def test_dead_loader_workers_are_taken_for_a_stop_only_if_one_was_requested(make_trainer, no_pictures):
    class Dead:
        def __next__(self):
            raise RuntimeError("One or more background workers are no longer alive")

    trainer = make_trainer(ExtTrainer, configuration="2d")
    on_step(trainer, 1, lambda: setattr(trainer, "dataloader_train", Dead()))
    with pytest.raises(RuntimeError, match="background workers"):
        trainer.run_training()

    trainer = make_trainer(ExtTrainer, configuration="2d")
    stop_file = Path(trainer.output_folder) / "stop"

    class DiesWithUs(Dead):
        def __next__(self):
            stop_file.touch()  # Ctrl-C reached the workers before we looked
            super().__next__()

    on_step(trainer, 1, lambda: setattr(trainer, "dataloader_train", DiesWithUs()))
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert (Path(trainer.output_folder) / "checkpoint_latest.pth").is_file()


@pytest.mark.parametrize("name", ["stop", "exit_training"])
def test_without_checkpointing_a_stop_writes_nothing_and_says_so(make_trainer, no_pictures, name):
    trainer = make_trainer(ExtTrainer, configuration="2d")
    trainer.disable_checkpointing = True
    file = Path(trainer.output_folder) / name
    on_step(trainer, 1, file.touch)
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert not file.exists() and f"Stopped by the file {file}" in Path(trainer.log_file).read_text()
    assert not list(Path(trainer.output_folder).glob("*.pth"))
    assert "nothing was saved (--disable_checkpointing)" in Path(trainer.log_file).read_text()


# ---- nnU-Net's own command

COMMAND = [
    *(str(Path(sys.executable).with_name("nnUNetv2_train")), "1", "2d", "0", "-p", "tiny"),
    *("-tr", "nnUNetTrainerMedContext", "-device", "cpu"),
]
# an epoch that does not end by itself, and then one that does: the length may change when a training is continued
ENDLESS = "num_epochs=1 num_iterations_per_epoch=100000 num_val_iterations_per_epoch=1 panel_every=0 seed=1"
SHORT = ENDLESS.replace("100000", "1")


class Running:
    """``nnUNetv2_train`` as a process group in the background; killed at the end of the block.

    ``workers`` is the number of processes that load and augment; 0 is none beside the training itself.
    """

    def __init__(self, tiny, results: Path, settings: str, *arguments: str, workers: int = 0) -> None:
        self.folder = results / tiny.name / "nnUNetTrainerMedContext__tiny__2d" / "fold_0"
        self.seen = set(self.folder.glob("training_log_*"))
        environment = {**os.environ, **tiny.environment(results, settings), "nnUNet_n_proc_DA": str(workers)}
        self.output = results.with_suffix(".log")
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        return "".join(p.read_text() for p in set(self.folder.glob("training_log_*")) - self.seen)

    def wait_until_it_trains(self) -> None:
        end = time.monotonic() + 120
        while "Current learning rate" not in self.log():
            assert self.process.poll() is None and time.monotonic() < end, self.output.read_text()[-3000:]
            time.sleep(0.05)
        time.sleep(1)  # some steps

    def exit_code(self) -> int:
        return self.process.wait(timeout=180)

    def latest_step(self) -> int:
        return read(self.folder / "checkpoint_latest.pth")[EXTENSION_KEY]["global_step"]


@pytest.mark.slow
@pytest.mark.timeout(600)  # five starts of nnU-Net and two validations on a busy machine
def test_the_real_command_is_stopped_killed_and_continued_to_its_end(tiny, tmp_path):
    results = tmp_path / "results"
    with Running(tiny, results, ENDLESS) as run:
        run.wait_until_it_trains()
        run.process.send_signal(signal.SIGTERM)
        assert run.exit_code() == 143
        first = run.latest_step()
        assert f"Stopped by SIGTERM in epoch 0 after {first} training steps" in run.log()

    with Running(tiny, results, ENDLESS, "--c") as run:
        run.wait_until_it_trains()
        (run.folder / "stop").touch()
        assert run.exit_code() == 0 and not (run.folder / "stop").exists()
        second = run.latest_step()
        assert "Stopped by the file" in run.log() and not (run.folder / "validation").exists()

    with Running(tiny, results, ENDLESS, "--c") as run:
        run.wait_until_it_trains()
        run.process.kill()
        assert run.exit_code() == -signal.SIGKILL
        assert 0 <= first <= second == run.latest_step() and second > 0

    with Running(tiny, results, SHORT, "--c", "--val_best") as run:
        assert run.exit_code() == 0, run.output.read_text()[-3000:]
        final = run.folder / "checkpoint_final.pth"
        assert read(final)[EXTENSION_KEY]["global_step"] == second  # a shorter epoch is over already
        assert not (run.folder / "checkpoint_latest.pth").exists()
        assert "Mean Validation Dice" in run.log()

    summary = run.folder / "validation" / "summary.json"
    summary.unlink()
    before = final.read_bytes()
    with Running(tiny, results, "", "--val") as run:
        assert run.exit_code() == 0, run.output.read_text()[-3000:]
    assert summary.is_file() and final.read_bytes() == before


@pytest.mark.slow
def test_a_signal_that_kills_the_loader_s_workers_too_ends_as_cleanly(tiny, tmp_path):
    """SLURM and Ctrl-C signal the whole process group, in which only the training itself waits for the next step."""
    results = tmp_path / "results"
    with Running(tiny, results, ENDLESS, workers=2) as run:
        run.wait_until_it_trains()
        os.killpg(run.process.pid, signal.SIGSTOP)
        run.process.send_signal(signal.SIGCONT)
        time.sleep(1)  # with the workers at a halt it soon waits for a batch, and is there when they die
        os.killpg(run.process.pid, signal.SIGTERM)
        os.killpg(run.process.pid, signal.SIGCONT)
        assert run.exit_code() == 143, run.output.read_text()[-3000:]
        done = run.latest_step()
        assert f"Stopped by SIGTERM in epoch 0 after {done} training steps" in run.log()

    with Running(tiny, results, ENDLESS.replace("100000", str(done + 2)), "--c", workers=2) as run:
        assert run.exit_code() == 0, run.output.read_text()[-3000:]
    assert read(run.folder / "checkpoint_final.pth")[EXTENSION_KEY]["global_step"] == done + 2
    assert (run.folder / "validation" / "summary.json").is_file()
