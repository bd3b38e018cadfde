"""The extension's own training log: one table row per epoch, a progress plot of it, a progress bar.

nnU-Net's local logger accepts eight fixed keys and fails on any other, so named loss terms need a place of their own.
`EpochLog` stands beside it: appended to `trainer.logger.loggers` it also sees every figure nnU-Net logs.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_ext.core.files import atomic_write, atomic_write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, float]

_STATE_VERSION = 1
_SERIES_IN_LEGEND = 10
_COLUMNS = 3
_FLAT = 20.0  # a curve that spans less than this fraction of a panel's height cannot be read
# Titles of nnU-Net's own figures; equal titles share a panel. Ours are named "group/term" and need no entry.
_TITLES = {
    "train_losses": "loss (nnU-Net)",
    "val_losses": "loss (nnU-Net)",
    "mean_fg_dice": "pseudo Dice, foreground mean",
    "ema_fg_dice": "pseudo Dice, foreground mean",
    "dice_per_class_or_region": "pseudo Dice per class or region",
    "lrs": "learning rate",
    "epoch_seconds": "epoch duration [s]",
}


class EpochLog:
    """Collects the figures of every epoch and writes them to `epochs.csv` in the fold's folder.

    Use: append it to `trainer.logger.loggers`; call `add` with the epoch's named terms before nnU-Net's
    `on_epoch_end` (which saves the checkpoint) and `end_epoch` after it. Nothing that goes wrong while writing or
    drawing stops the training: it is told to `warn`.

    Args:
        folder: The fold's output folder.
        enabled: False on all ranks but the first: every method then does nothing.
        tensorboard: Also write the figures as TensorBoard events to `folder/tensorboard`.
        warn: Gets one line of text for each problem, e.g. `trainer.print_to_log_file`.

    Raises:
        ValueError: `tensorboard` is asked for and not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        enabled: bool = True,
        tensorboard: bool = False,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.csv_path = self.folder / "epochs.csv"
        self.plot_path = self.folder / "progress_ext.png"
        self.enabled = enabled
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self._warn = warn
        self._rows: dict[int, Row] = {}
        self._started_at: dict[int, float] = {}
        self._refused: set[str] = set()
        # Imported on every rank, so that all of them stop when it is missing.
        self._writer_class = _summary_writer_class() if tensorboard else None
        self._writer: Any = None
        self._first_step = 0

    # ---- what nnU-Net's MetaLogger calls (nnunetv2/training/logging/nnunet_logger.py)

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Remember the run's configuration; TensorBoard shows it as text."""
        self.config.update(config)

    def log(self, key: str, value: Any, step: int) -> None:
        """Take one figure of epoch `step`. The two time stamps nnU-Net logs become one column, `epoch_seconds`."""
        if not self.enabled:
            return
        if key == "epoch_start_timestamps":
            self._started_at[step] = float(value)
        elif key == "epoch_end_timestamps":
            if step in self._started_at:
                self._put("epoch_seconds", float(value) - self._started_at.pop(step), step)
        else:
            self._put(key, value, step)

    def log_summary(self, key: str, value: Any) -> None:
        """Take a figure of the whole run, such as the final validation Dice; kept in `summary` and TensorBoard."""
        if not self.enabled:
            return
        self.summary[key] = value
        number = _as_number(value)
        if number is not None:
            self._write_events({key: number}, max(self._rows, default=0))

    # ---- what our trainers call

    def add(self, figures: Mapping[str, Any], step: int) -> None:
        """Take named figures of epoch `step`: numbers, or tensors and arrays of one element.

        A name is `group/term` ("loss/consistency"); the plot draws a group in one panel. Naming a figure twice in an
        epoch keeps the later value.
        """
        if self.enabled:
            for name, value in figures.items():
                self._put(name, value, step)

    def end_epoch(self, epoch: int) -> None:
        """Close the row of `epoch` (0-based) and rewrite `epochs.csv` as a whole, atomically."""
        if not self.enabled:
            return
        row = self._rows.setdefault(epoch, {})
        try:
            atomic_write_text(self.csv_path, _to_csv({e: r for e, r in self._rows.items() if e <= epoch}))
        except OSError as error:
            self._warn(
                f"could not write {self.csv_path} ({error}); training goes on, the next epoch writes all rows again"
            )
        self._write_events(row, epoch)

    def plot(self, path: str | Path | None = None) -> None:
        """Draw every figure against the epoch, one panel a group, to `path` (default: `progress_ext.png`)."""
        if not self.enabled or not self._rows:
            return
        path = self.plot_path if path is None else Path(path)
        try:
            png = _draw(self._rows, f"{self.folder.name}, up to epoch {max(self._rows)} (legend: last value)")
            atomic_write(path, lambda file: _write_all(file, png))
        except Exception as error:  # a picture is never worth a training run, whatever matplotlib raises
            self._warn(f"could not draw {path} ({type(error).__name__}: {error}); training goes on")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to carry: plain Python numbers and strings only."""
        return {"version": _STATE_VERSION, "rows": {epoch: dict(row) for epoch, row in self._rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any], current_epoch: int) -> None:
        """Go back to the rows of a checkpoint that continues at `current_epoch`; rows from there on are dropped.

        `epochs.csv` is left alone until the next `end_epoch`, because validation loads checkpoints as well
        (`--val_best` an old one). An empty state, as of a plain nnU-Net checkpoint, starts without rows.

        Raises:
            ValueError: The state was written by a newer version of this package.
        """
        if not self.enabled:
            return
        if state and state["version"] > _STATE_VERSION:
            raise ValueError(
                f"the checkpoint's log has format {state['version']}, this version of nnunetv2-ext reads up to "
                f"{_STATE_VERSION}; update it: pip install -U nnunetv2-ext"
            )
        rows = state["rows"] if state else {}
        self._rows = {epoch: dict(row) for epoch, row in rows.items() if epoch < current_epoch}
        self._started_at.clear()
        self.close()
        self._first_step = current_epoch

    def close(self) -> None:
        """Flush and close the TensorBoard file, if there is one; a later figure opens a new one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:  # the writing thread hands over whatever stopped it
                self._warn(f"could not close the TensorBoard log ({error})")

    # ---- details

    def _put(self, name: str, value: Any, step: int) -> None:
        number = None if name == "epoch" else _as_number(value)
        if number is not None:
            self._rows.setdefault(int(step), {})[name] = number
        elif name not in self._refused:
            self._refused.add(name)
            reason = "the name is taken" if name == "epoch" else f"not a number: {type(value).__name__}"
            self._warn(f"the figure '{name}' is left out of {self.csv_path.name} ({reason})")

    def _write_events(self, figures: Mapping[str, float], step: int) -> None:
        if self._writer_class is None:
            return
        try:
            if self._writer is None:
                # TensorBoard then hides the older events from this step on, which are run again. Not when validation
                # with an old checkpoint (--val_best) adds its result: nothing is run again there.
                purge_step = self._first_step if step >= self._first_step else None
                self._writer = self._writer_class(str(self.folder / "tensorboard"), purge_step=purge_step)
                self._writer.add_text("config", f"```\n{json.dumps(self.config, indent=1, default=str)}\n```", step)
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except Exception as error:  # its writing thread raises here whatever stopped it: disk, quota, network
            self._warn(f"TensorBoard log stopped ({type(error).__name__}: {error}); training goes on without it")
            self._writer_class = self._writer = None


