"""The two ways to new weights: a training, and the last layer in closed form."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunetv2_ext.adapt.head import Head, Sums, joined, solve
from nnunetv2_ext.adapt.score import read_preprocessed
from nnunetv2_ext.adapt.segments import Weights, quiet
from nnunetv2_ext.adapt.training import EPOCHS
from nnunetv2_ext.core.checkpoint import read
from nnunetv2_ext.core.files import atomic_torch_save
from nnunetv2_ext.core.outside import load_trainer
from nnunetv2_ext.core.progress import progress_bar
from nnunetv2_ext.core.settings import PLANS_KEY
from nnunetv2_ext.core.sources import ENVIRONMENT_VARIABLE
from nnunetv2_ext.data.find import PREPROCESSED, RESULTS

if TYPE_CHECKING:
    from nnunetv2_ext.adapt.adaptation import Job

TRAINER = "nnUNetTrainerAdapt"
_KEPT = ("training_log_*.txt", "epochs.csv", "progress*.png", "panel_*.png")  # of a training
# settings that a user may not set
_OWN = ("init_from", "train_cases", "adapt.not_drawn", "adapt.old_data", "adapt.old_cases", "adapt.old_previous_stage")


class Trained:
    """Weights by training; each training is a folder of results that ``--c`` goes on with."""

    def __init__(self, job: Job, fold: str, replayed: Sequence[str]) -> None:
        self.job, self.fold, self.replayed = job, fold, list(replayed)
        self.source = job.work / "source" / f"fold_{fold}.pth"
        if not self.source.is_file():
            self.source.parent.mkdir(exist_ok=True)
            atomic_torch_save(job.model.checkpoint(fold), self.source)

    def weights(self, cases: Sequence[str], name: str) -> Weights:
        """Of the model trained on these given cases."""
        job = self.job
        root = self._root(name)
        finished = list(root.glob("*/*/fold_all/checkpoint_final.pth"))
        if not finished:
            started = time.monotonic()
            with environment({PREPROCESSED: str(job.work / "preprocessed"), RESULTS: str(root)}):
                with quiet(job.work):
                    trainer = self._trainer(cases)
                    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
                    if latest.is_file():
                        trainer = self._trainer(cases, continued=True)
                        trainer.load_checkpoint(str(latest))
                said = f"fold {self.fold}, {name}"
                job.say(f"{said}: training on {len(cases)} cases; to stop: touch {trainer.output_folder}/stop")
                with quiet(job.work):
                    trainer.run_training()
                job.say(f"{said}: {trainer.global_step} steps in {time.monotonic() - started:.0f} s")
            finished = [Path(trainer.output_folder) / "checkpoint_final.pth"]
            del trainer
        return {key: value.clone() for key, value in read(finished[0])["network_weights"].items()}

    def _trainer(self, cases: Sequence[str], continued: bool = False) -> Any:
        job, request = self.job, self.job.request
        # a class lacking from these cases may be in the case that is left out
        absent = set(job.model.structures) - set().union(*(job.drawn[case] for case in cases))
        epochs = max(number for number in range(1, EPOCHS + 1) if request.steps % number == 0)
        block: dict[str, Any] = {
            "num_epochs": epochs,
            "num_iterations_per_epoch": request.steps // epochs,
            "initial_lr": request.rate,
            "mirroring": job.model.mirror_axes is not None,
            "init_from": str(self.source),
            "train_cases": list(cases),
            "adapt.not_drawn": list(dict.fromkeys([*job.not_drawn, *sorted(absent)])),
        }
        if job.old is not None and job.replay and self.replayed:
            block |= {
                "adapt.replay": job.replay,
                "adapt.old_data": str(job.old.data.folder),
                "adapt.old_cases": self.replayed,
                "adapt.old_previous_stage": None if job.old.previous is None else str(job.old.previous),
            }
        plans = json.loads(json.dumps(job.model.plans.plans)) | {PLANS_KEY: block, "continue_training": continued}
        name, base = TRAINER, job.model.trainer
        ours = load_trainer(name)
        # what nnU-Net's variant does in training and how it builds its network
        cls = ours if issubclass(ours, base) else type(name, (ours, base), {})
        trainer = cls(plans, job.model.configuration_name, "all", job.dataset_json, job.device)
        for key in block:
            if trainer.resolved.sources.get(key) == ENVIRONMENT_VARIABLE and key in _OWN:
                raise ValueError(f"{ENVIRONMENT_VARIABLE} sets {key}, which adapt decides: unset it")
        if job.previous is not None:
            trainer.folder_with_segs_from_previous_stage = str(job.previous)
        return trainer

    def _root(self, name: str) -> Path:
        return self.job.work / "training" / f"fold_{self.fold}" / name

    def keep(self, target: Path) -> None:
        """Copy log, curves and pictures of the final training."""
        target.mkdir(parents=True, exist_ok=True)
        for pattern in _KEPT:
            for file in self._root("final").glob(f"*/*/fold_all/{pattern}"):
                shutil.copyfile(file, target / file.name)

    def forget(self, name: str) -> None:
        """Remove a training that nobody needs any more."""
        shutil.rmtree(self._root(name), ignore_errors=True)


class Solved:
    """Weights by ridge regression; the sums of each case are taken once."""

    def __init__(self, job: Job, before: Weights, replayed: Sequence[str]) -> None:
        self.job, self.before = job, before
        network = job.model.network()
        network.load_state_dict(before)
        self.head = Head(network.to(job.device), job.model.labels, job.hidden)
        self.old_head = Head(self.head.network, job.model.labels, ())
        names = [given.case for given in job.cases]
        self.sums = {name: self._sums(self.head, job.folder, name, job.previous) for name in progress_bar(names)}
        self.old: Sums | None = None
        if job.old is not None and job.replay and replayed:
            few = _spread(replayed, max(len(names), 10))  # as many old cases again: seconds, not minutes
            folder, previous = job.old.data.folder, job.old.previous
            self.old = joined([self._sums(self.old_head, folder, c, previous) for c in progress_bar(few)])

    def _sums(self, head: Head, folder: Path, case: str, previous: Path | None) -> Sums:
        image, label, _ = read_preprocessed(folder, case, self.job.model, previous)
        return head.sums(image, label, self.job.model.configuration.patch_size, self.job.device)

    def weights(self, cases: Sequence[str], name: str) -> Weights:
        """Of the model whose last layer was fitted to these given cases."""
        new = joined([self.sums[case] for case in cases])
        solution = solve(new, self.head.before(self.before), self.old, self.job.replay)
        return self.head.weights(self.before, solution)

    def keep(self, target: Path) -> None:
        """There is no log."""
        target.parent.mkdir(parents=True, exist_ok=True)

    def forget(self, name: str) -> None:
        """Nothing was written."""


def _spread(names: Sequence[str], number: int) -> list[str]:
    """So many of them, evenly."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(number, len(names))).round().astype(int))]


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """With these variables, which nnU-Net reads when it uses them."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
