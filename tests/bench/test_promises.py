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

from nnunetv2_ext.bench.candidates import parse_candidates
from nnunetv2_ext.bench.plan import Target
from nnunetv2_ext.bench.session import Options, Session
from nnunetv2_ext.bench.targets import PROMISES, promised_step_ratio

TOLERANCE = 1.25
PATCH, FEATURES, BATCH_SIZE = [32, 40, 32], [8, 16, 32], 4  # half a batch of 4 is still not a single sample, see below
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    asked = "benchmark" in (request.config.getoption("-m") or "") or os.environ.get("NNUNETV2_EXT_BENCHMARK") == "1"
    if not asked:
        pytest.skip("a benchmark: run it with -m benchmark")


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_no_step_costs_a_quarter_more_than_promised(asked_for, tiny, tmp_path: Path, monkeypatch) -> None:
    for name, value in tiny.environment(tmp_path / "results").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("nnUNet_ext_settings")
    plans = tiny.plans()
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"], configuration["batch_size"] = PATCH, BATCH_SIZE
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = FEATURES
    file = tiny.preprocessed / tiny.name / "benchmark.json"
    file.write_text(json.dumps(plans | {"plans_name": "benchmark"}))
    labels = {label: label.partition(" ")[::2] for label in PROMISES}
    entries = [f"{name}:{full_settings(settings)}" if settings else name for name, settings in labels.values()]
    candidates = parse_candidates(entries)
    assert {c.label for c in candidates[1:]} == set(PROMISES)
    try:
        # one thread gives steady processor time; with it torch is slow on single samples, hence the batch size
        target = Target(tiny.name, "3d_fullres", "benchmark", device=DEVICE, threads=1)
        options = Options(rounds=5, steps_per_round=2, batches=("real",), resident=False)
        report = Session(target, candidates, options).run()
    finally:
        file.unlink()
    clock = "cpu" if DEVICE == "cpu" else "wall"
    for result in report.results[1:]:
        assert result.failure is None, result.failure
        ratio = report.step_ratio(result, "real", clock)
        promised = promised_step_ratio(result.label, DEVICE)
        print(f"{result.label}: {ratio}, promised {promised}")
        assert ratio is not None and promised is not None
        assert ratio.median <= promised * TOLERANCE, f"{result.label}: {ratio}, promised {promised}"


def full_settings(short: str) -> str:
    """``masked_fraction=0.5`` of a label -> ``medcontext.masked_fraction=0.5``, the one method with such promises."""
    return " ".join(f"medcontext.{pair}" for pair in short.split())
