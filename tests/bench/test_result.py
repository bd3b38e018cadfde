"""Ratios, and how they are shown."""

import json
from pathlib import Path

import pytest

from nnunetv2_ext.bench.chart import draw
from nnunetv2_ext.bench.report import as_text
from nnunetv2_ext.bench.result import Report, Result, Rounds
from nnunetv2_ext.core.outside import Promise

MED = "nnUNetTrainerMedContext"
FACTS = {
    "batch_size": 2, "patch_size": [16, 24, 16], "parameters": 1_500_000, "weights_dtype": "float32",
    "autocast_dtype": None, "compiled": False,
}  # fmt: skip
MACHINE = {
    "device": "cpu", "device_name": "a processor", "threads": 1, "cpus": 2, "torch": "2", "nnunetv2": "2.8.1",
    "nnunetv2_ext": "0", "date": "today", "load_average": [3.0, 0, 0],
}  # fmt: skip
OPTIONS = {
    "dataset": "Dataset001_x", "configuration": "3d_fullres", "plans_name": "tiny", "fold": 0, "rounds": 3,
    "steps_per_round": 4, "warm_up": 2, "batches": ("real",),
}  # fmt: skip


@pytest.fixture
def report() -> Report:
    """Rounds in which the machine slows down threefold, and a trainer that takes 2, 2 and 3 times as long."""
    plain = Result("nnUNetTrainer", "nnUNetTrainer", facts=FACTS, memory={"saved_tensors": 1000, "resident_peak": 5000})
    plain.steps["real"] = Rounds([0.1, 0.2, 0.3], [0.1, 0.1, 0.1])
    plain.predict = Rounds([0.01] * 3, [0.01] * 3)
    plain.parts = {"forward": 0.03, "backward": 0.06, "other": 0.01}
    med = Result(
        MED,
        MED,
        promise=Promise(cpu=2.4, predict=1.05, memory=1.05, missing=1.02),
        facts=FACTS,
        memory={"saved_tensors": 1100, "resident_peak": 5100},
    )
    med.steps["real"] = Rounds([0.2, 0.4, 0.9], [0.24, 0.23, 0.25])
    med.predict = Rounds([0.01] * 3, [0.01] * 3)
    med.parts = {"forward": 0.06, "backward": 0.12, "teacher": 0.03, "other": 0.01}
    broken = Result("nnUNetTrainerBig", "nnUNetTrainerBig", failure="out of memory: 8 GiB")
    broken.steps["real"] = Rounds([0.5], [0.5])
    return Report(MACHINE, OPTIONS, [plain, med, broken])


def test_ratios_are_paired_by_round(report: Report) -> None:
    assert report.ratio(report.results[1], "real") == pytest.approx((2, 2, 3))
    assert report.ratio(report.results[1], "real", "cpu") == pytest.approx((2.4, 2.3, 2.5))
    assert report.memory_ratio(report.results[1], "saved_tensors") == pytest.approx(1.1)


def test_no_ratio_where_a_trainer_stopped_half_way(report: Report) -> None:
    assert report.ratio(report.results[2], "real") is None
    assert (
        report.ratio(report.results[2], "predict") is None
        and Report({}, {}, [Result("a", "a")] * 2).ratio(Result("b", "b"), "real") is None
    )


def test_the_text_answers_what_it_costs(report: Report) -> None:
    text = as_text(report)
    row = next(line for line in text.splitlines() if line.startswith(f"| {MED}"))
    assert all(cell in row for cell in ("400.0 ms", "(200.0 .. 900.0)", "2.00", "2.40", "<= 2.4", " 5"))
    prediction = text[text.index("Prediction, network") :].split("\n\n")[0]
    assert prediction.splitlines()[-1].endswith("<= 1.05 |") and "<=" not in prediction.splitlines()[-2]
    assert "FAILED nnUNetTrainerBig: out of memory: 8 GiB" in text
    short = next(line for line in text.splitlines() if line.startswith(f"- {MED}: "))
    assert "a step takes 2.40 times as long as plain nnU-Net's (promised 2.4: kept)" in short
    assert "prediction takes 1.00 times as long (promised 1.05: kept)" in short
    assert "a step takes 1.10 times the memory (promised 1.05: MISSED here)" in short
    assert "added channel" not in text and short.endswith("; 27.8 h instead of 13.9 h.")
    report.results[1].missing = Rounds([0.01] * 3, [0.011] * 3)
    text = as_text(report)
    assert "1.10 without the added channel (promised 1.02: MISSED here)" in text
    added = text[text.index("Prediction, patch without the added channel") :].split("\n\n")[0]
    assert added.splitlines()[-1].endswith("<= 1.02 |") and "nnUNetTrainer " not in added
    report.results[1].steps["real"].cpu[:] = [0.3] * 3
    assert "3.00 times as long as plain nnU-Net's (promised 2.4: MISSED here)" in as_text(report)
    assert "teacher" in text and "30.0 ms  14%" in text
    assert "patch 16 x 24 x 16, batch size 2, 1.50 M parameters, precision float32, compiled: none" in text
    assert "load 3.0 on 2 CPUs" in text and "slower algorithm" in text


def test_another_batch_size_is_pointed_out(report: Report) -> None:
    assert "batches of" not in as_text(report)
    report.results[1].facts = FACTS | {"batch_size": 4}
    assert f"{MED} steps on batches of 4" in as_text(report)


def test_json_holds_rounds_and_ratios(report: Report) -> None:
    content = json.loads(json.dumps(report.as_dict()))
    assert content["results"][1]["steps"]["real"]["wall"] == [0.2, 0.4, 0.9]
    assert content["results"][1]["ratios"]["step"]["real"]["wall"]["median"] == pytest.approx(2)
    promised = {"cpu": 2.4, "cuda": None, "memory": 1.05, "predict": 1.05, "missing": 1.02}
    assert content["results"][1]["promise"] == promised
    assert content["results"][2]["failure"] and content["machine"]["torch"] == "2"


def test_without_the_baseline_the_others_are_still_shown(report: Report, tmp_path: Path) -> None:
    report.results[0].failure, report.results[0].steps = "out of memory", {}
    assert "400.0 ms" in as_text(report)
    draw(report, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_chart_of_nothing_is_refused(report: Report, tmp_path: Path) -> None:
    report.results = report.results[2:]
    with pytest.raises(ValueError, match="no trainer"):
        draw(report, tmp_path / "chart.png")
