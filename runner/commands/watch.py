"""`runner watch`: shows the progress of a run in the terminal until the run ends."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from runner.commands.options import Flag, RunFolder
from runner.common.console import output_console
from runner.common.text import printable
from runner.run.folder import Run, State
from runner.run.metrics import latest_metrics, read_metrics
from runner.run.schema import MetricRow
from runner.training.progress import duration

if TYPE_CHECKING:
    from rich.table import Table

Interval = Annotated[float, Meta(ge=0.1, le=3600)]
LEVELS = "▁▂▃▄▅▆▇█"
STYLES: dict[State, str] = {"complete": "green", "running": "cyan", "stopped": "yellow", "failed": "red"}
CURVES = {"train": "cyan", "validation": "yellow", "test": "green"}
# The metrics that are shown, by their names in MetricRow: a title, and a format and a factor for their values.
SHOWN: dict[str, tuple[str, str, float]] = {
    "train_loss": ("train loss", "{:.4f}", 1),
    "validation_loss": ("validation loss", "{:.4f}", 1),
    "test_loss": ("test loss", "{:.4f}", 1),
    "train_accuracy": ("train accuracy", "{:.2%}", 1),
    "validation_accuracy": ("validation accuracy", "{:.2%}", 1),
    "test_accuracy": ("test accuracy", "{:.2%}", 1),
    "lr": ("learning rate", "{:.3g}", 1),
    "lr_1": ("learning rate, last group", "{:.3g}", 1),
    "train_grad_norm": ("gradient norm", "{:.3g}", 1),
    "images_per_second": ("images/s", "{:,.0f}", 1),
    "data_seconds": ("data, ms/step", "{:,.1f}", 1e3),
    "compute_seconds": ("compute, ms/step", "{:,.1f}", 1e3),
    "memory_gb": ("peak memory, GB", "{:.2f}", 1),
    "flops_utilization": ("FLOPs utilization", "{:.1%}", 1),
}


@dataclasses.dataclass(frozen=True)
class Watch:
    """Show the progress of a run until it ends; through a pipe, print it once."""

    run: RunFolder
    """Run folder, RUNS/NAME/RUN."""
    interval: Interval = 1.0
    """Seconds between two looks at the run folder."""
    json: Flag = False
    """Print the progress once, as JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        run = Run(self.run)
        if self.json:
            print(msgspec.json.encode(read_progress(run)[0]).decode())
            return
        console = output_console()
        if not sys.stdout.isatty():
            console.print(display(*read_progress(run), console.width))
            return
        from rich.live import Live

        with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
            while True:
                progress, rows = read_progress(run)
                live.update(display(progress, rows, console.width), refresh=True)
                if progress.state != "running":
                    return
                time.sleep(self.interval)


class Progress(msgspec.Struct, kw_only=True):
    """The progress of a run, as `runner watch --json` prints it.

    Attributes:
        trained_on: hardware and precision.
        last_step: the step at which training ends; None before the first row of metrics.
        seconds_left: estimate from the speed since training was started or resumed; None if it is not running, or no
            step has been logged since.
        metrics: the latest value of each metric.
    """

    run: str
    state: State
    reason: str = ""
    trained_on: str = ""
    epoch: float = 0.0
    epochs: int | None = None
    step: int = 0
    last_step: int | None = None
    seconds_left: float | None = None
    metrics: dict[str, float] = {}


