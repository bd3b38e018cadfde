"""Regression guard: no trainer may cost 25 % more than its method promises (``promises`` in its ``outside.py``).

Measures time, so it is not part of the default run. Run it with

    pytest -m benchmark tests/bench        or        NNUNETV2_EXT_BENCHMARK=1 pytest tests/bench

On the CPU the ratio is that of processor time, which other work on the machine disturbs least; plain nnUNetTrainer is
measured in the same run.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.bench.candidates import Candidate, find_trainer, parse_candidates, promise_of
from nnunetv2_ext.bench.session import Options, Session
from nnunetv2_ext.bench.subject import Target
from nnunetv2_ext.core.outside import Promise, methods
from tests.conftest import TinyDataset, make_tiny_dataset
from tests.contract.data import with_model
from tests.rada.sparse_data import make_sparse_tiny

TOLERANCE = 1.25
PATCH, FEATURES, BATCH_SIZE = [32, 40, 32], [8, 16, 32], 4  # half a batch of 4 is still not a single sample, see below
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    asked = "benchmark" in (request.config.getoption("-m") or "") or os.environ.get("NNUNETV2_EXT_BENCHMARK") == "1"
    if not asked:
        pytest.skip("a benchmark: run it with -m benchmark")


TRAINERS = {name: trainer for method in methods().values() for name, trainer in method.trainers.items()}
PROMISES = {Candidate(n, settings): p for n, trainer in TRAINERS.items() for settings, p in trainer.promises.items()}
# without files to download: semantics=clip, the default, needs CLIP's weights
RADA = [c for c in PROMISES if c.trainer == "nnUNetTrainerRADA" and c.settings]
JRAS = [c for c in PROMISES if c.trainer == "nnUNetTrainerJRAS"]
WTBCP = [c for c in PROMISES if c.trainer == "nnUNetTrainerWTBCP"]
PEMMA = [c for c in PROMISES if c.trainer == "nnUNetTrainerPEMMA"]
OTHERS = [c for c in PROMISES if c.trainer != "nnUNetTrainerRADA" and c not in [*JRAS, *WTBCP, *PEMMA]]
# J-RAS' reader and RADA's semantic head have a fixed width. Beside a network of 8-16-32 features they weigh far more
# than in training (measured: RADA 4.9 x with learned vectors); the promise is about networks of nnU-Net's own width.
NNUNETS_FEATURES = [32, 64, 128]


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_no_trainer_costs_a_quarter_more_than_promised(asked_for, tiny, tmp_path: Path, monkeypatch) -> None:
    measure(tiny, OTHERS, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_jras_costs_no_quarter_more_than_promised(asked_for, tiny, tmp_path: Path, monkeypatch) -> None:
    parts = measure(tiny, JRAS, tmp_path, monkeypatch, features=NNUNETS_FEATURES, rounds=3)
    assert all({"guides", "read"} <= set(parts[candidate.label]) for candidate in JRAS)


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_rada_costs_no_quarter_more_than_promised(asked_for, tmp_path: Path, monkeypatch) -> None:
    """RADA trains on sparse labels only, and so does the plain trainer it is measured against."""
    # batches of 4 are drawn from labelled and unlabelled cases alike
    dataset = make_sparse_tiny(tmp_path / "sparse", labelled=6, test_share=0)
    measure(dataset, RADA, tmp_path, monkeypatch, features=NNUNETS_FEATURES, rounds=3)


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_wtbcp_costs_no_quarter_more_than_promised(asked_for, tiny, tmp_path: Path, monkeypatch) -> None:
    """There is no pool; patches of the training cases cost the same."""
    measure(tiny, WTBCP, tmp_path, monkeypatch, rounds=3, further="wtbcp.unlabelled=labelled")


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_pemma_costs_no_quarter_more_than_promised(asked_for, tmp_path: Path, monkeypatch) -> None:
    """Beside plain nnU-Net of both channels; the base is a model of the first one."""
    dataset = make_tiny_dataset(tmp_path / "extended", 8, channels=2)
    dataset = with_model(dataset, tmp_path / "model", "3d_fullres", benchmark_plans(dataset, NNUNETS_FEATURES))
    measure(dataset, PEMMA, tmp_path, monkeypatch, NNUNETS_FEATURES, rounds=3, further=f"pemma.base={dataset.model}")


def test_every_promise_is_guarded() -> None:
    assert {*OTHERS, *JRAS, *RADA, *WTBCP, *PEMMA} == set(PROMISES) - {Candidate("nnUNetTrainerRADA")}
    assert set(TRAINERS) <= set(installed_trainers()), "outside.py names a trainer that is not there"
    for method in (method for method in methods().values() if method.trainers):
        # a network of one's own costs what it costs, whatever the plan's network is
        if not any(trainer.off is not None or trainer.promises for trainer in method.trainers.values()):
            assert method.name in {"med2d", "photo"}
            continue
        assert any(trainer.promises for trainer in method.trainers.values()), f"{method.name} promises nothing"


@pytest.mark.parametrize("candidate", PROMISES, ids=lambda candidate: candidate.label)
def test_a_candidate_is_promised_what_its_method_promises(candidate: Candidate, monkeypatch) -> None:
    monkeypatch.delenv("nnUNet_ext_settings", raising=False)
    cls = find_trainer(candidate.trainer)
    assert promise_of(candidate, cls) == PROMISES[candidate]
    assert promise_of(Candidate(candidate.trainer, f"{candidate.settings} num_epochs=7".strip()), cls) == Promise()


def benchmark_plans(dataset: TinyDataset, features: list[int]) -> dict[str, Any]:
    """The dataset's plans with a larger patch and another network."""
    plans = dataset.plans() | {"plans_name": "benchmark"}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"], configuration["batch_size"] = PATCH, BATCH_SIZE
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = features
    return plans


