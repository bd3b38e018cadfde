"""The extension's log beside nnU-Net's own: table, resume, plot, TensorBoard, progress bar."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunetv2_ext.core import logs
from nnunetv2_ext.core.files import atomic_torch_save
from nnunetv2_ext.core.logs import EpochLog
from nnunetv2_ext.core.progress import progress_bar


def nnunet_epoch(logger, epoch, start=None):
    """What nnUNetTrainer logs in one epoch, in its order, with numbers that binary floats hold exactly."""
    start = 100.0 * epoch if start is None else start
    logger.log("epoch_start_timestamps", start, epoch)
    logger.log("lrs", 0.5 / (epoch + 1), epoch)
    logger.log("train_losses", np.float32(0.25) - epoch, epoch)
    logger.log("mean_fg_dice", np.float64(0.5), epoch)
    logger.log("dice_per_class_or_region", [np.float64(0.75), np.float64(0.25)], epoch)
    logger.log("val_losses", 0.125, epoch)


def pair(folder, **options):
    logger = MetaLogger(str(folder), resume=False)
    log = EpochLog(folder, **options)
    logger.loggers.append(log)
    return logger, log


def run_epochs(logger, log, epochs, clock=0.0):
    for epoch in epochs:
        nnunet_epoch(logger, epoch, start=clock)
        log.add({"loss/clean": torch.tensor(1.5 - epoch), "loss/consistency": 0.1}, epoch)
        if epoch == 1:
            log.add({"teacher/momentum": 0.75}, epoch)
        logger.log("epoch_end_timestamps", clock + 60.5, epoch)
        log.end_epoch(epoch)
        clock += 60.5


def test_table_holds_nnunets_figures_and_ours(tmp_path):
    logger, log = pair(tmp_path)
    run_epochs(logger, log, range(2))
    assert (tmp_path / "epochs.csv").read_text() == (
        "epoch,lrs,train_losses,mean_fg_dice,ema_fg_dice,dice_per_class_or_region/class_1,"
        "dice_per_class_or_region/class_2,val_losses,loss/clean,loss/consistency,epoch_seconds,teacher/momentum\n"
        "0,0.5,0.25,0.5,0.5,0.75,0.25,0.125,1.5,0.1,60.5,\n"
        "1,0.25,-0.75,0.5,0.5,0.75,0.25,0.125,0.5,0.1,60.5,0.75\n"
    )


def test_nnunets_own_plot_and_checkpoint_are_as_without_us(tmp_path):
    logger, log = pair(tmp_path)
    run_epochs(logger, log, range(2))
    plain = MetaLogger(str(tmp_path), resume=False)
    run_epochs(plain, EpochLog(tmp_path, enabled=False), range(2))
    assert logger.get_checkpoint() == plain.get_checkpoint()
    log.plot()
    logger.plot_progress_png(str(tmp_path))
    assert imread(tmp_path / "progress.png").shape[:2] == (5400, 3000)
    assert (tmp_path / "progress_ext.png").exists()


def test_floats_keep_every_digit_and_odd_values_are_written(tmp_path):
    log = EpochLog(tmp_path)
    log.add({"third": 1 / 3, "single": np.float32(0.1), "count": np.int64(7), "bad": float("nan"), "far": 1e400}, 0)
    log.add({"ok, really": torch.tensor([2.0], dtype=torch.bfloat16)}, 0)
    log.end_epoch(0)
    assert (tmp_path / "epochs.csv").read_text() == (
        'epoch,third,single,count,bad,far,"ok, really"\n0,0.3333333333333333,0.10000000149011612,7,nan,inf,2.0\n'
    )


def test_what_is_no_number_is_left_out_and_told_once(tmp_path):
    told = []
    log = EpochLog(tmp_path, warn=told.append)
    for epoch in range(2):
        log.add({"a": 1.0, "vector": torch.zeros(2), "text": "x", "none": None, "epoch": 5}, epoch)
        log.end_epoch(epoch)
    assert (tmp_path / "epochs.csv").read_text() == "epoch,a\n0,1.0\n1,1.0\n"
    assert len(told) == 4
    assert any("'vector'" in line and "Tensor" in line for line in told)
    assert any("'epoch'" in line and "taken" in line for line in told)


def test_a_figure_named_twice_keeps_the_later_value(tmp_path):
    log = EpochLog(tmp_path)
    log.add({"a": 1, "b": 2}, 0)
    log.add({"a": 3}, 0)
    log.end_epoch(0)
    assert (tmp_path / "epochs.csv").read_text() == "epoch,a,b\n0,3,2\n"


@pytest.mark.parametrize("killed_after_row", [True, False])
def test_interrupted_and_continued_run_writes_the_same_table(tmp_path, killed_after_row):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    run_epochs(*pair(straight), range(5))

    logger, log = pair(broken)
    run_epochs(logger, log, range(3))
    # The checkpoint says "continue at epoch 3"; the run gets on to the middle or the end of epoch 4 before it dies.
    atomic_torch_save(log.state_dict(), broken / "state.pth")
    run_epochs(logger, log, [3], clock=9000.0)
    nnunet_epoch(logger, 4)
    log.add({"only in the lost epoch": 1.0}, 4)
    if killed_after_row:
        log.end_epoch(4)

    again, log = pair(broken)
    log.load_state_dict(torch.load(broken / "state.pth", weights_only=True), current_epoch=3)
    again.local_logger.my_fantastic_logging = {
        key: values[:3] for key, values in logger.local_logger.my_fantastic_logging.items()
    }
    run_epochs(again, log, range(3, 5))
    assert (broken / "epochs.csv").read_text() == (straight / "epochs.csv").read_text()


def test_rows_of_an_unfinished_epoch_in_the_checkpoint_are_dropped(tmp_path):
    log = EpochLog(tmp_path)
    for epoch in range(3):
        log.add({"a": float(epoch)}, epoch)
    state = log.state_dict()
    assert sorted(state["rows"]) == [0, 1, 2]
    log.add({"a": 99.0}, 0)  # the state is a copy

    resumed = EpochLog(tmp_path)
    resumed.load_state_dict(state, current_epoch=2)
    resumed.add({"b": 5.0}, 2)
    resumed.end_epoch(2)
    assert (tmp_path / "epochs.csv").read_text() == "epoch,a,b\n0,0.0,\n1,1.0,\n2,,5.0\n"


def test_loading_an_old_checkpoint_for_validation_leaves_the_table_alone(tmp_path):
    log = EpochLog(tmp_path)
    log.add({"a": 1.0}, 0)
    state = log.state_dict()
    log.end_epoch(0)
    log.add({"a": 2.0}, 1)
    log.end_epoch(1)
    before = (tmp_path / "epochs.csv").read_text()
    validation = EpochLog(tmp_path)
    validation.load_state_dict(state, current_epoch=1)
    validation.log_summary("final_val/foreground_dice", 0.9)
    assert (tmp_path / "epochs.csv").read_text() == before
    assert validation.summary == {"final_val/foreground_dice": 0.9}


def test_state_of_a_plain_checkpoint_is_empty_and_that_of_a_newer_version_refused(tmp_path):
    log = EpochLog(tmp_path)
    log.load_state_dict({}, current_epoch=7)
    log.add({"a": 1.0}, 7)
    log.end_epoch(7)
    assert (tmp_path / "epochs.csv").read_text() == "epoch,a\n7,1.0\n"
    with pytest.raises(ValueError, match=r"format 99.*pip install -U"):
        log.load_state_dict({"version": 99}, current_epoch=0)


def test_other_ranks_write_nothing(tmp_path):
    log = EpochLog(tmp_path, enabled=False)
    run_epochs(MetaLogger(str(tmp_path), resume=False), log, range(1))
    log.log("lrs", 0.5, 0)
    log.log_summary("final_val/foreground_dice", 0.9)
    log.plot()
    log.load_state_dict({"version": 1, "rows": {0: {"a": 1.0}}}, current_epoch=1)
    assert log.state_dict()["rows"] == {}
    assert list(tmp_path.iterdir()) == []


def test_table_that_cannot_be_written_is_told_and_made_up_for(tmp_path):
    told = []
    folder = tmp_path / "fold_0"
    log = EpochLog(folder, warn=told.append)
    log.add({"a": 1.0}, 0)
    log.end_epoch(0)  # the folder does not exist
    assert len(told) == 1
    assert "epochs.csv" in told[0]
    assert "training goes on" in told[0]
    folder.mkdir()
    log.add({"a": 2.0}, 1)
    log.end_epoch(1)
    assert (folder / "epochs.csv").read_text() == "epoch,a\n0,1.0\n1,2.0\n"
    assert len(told) == 1


# ---- plot


def capture_axes(monkeypatch):
    """Let `plot` draw as usual and hand over the axes of the finished figure."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return lambda: {axes.get_title(): axes for axes in figures[-1].axes}