def read_progress(run: Run) -> tuple[Progress, list[MetricRow]]:
    """Reads the progress of a run and its rows of metrics. Raises UserError if there is no run."""
    state = run.state()
    if state == "running" and not run.run_json.is_file():  # locked, and about to start
        return Progress(run=printable(run.folder), state=state), []
    config, rows, ending = run.config(), read_metrics(run), run.read_ending()
    progress = Progress(
        run=config.name,
        state=state,
        reason=ending.reason if ending and state in ("stopped", "failed") else "",
        trained_on=f"{config.hardware}, {config.precision}",
        epochs=config.recipe.epochs,
        metrics=latest_metrics(rows),
    )
    if rows and rows[-1].epoch > 0:
        latest = rows[-1]
        total = round(config.recipe.epochs * latest.global_step / latest.epoch)
        progress.epoch, progress.step = latest.epoch, latest.global_step
        progress.last_step = min(total, config.max_steps or total)
        if state == "complete" and (summary := run.read_summary()) and summary.stopped_early:
            progress.last_step = summary.steps
            progress.reason = f"stopped early; the weights are those of epoch {summary.best_epoch:g}"
        trained = latest.global_step - (config.resumed[-1].step if config.resumed else 0)
        if state == "running" and trained > 0:
            seconds = max(0.0, run.metrics.stat().st_mtime - run.run_json.stat().st_mtime)
            progress.seconds_left = seconds * (progress.last_step - latest.global_step) / trained
    return progress, rows


def display(progress: Progress, rows: Sequence[MetricRow], width: int) -> "Table":
    """Returns what is shown in `width` columns: the state, a bar, and a line with a curve for each metric."""
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble((progress.run, "bold"), "  ", (progress.state, STYLES.get(progress.state, "magenta")))
    head.append(f"  {progress.trained_on}", "dim")
    table = Table.grid(expand=True)
    table.add_row(head)
    if progress.reason:
        table.add_row(Text(progress.reason))
    table.add_row(_bar(progress))
    if rows:
        table.add_row("")
        table.add_row(_curves(rows, width))
    return table


def _bar(progress: Progress) -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    bar = Table.grid(expand=True, padding=(0, 1, 0, 0))
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    if progress.last_step is None:
        bar.add_row("no step yet", "", "")
        return bar
    done = f"epoch {progress.epoch:.4g} of {progress.epochs}, step {progress.step:,} of {progress.last_step:,}"
    left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
    percent = f"{progress.step / progress.last_step:.0%}{left}"
    bar.add_row(done, ProgressBar(total=progress.last_step, completed=progress.step), percent)
    return bar


def sparkline(points: Sequence[tuple[int, float]], last_step: int, width: int) -> str:
    """Draws values over steps in one line. Every column shows the mean of its values.

    A column without values shows what the next one shows, because most logged values are means over the steps before
    them. Columns after the last value are empty.

    Args:
        points: steps, counted from 1, and values.
        last_step: the step of the last column.
        width: number of columns.
    """
    columns: list[list[float]] = [[] for _ in range(width)]
    for step, value in points:
        columns[(step * width - 1) // last_step].append(value)
    means = [sum(values) / len(values) if values else None for values in columns]
    present = [mean for mean in means if mean is not None]
    low, high = min(present), max(present)
    line, character = "", " "
    for mean in reversed(means):
        if mean is not None:
            share = (mean - low) / (high - low) if high > low else 0.5
            character = LEVELS[round(share * (len(LEVELS) - 1))]
        line = character + line
    return line


def _curves(rows: Sequence[MetricRow], width: int) -> "Table":
    from rich.table import Table
    from rich.text import Text

    last = rows[-1]
    points = {name: [(row.global_step, v) for row in rows if (v := getattr(row, name)) is not None] for name in SHOWN}
    lines = []
    for name, (title, form, scale) in SHOWN.items():
        if points[name]:
            values = [scale * value for _, value in points[name]]
            lines.append((title, *map(form.format, (values[-1], min(values), max(values))), name))
    titles = ("", "latest", "lowest", "highest")
    widths = [max(len(line[k]) for line in [titles, *lines]) for k in range(4)]
    left = max(8, width - sum(widths) - 4)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column("latest", justify="right", no_wrap=True)
    table.add_column(f"epoch 0 to {last.epoch:.4g}", no_wrap=True, width=left)
    table.add_column("lowest", justify="right", no_wrap=True)
    table.add_column("highest", justify="right", no_wrap=True)
    for title, latest, lowest, highest, name in lines:
        curve = Text(sparkline(points[name], last.global_step, left), CURVES.get(name.partition("_")[0], ""))
        table.add_row(title, latest, curve, lowest, highest)
    return table