def measure(
    dataset: TinyDataset,
    wanted: list[Candidate],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: list[int] = FEATURES,
    rounds: int = 5,
    steps_per_round: int = 2,
    further: str = "",
) -> dict[str, dict[str, float]]:
    """Bench these candidates and hold step, prediction and memory against what they promise; parts of each's step.

    They are measured with ``further`` settings, which change no cost.
    """
    for name, value in dataset.environment(tmp_path / "results").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("nnUNet_ext_settings")
    file = dataset.preprocessed / dataset.name / "benchmark.json"
    file.write_text(json.dumps(benchmark_plans(dataset, features)))
    candidates = parse_candidates([f"{c.trainer}:{c.settings} {further}" for c in wanted])
    assert candidates[1:] == [Candidate(c.trainer, f"{c.settings} {further}".strip()) for c in wanted]
    try:
        # one thread gives steady processor time; with it torch is slow on single samples, hence the batch size
        target = Target(dataset.name, "3d_fullres", "benchmark", device=DEVICE, threads=1)
        options = Options(rounds=rounds, steps_per_round=steps_per_round, batches=("real",), resident=False)
        report = Session(target, candidates, options).run()
    finally:
        file.unlink()
    clock = "cpu" if DEVICE == "cpu" else "wall"
    memory = "saved_tensors" if DEVICE == "cpu" else "allocator_peak"
    broken = []
    for candidate, result in zip(wanted, report.results[1:], strict=True):
        assert result.failure is None, result.failure
        promise = PROMISES[candidate]
        step, predict, missing = (report.ratio(result, what, clock) for what in ("real", "predict", "missing"))
        assert step is not None and predict is not None and (missing is None) == (promise.missing is None)
        for what, ratio, promised in (
            ("step", step.median, promise.step(DEVICE)),
            ("predict", predict.median, promise.predict),
            ("memory", report.memory_ratio(result, memory), promise.memory),
            *([("missing", missing.median, promise.missing)] if missing else []),
        ):
            assert ratio is not None and promised is not None
            line = f"{result.label}: {what} {ratio:.2f} x plain, promised {promised:g}"
            print(line)
            if ratio > promised * TOLERANCE:
                broken.append(line)
    assert not broken, broken
    return {result.label: result.parts for result in report.results}
