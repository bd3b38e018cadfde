"""A tiny dataset, planned and preprocessed once per test session, and trainers on it."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nnunetv2_ext.phantom import write_phantom_dataset

PATCH_3D, PATCH_2D, FEATURES = [16, 24, 16], [24, 24], [4, 8, 16]
STRIDES = {2: [[1, 1], [2, 2], [2, 2]], 3: [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}


@dataclass(frozen=True)
class TinyDataset:
    """Folders of a preprocessed phantom dataset; ``dataset_id`` in ``raw``, plans named ``tiny``.

    Where a ``model`` of its first channels belongs to it, ``{model}`` in settings stands for that model's folder.
    """

    root: Path
    dataset_id: int
    name: str
    model: Path | None = None

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed"

    @property
    def images_ts(self) -> Path:
        return self.raw / self.name / "imagesTs"

    def environment(self, results: Path, settings: str = "") -> dict[str, str]:
        """Environment of a subprocess or of this process."""
        return {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(results),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "nnUNet_ext_settings": settings.replace("{model}", str(self.model)),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # nnU-Net sets as many threads as cores; spinning ones starve parallel tests
        }

    def plans(self) -> dict[str, Any]:
        return json.loads((self.preprocessed / self.name / "tiny.json").read_text())

    def dataset_json(self) -> dict[str, Any]:
        return json.loads((self.preprocessed / self.name / "dataset.json").read_text())


def run_command(command: list[str], environment: dict[str, str], cwd: Path, check: bool = True, timeout: int = 240):
    """Run one of nnU-Net's or our console commands by the interpreter of this test, from ``cwd``."""
    executable = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [str(executable), *command[1:]],
        env={**os.environ, **environment},
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done


def shrink(plans: dict[str, Any]) -> dict[str, Any]:
    """A copy of nnU-Net's plans with a network and patch that train in milliseconds; preprocessed data are shared."""
    plans = json.loads(json.dumps(plans))
    plans["plans_name"] = "tiny"
    for configuration in plans["configurations"].values():
        if "architecture" not in configuration:
            continue
        kwargs = configuration["architecture"]["arch_kwargs"]
        dim = len(configuration["patch_size"])
        configuration["patch_size"] = PATCH_2D if dim == 2 else PATCH_3D
        configuration["batch_size"] = 2
        stages = len(FEATURES)
        kwargs.update(n_stages=stages, features_per_stage=FEATURES, strides=STRIDES[dim])
        kwargs.update(kernel_sizes=[[3] * dim] * stages)
        for key, length in (
            ("n_conv_per_stage", stages),
            ("n_blocks_per_stage", stages),
            ("n_conv_per_stage_decoder", stages - 1),
        ):
            if key in kwargs:
                kwargs[key] = [1] * length
    return plans


@pytest.fixture(scope="session", autouse=True)
def no_forked_pool() -> Iterator[None]:
    """nnU-Net matches file names in forked processes; forked from a process with threads, some of them never end."""
    from nnunetv2.utilities import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "Pool", ThreadPool, raising=False)
        yield


@contextmanager
def in_this_process(dataset: TinyDataset) -> Iterator[tuple[Any, pytest.MonkeyPatch]]:
    """nnU-Net's planning API, with threads for its spawned workers: those take ten times as long as all the work."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    environment = dataset.environment(dataset.root / "results") | {"nnUNet_n_proc_DA": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        patch.setattr(multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=ThreadPool))
        yield api, patch


def plan_and_preprocess(dataset: TinyDataset, configurations: tuple[str, ...] = ("3d_fullres",)) -> None:
    """As nnU-Net's command does, with its integrity check; adds the plans ``tiny``."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    with in_this_process(dataset) as (api, patch):
        analyse = DatasetFingerprintExtractor.analyze_case
        # nnU-Net draws 1e8 intensities however small the dataset is: seconds and a gigabyte
        patch.setattr(DatasetFingerprintExtractor, "analyze_case", lambda *case: analyse(*case[:3], 1000))
        api.extract_fingerprints([dataset.dataset_id], num_processes=1, check_dataset_integrity=True)
        api.plan_experiments([dataset.dataset_id])
        api.preprocess([dataset.dataset_id], configurations=configurations, num_processes=(1,) * len(configurations))
    base = dataset.preprocessed / dataset.name
    plans = json.loads((base / "nnUNetPlans.json").read_text())
    (base / "tiny.json").write_text(json.dumps(shrink(plans)))


