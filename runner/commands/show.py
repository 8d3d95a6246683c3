"""`runner show`: prints what a run is, its progress, and where its files are."""

import dataclasses
import sys
from collections.abc import MutableMapping

import msgspec

from runner.commands.options import Flag, RunFolder
from runner.common.text import printable
from runner.run.folder import Run
from runner.run.metrics import read_metrics
from runner.run.results import current_latency, current_parity


@dataclasses.dataclass(frozen=True)
class Show:
    """Show what a run is, its progress, and where its files are."""

    run: RunFolder
    """Run folder, RUNS/NAME/RUN."""
    json: Flag = False
    """Print JSON, and nothing else, on standard output."""

    def __call__(self, environ: MutableMapping[str, str]) -> None:
        lines = facts(Run(self.run))
        if self.json:
            sys.stdout.write(msgspec.json.encode(lines).decode() + "\n")
            return
        width = max(map(len, lines))
        for name, value in lines.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"{name:{width}}  {line}")
                name = ""


def facts(run: Run) -> dict[str, str | list[str]]:
    """Returns the facts about a run by name; a list is printed with one line per entry."""
    config, rows, summary, ending = run.config(), read_metrics(run), run.read_summary(), run.read_ending()
    state = run.state()
    ranks = f"{config.world_size} ranks" if config.world_size > 1 else "1 rank"
    ended = ""
    if summary and summary.stopped_early:
        ended = f", stopped early; the weights are those of epoch {summary.best_epoch:g}"
    shown: dict[str, str | list[str]] = {
        "experiment": f"{config.experiment} ({config.paper}), seed {config.seed}",
        "state": f"{state}: {ending.reason}" if ending and state in ("stopped", "failed") else state,
        "progress": f"epoch {rows[-1].epoch:.4g} of {config.recipe.epochs}, step {rows[-1].global_step}{ended}"
        if rows
        else "no step yet",
        "dataset": f"{config.dataset.name}, {len(config.dataset.classes)} classes, {config.dataset.folder}",
        "trained on": f"{config.hardware}, {ranks}, {config.precision}",
        "changed": [f"{name}: {old} → {new}" for name, (old, new) in config.overrides.items()] or "nothing",
    }
    if config.resumed:
        shown["resumed"] = [
            f"from step {entry.step}" + "".join(f", {key}: {old} → {new}" for key, (old, new) in entry.changed.items())
            for entry in config.resumed
        ]
    evaluated = [row for row in rows if row.test_accuracy is not None]
    if summary:
        shown["test accuracy"] = f"{summary.test_accuracy:.2%} of {summary.test_images:,} images"
    elif evaluated:
        shown["test accuracy"] = f"{evaluated[-1].test_accuracy:.2%} so far"
    parity, latency = current_parity(run), current_latency(run)
    if parity and parity.rows:
        shown["gate"] = [
            f"{row.onnx} on {row.provider}: {'passed' if row.passed else 'failed'}"
            f"{', one class predicted for all images' if row.predicts_one_class else ''}"
            for row in parity.rows
        ]
    if latency and (measured := [row for row in latency.rows if row.measured]):
        shown["latency"] = [
            f"{row.label}, {row.precision}, batch {row.batch}: p50 {row.p50_ms:.3g} ms" for row in measured
        ]
    shown["checkpoints"] = [run.step_folder(step).name for step in run.checkpoint_steps()] or "none"
    shown["files"] = sorted(printable(path) for path in [*run.folder.glob("*.*"), *run.deploy.glob("model.*")])
    return shown
