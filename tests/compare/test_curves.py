"""Learning curves from our table and from nnU-Net's log."""

import math

import numpy as np
import pytest

from nnunetv2_ext.compare import curves
from nnunetv2_ext.compare.arms import Arm, Repeat
from nnunetv2_ext.compare.runs import FoldRun
from tests.compare.conftest import EPOCHS, LOG


def fold(folder, facts=None) -> FoldRun:
    return FoldRun(folder, "0", folder, (), {}, facts or {})


def test_nnunets_log(tmp_path) -> None:
    (tmp_path / "training_log_2026_1_1_00_00_00.txt").write_text(LOG)
    curve = curves.read_curve(fold(tmp_path))
    assert curve.index.tolist() == [0, 1]
    assert curve["mean_fg_dice"].tolist() == pytest.approx([0.6, 0.7])
    assert curve["val_losses"].tolist() == pytest.approx([-0.2, -0.3])
    assert curve["hours"].tolist() == pytest.approx([9 / 3600, 18 / 3600])


def test_a_continued_training_replaces_the_epochs_it_repeats(tmp_path) -> None:
    (tmp_path / "training_log_2026_1_1_00_00_00.txt").write_text(LOG + "2026-01-01 10:00:22.000001: Epoch 2 \n")
    (tmp_path / "training_log_2026_1_2_00_00_00.txt").write_text(
        "2026-01-02 10:00:00.000001: Epoch 1 \n2026-01-02 10:00:00.000001: Pseudo dice [np.float32(0.9)] \n"
    )
    curve = curves.read_curve(fold(tmp_path))
    assert curve["mean_fg_dice"].tolist() == pytest.approx([0.6, 0.9])
    assert math.isnan(curve["val_losses"][1]) and curve.index.tolist() == [0, 1]


def test_our_table_comes_first(tmp_path) -> None:
    (tmp_path / "training_log_2026_1_1_00_00_00.txt").write_text(LOG)
    (tmp_path / "epochs.csv").write_text(EPOCHS)
    curve = curves.read_curve(fold(tmp_path))
    assert curve["mean_fg_dice"].tolist() == [0.4, 0.9]
    assert np.isnan(curve["val_losses"]).tolist() == [False, True]
    assert curve["hours"].iloc[-1] == pytest.approx(0.01)


def test_picture_and_duration(tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(curves.plot, "save", lambda figure, path: drawn.append(figure))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "epochs.csv").write_text(EPOCHS)
    facts = {"num_iterations_per_epoch": "5"}
    arm = Arm("x", [Repeat("seed 0", {"0": fold(tmp_path / "a", facts), "1": fold(tmp_path / "a", facts)})])
    empty = Arm("y", [Repeat("seed 0", {"0": fold(tmp_path)})])
    assert curves.training_hours(arm) == pytest.approx(0.01) and math.isnan(curves.training_hours(empty))
    assert curves.draw([arm, empty], tmp_path / "x.png", {"x": "C0", "y": "C1"})
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "optimiser step" and max(axes.lines[0].get_xdata()) == 10
    assert [line.get_label() for line in axes.lines if not line.get_label().startswith("_")] == ["x"]
    assert not curves.draw([empty], tmp_path / "y.png", {"y": "C0"}) and len(drawn) == 1