def make_tiny_dataset(
    root: Path, dataset_id: int = 1, configurations: tuple[str, ...] = ("2d", "3d_fullres"), **phantom: Any
) -> TinyDataset:
    """Write, plan and preprocess a phantom dataset; fold 0 validates on the first two cases, fold 1 on the last two."""
    options = {"num_train": 6, "num_test": 2, "shape": (24, 32, 24), "num_organs": 2, **phantom}
    folder = write_phantom_dataset(root / "raw", dataset_id, **options)
    dataset = TinyDataset(root, dataset_id, folder.name)
    plan_and_preprocess(dataset, configurations)
    names = sorted(p.name.removesuffix(".nii.gz") for p in (root / "raw" / dataset.name / "labelsTr").iterdir())
    splits = [{"train": names[2:], "val": names[:2]}, {"train": names[:-2], "val": names[-2:]}]
    (dataset.preprocessed / dataset.name / "splits_final.json").write_text(json.dumps(splits))
    return dataset


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Two organs, 6 training cases (fold 0: 4 to train, 2 to validate), 2 test cases."""
    return make_tiny_dataset(tmp_path_factory.mktemp("tiny"))


TRAINER_SETTINGS = "num_epochs=2 num_iterations_per_epoch=3 num_val_iterations_per_epoch=1 panel_every=0"


@pytest.fixture
def make_trainer(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """``make_trainer(cls, "key=value ...", configuration=, continued=, plans=)`` on the tiny dataset, unless given.

    Results are in tmp_path.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def make(
        cls: type,
        settings: str = "",
        configuration: str = "3d_fullres",
        continued: bool = False,
        plans: dict[str, Any] | None = None,
        dataset: TinyDataset | None = None,
        fold: int = 0,
        results: Path | None = None,
    ) -> Any:
        dataset = dataset or request.getfixturevalue("tiny")  # made only if it is wanted: that takes a while
        keys = {pair.split("=")[0] for pair in settings.split()}
        base = " ".join(pair for pair in TRAINER_SETTINGS.split() if pair.split("=")[0] not in keys)
        for key, value in dataset.environment(results or tmp_path / "results", f"{base} {settings}").items():
            monkeypatch.setenv(key, value)
        plans = json.loads(json.dumps(plans or dataset.plans()))
        plans["continue_training"] = continued
        return cls(plans, configuration, fold, dataset.dataset_json(), torch.device("cpu"))

    yield make
    torch.set_num_threads(threads)


def random_batches(trainer: Any, number: int, seed: int = 0, size: int = 2, labels: int = 3) -> list[dict]:
    """``number`` batches of noise and random labels, as nnU-Net's loader hands them out."""
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(seed)
    patch = trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales() or [[1] * len(patch)]
    keys = np.array([f"case_{letter}" for letter in "abcdefgh"[:size]])
    batches = []
    for _ in range(number):
        data = torch.randn(size, trainer.num_input_channels or 1, *patch, generator=generator)
        shapes = [[round(p * s) for p, s in zip(patch, scale)] for scale in scales]
        target = [torch.randint(0, labels, (size, 1, *s), generator=generator).to(torch.int16) for s in shapes]
        batches.append({"data": data, "target": target if trainer.enable_deep_supervision else target[0], "keys": keys})
    return batches


@pytest.fixture(scope="session")
def fixed_batches() -> Callable[..., list[dict]]:
    """``fixed_batches(trainer, number, seed=, size=, labels=)``: the same for all trainers of one configuration."""
    return random_batches


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without progress.png and progress_ext.png, which cost more than a tiny epoch."""
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    from nnunetv2_ext.core.logs import EpochLog

    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)
    monkeypatch.setattr(EpochLog, "plot", lambda self, path=None: None)
