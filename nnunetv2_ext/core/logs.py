"""The extension's own training log: one table row per epoch, and a plot of it.

nnU-Net's local logger accepts eight fixed keys and fails on any other, so named loss terms need a place of their own.
`EpochLog` stands beside it: appended to `trainer.logger.loggers` it also sees every figure nnU-Net logs.
"""

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_ext.core.curves import Row, draw_curves, figure_names
from nnunetv2_ext.core.files import atomic_write, atomic_write_text

_STATE_VERSION = 1


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
        class_names: Of the foreground classes or regions, in nnU-Net's order; for the plot's legend.
        title: Of the plot; the folder's name if empty.
        healthy: Ranges of figures that the plot draws as bands.
        beside: nnU-Net's own loggers (Weights & Biases), which get the named figures too: `log(name, value, step)`.

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
        class_names: Sequence[str] = (),
        title: str = "",
        healthy: Mapping[str, tuple[float, float]] | None = None,
        beside: Sequence[Any] = (),
    ) -> None:
        self.folder = Path(folder)
        self.csv_path = self.folder / "epochs.csv"
        self.plot_path = self.folder / "progress_ext.png"
        self.enabled = enabled
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.without_weight: Collection[str] = ()  # figures that the plot marks as terms of weight 0
        self.class_names = list(class_names)
        self.title, self.healthy = title, healthy
        self._beside = tuple(beside)
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
        elif key != "epoch_end_timestamps":
            self._put(key, value, step)
        elif step in self._started_at:
            self._put("epoch_seconds", float(value) - self._started_at.pop(step), step)

    def log_summary(self, key: str, value: Any) -> None:
        """Take a figure of the whole run, such as the final validation Dice; kept in `summary` and TensorBoard."""
        if not self.enabled:
            return
        self.summary[key] = value
        if (number := _as_number(value)) is not None:
            self._write_events({key: number}, max(self._rows, default=0))

    # ---- what our trainers call
    def add(self, figures: Mapping[str, Any], step: int) -> None:
        """Take named figures of epoch `step`: numbers, or tensors and arrays of one element; the later of two counts.

        A name is `group/term`; the plot draws the terms of `loss` in one panel, and `gate_1`, `gate_2` of a group.
        """
        for name, value in figures.items() if self.enabled else ():
            self._put(name, value, step)
            self._tell_others(name, value, step)

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
        """Draw every figure against the epoch, one panel a unit, to `path` (default: `progress_ext.png`)."""
        if not self.enabled or not self._rows:
            return
        path = self.plot_path if path is None else Path(path)
        try:
            title = f"{self.title or self.folder.name}, up to epoch {max(self._rows)} (legend: last value)"
            png = draw_curves(self._rows, title, self.class_names, self.without_weight, self.healthy)
            atomic_write(path, lambda file: file.write(png))
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
        try:
            if writer is not None:
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

    def _tell_others(self, name: str, value: Any, step: int) -> None:
        if (number := _as_number(value)) is None:
            return
        try:
            for other in self._beside:
                other.log(name, number, step)
        except Exception as error:  # a service on the network
            self._warn(
                f"the methods' figures are not logged elsewhere any more ({type(error).__name__}: {error}); "
                f"training goes on, and {self.csv_path.name} has them"
            )
            self._beside = ()

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


def _to_csv(rows: Mapping[int, Row]) -> str:
    names = figure_names(rows)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["epoch", *names])
    for epoch in sorted(rows):
        table.writerow([epoch, *(repr(rows[epoch][name]) if name in rows[epoch] else "" for name in names)])
    return text.getvalue()