def _summary_writer_class() -> Any:
    try:
        import tensorboard  # noqa: F401  (torch.utils.tensorboard may be imported already and would not notice)
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "TensorBoard logging is switched on but TensorBoard is not installed; "
            'pip install "nnunetv2-ext[tensorboard]" or switch it off'
        ) from error
    return SummaryWriter


def _as_number(value: Any) -> float | None:
    """A Python number from a number or a one-element tensor or array, else None."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return int(value) if isinstance(value, int) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _names(rows: Mapping[int, Row]) -> list[str]:
    """Names of all figures in the order in which the epochs first brought them."""
    return list(dict.fromkeys(name for epoch in sorted(rows) for name in rows[epoch]))


def _to_csv(rows: Mapping[int, Row]) -> str:
    names = _names(rows)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["epoch", *names])
    for epoch in sorted(rows):
        table.writerow([epoch, *(repr(rows[epoch][name]) if name in rows[epoch] else "" for name in names)])
    return text.getvalue()


# ---- the progress plot


def _write_all(file: Any, content: bytes) -> None:
    file.write(content)


def _draw(rows: Mapping[int, Row], title: str) -> bytes:
    """The progress plot as PNG: panels of one group each, three in a row."""
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(rows)
    columns = max(1, min(_COLUMNS, len(panels)))
    # Heights in inches, by hand: matplotlib's layout engines double the time of this plot.
    heights = [
        3.3 + 0.17 * max(_legend_lines(len(names)) for _, names in panels[start : start + columns])
        for start in range(0, len(panels), columns)
    ]
    width, height = 5.0 * columns, sum(heights) + 0.5
    # nnU-Net's own plot calls seaborn.set(font_scale=2.5), which changes matplotlib's defaults for the whole process.
    with matplotlib.style.context(["default", {"text.parse_math": False, "font.size": 9}]):
        figure = Figure(figsize=(width, height), dpi=90)
        FigureCanvasAgg(figure)
        figure.text(0.5, 1 - 0.25 / height, title, fontsize=11, ha="center", va="center", wrap=True)
        for index, (name, members) in enumerate(panels):
            line, column = divmod(index, columns)
            bottom = height - 0.5 - sum(heights[:line]) - 2.8
            axes = figure.add_axes(((5.0 * column + 0.7) / width, bottom / height, 4.1 / width, 2.45 / height))
            _draw_panel(axes, rows, name, members)
        png = io.BytesIO()
        figure.savefig(png, format="png", pil_kwargs={"compress_level": 3})
    return png.getvalue()


def _panels(rows: Mapping[int, Row]) -> list[tuple[str, list[str]]]:
    """Title and figures of each panel."""
    groups: dict[str, list[str]] = {}
    for name in _names(rows):
        group = name.split("/", 1)[0]
        groups.setdefault(_TITLES.get(group, group), []).append(name)
    panels = []
    for title, names in groups.items():
        spans = {name: max(v) - min(v) if (v := _finite(rows, [name])) else 0.0 for name in names}
        # A small term beside a large one is a flat line unless the scale is logarithmic: it gets a panel of its own.
        flat = max(spans.values()) / _FLAT if not _needs_log_scale(_finite(rows, names)) else 0.0
        small = [name for name in names if 0 < spans[name] < flat]
        panels.append((title, [name for name in names if name not in small]))
        panels += [(name, [name]) for name in small]
    return panels


def _finite(rows: Mapping[int, Row], names: Iterable[str]) -> list[float]:
    return [row[name] for name in names for row in rows.values() if name in row and math.isfinite(row[name])]


def _needs_log_scale(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > 100 * min(values)


def _draw_panel(axes: Axes, rows: Mapping[int, Row], title: str, names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    _draw_series(axes, rows, names)
    if _needs_log_scale(_finite(rows, names)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        title += "  (log scale)"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("epoch")
    last = max(rows)
    margin = max(0.5, 0.02 * last)
    axes.set_xlim(-margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def _legend_lines(figures: int) -> int:
    return math.ceil(min(figures, _SERIES_IN_LEGEND) / 2)


def _draw_series(axes: Axes, rows: Mapping[int, Row], names: Sequence[str]) -> None:
    """Draw the figures of one panel and the legend below it."""
    from matplotlib import colormaps

    epochs = sorted(rows)
    handles = []
    for index, name in enumerate(names):
        # A figure not taken in an epoch is bridged by the line; one that was NaN or infinite leaves a gap.
        x = [epoch for epoch in epochs if name in rows[epoch]]
        y = [v if math.isfinite(v) else math.nan for v in (float(rows[epoch][name]) for epoch in x)]
        finite = [v for v in y if not math.isnan(v)]
        colour = f"C{index}" if len(names) <= 10 else colormaps["viridis"](index / (len(names) - 1))
        label = name.split("/", 1)[-1]
        label += f"  {finite[-1]:.4g}" if finite else "  no finite value"
        marked = list(range(len(y))) if len(y) <= 30 else _alone(y)
        (handle,) = axes.plot(x, y, color=colour, linewidth=1.3, marker="o", markersize=3, markevery=marked)
        handles.append((handle, label))
    if len(handles) > _SERIES_IN_LEGEND:  # dozens of classes: every n-th and the last, colours run with the index
        step = math.ceil(len(handles) / (_SERIES_IN_LEGEND - 1))
        handles = [*handles[:-1:step], handles[-1]]
    # Below the axes: no curve is hidden, and no search for a free corner, which takes seconds on long runs.
    axes.legend(
        *zip(*handles, strict=True),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=2 if len(handles) > 1 else 1,
        fontsize=8,
        frameon=False,
    )


def _alone(y: Sequence[float]) -> list[int]:
    """Indices of finite values between two gaps, which a line alone would not show."""
    padded = [math.nan, *y, math.nan]
    return [i for i, v in enumerate(y) if not math.isnan(v) and math.isnan(padded[i]) and math.isnan(padded[i + 2])]


# ---- the progress bar


class ProgressBar:
    """A bar on a terminal, nothing elsewhere; made by `progress_bar`."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def update(self, n: int = 1, **postfix: Any) -> None:
        """Advance by `n` steps and show figures behind the bar. Without a bar they are not even read, so a tensor on
        a GPU is not waited for."""
        if self._bar is not None:
            if postfix:
                numbers = {name: _as_number(value) for name, value in postfix.items()}
                self._bar.set_postfix({k: postfix[k] if v is None else v for k, v in numbers.items()}, refresh=False)
            self._bar.update(n)

    def close(self) -> None:
        """Wipe the bar off the terminal. Closing twice does no harm."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(total: int | Iterable[Any] | None, desc: str = "", enabled: bool = True) -> ProgressBar:
    """A progress bar of `total` steps (a number, or something with a length) if stdout is a terminal.

    In a log file, a pipe or a notebook's captured stream there is no bar, so log files stay free of control
    characters; `enabled=False` (other ranks) does the same.
    """
    if not (enabled and _stdout_is_terminal()):
        return ProgressBar(None)
    from tqdm import tqdm

    if isinstance(total, Sized):
        total = len(total)
    steps = total if isinstance(total, int) else None
    return ProgressBar(tqdm(total=steps, desc=desc, file=sys.stdout, leave=False, dynamic_ncols=True, mininterval=0.5))


def _stdout_is_terminal() -> bool:
    try:
        return sys.stdout is not None and sys.stdout.isatty()
    except ValueError:  # closed, as under some schedulers
        return False
