"""Prints the progress of a run on standard error."""

import sys
import time

from runner.run.schema import MetricRow


class EpochPrinter:
    """Prints a line for each epoch, to a terminal or a pipe. Used only on rank 0.

    Args:
        epochs: number of epochs of the recipe.
        start_step: optimizer steps completed before this process started.
        last_step: the step at which training ends.
    """

    def __init__(self, epochs: int, start_step: int, last_step: int) -> None:
        self.epochs, self.start_step, self.last_step = epochs, start_step, last_step
        self.started = time.monotonic()
        self.latest: MetricRow | None = None  # of a window of steps, with learning rate and speed

    def log(self, row: MetricRow) -> None:
        """Receives every row of metrics; prints a line for those that end an epoch."""
        if row.train_epoch_loss is None:
            self.latest = row
            return
        seconds = time.monotonic() - self.started
        left = seconds * (self.last_step - row.global_step) / max(1, row.global_step - self.start_step)
        parts = [f"train {format_metrics(row.train_epoch_loss, row.train_epoch_accuracy)}"]
        for name in ("validation", "test"):
            if getattr(row, f"{name}_loss") is not None:
                parts.append(f"{name} {format_metrics(getattr(row, f'{name}_loss'), getattr(row, f'{name}_accuracy'))}")
        if self.latest:  # none in a run that was resumed within an evaluation
            parts.append(f"lr {self.latest.lr:.3g}")
            parts.append(f"{self.latest.images_per_second:,.0f} images/s")
            parts.append(f"{duration(left)} left")
        print(f"epoch {row.epoch:.4g}/{self.epochs}: {', '.join(parts)}", file=sys.stderr, flush=True)


def format_metrics(loss: float, accuracy: float | None) -> str:
    """Formats loss and accuracy as `0.5321 (81.20%)`."""
    return f"{loss:.4f} ({accuracy:.2%})"


def duration(seconds: float) -> str:
    """Formats a duration as `2:05` (minutes) or `1:02:05` (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