def filled(folder, figures, **options):
    """A log of one epoch per value; None means that the epoch does not have the figure."""
    log = EpochLog(folder, **options)
    for epoch in range(max(map(len, figures.values()))):
        log.add({name: v[epoch] for name, v in figures.items() if v[epoch] is not None}, epoch)
        log.end_epoch(epoch)
    return log


def test_figures_of_one_group_share_a_panel(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    filled(
        tmp_path,
        {
            "train_losses": [0.5, 0.25],
            "loss/clean": [0.5, -0.5],
            "val_losses": [0.75, 0.5],
            "loss/masked": [1.0, 0.0],
            "ramp": [0.0, 1.0],
        },
    ).plot()
    panels = axes()
    assert list(panels) == ["loss (nnU-Net)", "loss", "ramp"]
    assert [line.get_ydata().tolist() for line in panels["loss"].lines] == [[0.5, -0.5], [1.0, 0.0]]
    assert [text.get_text() for text in panels["loss"].get_legend().get_texts()] == ["clean  -0.5", "masked  0"]
    assert len(panels["loss (nnU-Net)"].lines) == 2
    assert all(panel.get_xlabel() == "epoch" for panel in panels.values())
    assert imread(tmp_path / "progress_ext.png").std() > 0.01


def test_figures_of_different_units_have_panels_of_their_own(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    figures = {
        "rada/gate_1": [0.1, 0.2],
        "rada/kept_share": [0.5, 0.6],
        "rada/gate_2": [0.2, 0.2],
        "lrs": [0.01, 0.009],
    }
    filled(tmp_path, {**figures, "jras/lookup_ms": [2.0, 3.0], "jras/b0": [0.4, 0.3]}).plot()
    panels = axes()
    assert list(panels) == ["rada/gate", "rada/kept_share", "learning rate", "jras/lookup_ms", "jras/b0"]
    assert [len(panel.lines) for panel in panels.values()] == [2, 1, 1, 1, 1]


def test_healthy_ranges_are_bands_of_their_figure_alone(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    figures = {"medcontext/disagreement": [0.3, 0.1], "medcontext/ramp": [0.3, 1.0]}
    filled(tmp_path, figures, title="Dataset004_X, fold 0", healthy={"medcontext/disagreement": (0.02, 0.2)}).plot()
    panels = axes()
    (band,) = panels["medcontext/disagreement"].patches
    assert (band.get_y(), band.get_height()) == pytest.approx((0.02, 0.18))
    texts = [text.get_text() for text in panels["medcontext/disagreement"].get_legend().get_texts()]
    assert texts == ["disagreement  0.1", "healthy: 0.02 to 0.2"]
    assert not panels["medcontext/ramp"].patches
    title = panels["medcontext/ramp"].figure.texts[0].get_text()
    assert title == "Dataset004_X, fold 0, up to epoch 1 (legend: last value)"


def test_scale_is_logarithmic_only_when_all_positive_and_wide(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    log = filled(tmp_path, {"wide_1": [1e-4, 0.5], "wide_2": [1.0, 1.0], "narrow": [1.0, 100.0], "zero": [0.0, 1000.0]})
    log.plot()
    scales = {title: panel.get_yscale() for title, panel in axes().items()}
    assert scales == {"wide  (log scale)": "log", "narrow": "linear", "zero": "linear"}


def test_small_term_beside_a_large_one_gets_a_readable_panel(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    filled(tmp_path, {"loss/clean": [1.0, -1.0], "loss/consistency": [0.0, 0.02], "loss/masked": [1.0, -0.5]}).plot()
    panels = axes()
    assert list(panels) == ["loss", "loss/consistency"]
    assert len(panels["loss"].lines) == 2
    assert panels["loss/consistency"].get_ylim()[1] < 0.03


def test_dice_of_all_classes_share_one_panel_from_0_to_1_by_name(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    dice = {1: [0.0, 0.001], 2: [0.1, 0.9], 3: [0.001, 0.9]}  # would be split, or on a logarithmic scale
    figures = {f"dice_per_class_or_region/class_{label}": values for label, values in dice.items()}
    filled(tmp_path, {**figures, "mean_fg_dice": [0.1, 0.2]}, class_names=["liver", "spleen"]).plot()
    panels = axes()
    assert list(panels) == ["pseudo Dice per class or region", "pseudo Dice, foreground mean"]
    for panel in panels.values():
        low, high = panel.get_ylim()
        assert panel.get_yscale() == "linear" and -0.1 < low <= 0 and 1 <= high < 1.1
    texts = [text.get_text() for text in panels["pseudo Dice per class or region"].get_legend().get_texts()]
    assert texts == ["liver  0.001", "spleen  0.9", "class_3  0.9"]


def test_terms_of_weight_0_are_marked(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    log = filled(tmp_path, {"loss/clean": [1.0, 0.5], "loss/masked": [1.0, 0.4]})
    log.without_weight = {"loss/masked"}
    log.plot()
    texts = [text.get_text() for text in axes()["loss"].get_legend().get_texts()]
    assert texts == ["clean  0.5", "masked (weight 0)  0.4"]


def test_gaps_are_shown_and_missing_epochs_bridged(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    nan, inf = float("nan"), float("inf")
    figures = {"a": [1.0, nan, 2.0, inf] + [3.0] * 40, "b": ([1.0, None] * 22), "c": [nan] * 44}
    filled(tmp_path, figures).plot()
    panels = axes()
    (line,) = panels["a"].lines
    np.testing.assert_array_equal(line.get_ydata()[:5], [1.0, nan, 2.0, nan, 3.0])
    assert line.get_markevery() == [0, 2]  # single values between gaps, invisible as a line
    assert panels["b"].lines[0].get_xdata().tolist() == list(range(0, 44, 2))
    assert panels["c"].get_legend().get_texts()[0].get_text() == "c  no finite value"


def test_dozens_of_classes_keep_a_short_legend(tmp_path, monkeypatch):
    axes = capture_axes(monkeypatch)
    filled(tmp_path, {f"dice_per_class_or_region/class_{i}": [0.1 * i / 60, 0.5] for i in range(1, 61)}).plot()
    (panel,) = axes().values()
    assert len(panel.lines) == 60
    assert len({line.get_color() for line in panel.lines}) == 60
    labels = [text.get_text().split()[0] for text in panel.get_legend().get_texts()]
    assert len(labels) <= 10
    assert labels[0] == "class_1"
    assert labels[-1] == "class_60"


def test_plot_is_free_of_and_without_effect_on_global_style(tmp_path):
    log = filled(tmp_path, {"a$b_{": [1e-5, 1.0]})
    log.plot(tmp_path / "before.png")
    before = dict(matplotlib.rcParams)
    try:
        with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red"}):  # nnU-Net calls seaborn.set
            log.plot(tmp_path / "after.png")
            assert matplotlib.rcParams["font.size"] == 40
        assert dict(matplotlib.rcParams) == before
    finally:
        matplotlib.rcParams.update(before)
    np.testing.assert_array_equal(imread(tmp_path / "before.png"), imread(tmp_path / "after.png"))


def test_nothing_to_draw_yet_is_no_problem(tmp_path):
    told = []
    log = EpochLog(tmp_path, warn=told.append)
    log.plot()
    log.end_epoch(0)
    log.plot()
    assert told == []
    assert (tmp_path / "epochs.csv").read_text() == "epoch\n0\n"


def test_failed_drawing_and_failed_writing_are_told_and_the_old_plot_stays(tmp_path, monkeypatch):
    told = []
    log = filled(tmp_path, {"a": [1.0, 2.0]}, warn=told.append)
    log.plot()
    old = log.plot_path.read_bytes()
    log.plot(tmp_path / "missing" / "plot.png")

    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(logs, "draw_curves", fail)
    log.plot()
    assert len(told) == 2
    assert "FileNotFoundError" in told[0]
    assert "RuntimeError: no font" in told[1]
    assert log.plot_path.read_bytes() == old


# ---- TensorBoard


def scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_epoch_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    log = filled(tmp_path, {"loss/clean": [1.0, 2.0, 3.0]}, tensorboard=True)
    state = log.state_dict()
    log.close()
    again = EpochLog(tmp_path, tensorboard=True)
    again.update_config({"trainer": "x"})
    again.load_state_dict(state, current_epoch=1)
    again.add({"loss/clean": 8.0}, 1)
    again.end_epoch(1)
    again.close()
    assert scalars(tmp_path) == {"loss/clean": [(0, 1.0), (1, 8.0)]}


def test_validation_with_an_old_checkpoint_hides_no_epoch_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    log = filled(tmp_path, {"a": [1.0, 2.0, 3.0]}, tensorboard=True)
    state = log.state_dict()
    log.close()
    validation = EpochLog(tmp_path, tensorboard=True)
    validation.load_state_dict(state, current_epoch=2)
    validation.log_summary("final_val/foreground_dice", 0.5)
    validation.close()
    assert scalars(tmp_path) == {"a": [(0, 1.0), (1, 2.0), (2, 3.0)], "final_val/foreground_dice": [(1, 0.5)]}


@pytest.mark.parametrize("missing", ["tensorboard", "torch.utils.tensorboard"])
def test_missing_tensorboard_is_told_at_the_start_with_the_remedy(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r'not installed; pip install "nnunetv2-ext\[tensorboard\]"'):
        EpochLog(tmp_path, tensorboard=True)
    EpochLog(tmp_path)  # not asked for, not needed


def test_tensorboard_that_fails_later_stops_alone(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file in its place")
    told = []
    filled(tmp_path, {"a": [1.0, 2.0]}, tensorboard=True, warn=told.append)
    assert len(told) == 1
    assert "TensorBoard log stopped" in told[0]
    assert (tmp_path / "epochs.csv").read_text() == "epoch,a\n0,1.0\n1,2.0\n"


# ---- progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal_counts_shows_figures_and_wipes_itself(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with progress_bar(4, "epoch 3") as bar:
        bar.mininterval = 0  # draw every step
        for _ in range(4):
            bar.set_postfix(loss=0.25, case="a", refresh=False)
            bar.update()
        shown = terminal.getvalue()
    assert "epoch 3" in shown
    assert "4/4" in shown
    assert "case=a, loss=0.25" in shown
    assert terminal.getvalue().split("\r")[-2].strip() == ""
    bar.close()
    bar.update()


def test_bar_takes_its_length_from_what_has_one(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    for steps in ([1, 2, 3], 3):
        with progress_bar(steps) as bar:
            assert bar.total == 3
    assert list(progress_bar([1, 2, 3])) == [1, 2, 3]


@pytest.mark.parametrize("stdout", [io.StringIO(), None, "closed", "disabled"])
def test_no_bar_elsewhere(monkeypatch, stdout):
    enabled = stdout != "disabled"
    if stdout == "closed":
        stdout = io.StringIO()
        stdout.close()
    elif stdout == "disabled":
        stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    with progress_bar(2, "epoch", enabled=enabled) as bar:
        bar.set_postfix(loss=0.5, refresh=False)
        bar.update()
    if stdout is not None and not stdout.closed:
        assert stdout.getvalue() == ""


def test_import_is_light_and_drawing_needs_no_pyplot(tmp_path):
    code = """
        import sys
        from nnunetv2_ext.core.logs import EpochLog
        print(*[name for name in ("torch", "matplotlib", "tqdm") if name in sys.modules])
        log = EpochLog(sys.argv[1])
        log.add({"a": 1.0}, 0)
        log.plot()
        print(*[name for name in ("matplotlib.pyplot", "seaborn", "torch") if name in sys.modules])
    """
    root = str(Path(logs.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.check_output(command, env=environment, text=True) == "\n\n"
    assert (tmp_path / "progress_ext.png").exists()
