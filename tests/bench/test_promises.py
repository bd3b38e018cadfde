"""Regression guard: no trainer may cost 25 % more than its method promises (``nnunetv2_ext/bench/targets.py``).

Measures time, so it is not part of the default run. Run it with

    pytest -m benchmark tests/bench        or        NNUNETV2_EXT_BENCHMARK=1 pytest tests/bench

On the CPU the ratio is that of processor time, which other work on the machine disturbs least; plain nnUNetTrainer is
measured in the same run.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from nnunetv2_ext import installed_trainers
from nnunetv2_ext.bench.candidates import parse_candidates
from nnunetv2_ext.bench.plan import Target
from nnunetv2_ext.bench.session import Options, Session
from nnunetv2_ext.bench.targets import PROMISES, promised_ratio, promised_step_ratio
from nnunetv2_ext.jras.settings import JRASSettings
from tests.conftest import TinyDataset
from tests.rada.sparse_data import make_sparse_tiny

TOLERANCE = 1.25
PATCH, FEATURES, BATCH_SIZE = [32, 40, 32], [8, 16, 32], 4  # half a batch of 4 is still not a single sample, see below
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    asked = "benchmark" in (request.config.getoption("-m") or "") or os.environ.get("NNUNETV2_EXT_BENCHMARK") == "1"
    if not asked:
        pytest.skip("a benchmark: run it with -m benchmark")


# without files to download: semantics=clip needs CLIP's weights
RADA = [label for label in PROMISES if "RADA" in label and "semantics=" in label]
JRAS = [label for label in PROMISES if label.startswith("nnUNetTrainerJRAS")]
OTHERS = [label for label in PROMISES if "RADA" not in label and label not in JRAS]
# J-RAS' retriever and guide encoder and RADA's semantic head have a fixed width. Beside a network of 8-16-32 features
# they weigh far more than in training (measured: J-RAS 1.66 x plain, RADA 4.9 x with learned vectors); the promise is
# about networks of nnU-Net's own width.
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
    # every round holds the contrastive pass, which is not in every step, as often as training does
    period = JRASSettings().contrastive_every
    parts = measure(tiny, JRAS, tmp_path, monkeypatch, features=NNUNETS_FEATURES, rounds=3, steps_per_round=period)
    assert all({"lookup", "contrastive"} <= set(parts[label]) for label in JRAS)


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_rada_costs_no_quarter_more_than_promised(asked_for, tmp_path: Path, monkeypatch) -> None:
    """RADA trains on sparse labels only, and so does the plain trainer it is measured against."""
    # batches of 4 are drawn from labelled and unlabelled cases alike
    dataset = make_sparse_tiny(tmp_path / "sparse", labelled=6, test_share=0)
    measure(dataset, RADA, tmp_path, monkeypatch, features=NNUNETS_FEATURES, rounds=3)


def test_every_promise_is_guarded() -> None:
    assert {*OTHERS, *JRAS, *RADA} == set(PROMISES) - {"nnUNetTrainerRADA"}  # the default needs CLIP's weights
    without = {"nnUNetTrainerMedContextJRAS", "nnUNetTrainerExt"}  # a combination, and plain nnU-Net
    assert {label.split()[0] for label in PROMISES} >= set(installed_trainers()) - without


def measure(
    dataset: TinyDataset,
    labels: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: list[int] = FEATURES,
    rounds: int = 5,
    steps_per_round: int = 2,
) -> dict[str, dict[str, float]]:
    """Bench these candidates and hold step, prediction and memory against what they promise; parts of each's step."""
    for name, value in dataset.environment(tmp_path / "results").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("nnUNet_ext_settings")
    plans = dataset.plans()
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"], configuration["batch_size"] = PATCH, BATCH_SIZE
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = features
    file = dataset.preprocessed / dataset.name / "benchmark.json"
    file.write_text(json.dumps(plans | {"plans_name": "benchmark"}))
    candidates = parse_candidates([full_entry(label) for label in labels])
    assert [c.label for c in candidates[1:]] == labels
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
    for result in report.results[1:]:
        assert result.failure is None, result.failure
        step, predict = report.step_ratio(result, "real", clock), report.predict_ratio(result, clock)
        assert step is not None and predict is not None
        for what, ratio, promised in (
            ("step", step.median, promised_step_ratio(result.label, DEVICE)),
            ("predict", predict.median, promised_ratio(result.label, "predict")),
            ("memory", report.memory_ratio(result, memory), promised_ratio(result.label, "memory")),
        ):
            assert ratio is not None and promised is not None
            line = f"{result.label}: {what} {ratio:.2f} x plain, promised {promised:g}"
            print(line)
            if ratio > promised * TOLERANCE:
                broken.append(line)
    assert not broken, broken
    return {result.label: result.parts for result in report.results}


def full_entry(label: str) -> str:
    """``nnUNetTrainerX key=value`` of a label -> ``nnUNetTrainerX:method.key=value`` of the command line."""
    name, _, settings = label.partition(" ")
    method = name.removeprefix("nnUNetTrainer").lower()
    return f"{name}:{' '.join(f'{method}.{pair}' for pair in settings.split())}" if settings else name
