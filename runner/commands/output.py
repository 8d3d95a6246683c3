"""Output shared by several commands."""

import statistics
import sys
from typing import Any

import msgspec

from runner.run.folder import Run
from runner.run.schema import Summary


def note_unfinished(run: Run) -> None:
    """Prints to standard error that a run has not finished, and which of its weights are used."""
    if (state := run.state()) not in ("complete", "missing"):
        print(f"runner: {run.folder}: {state}, not finished; uses the weights of its last checkpoint", file=sys.stderr)


def print_result(result: dict[str, Any], json: bool) -> None:
    """Prints one evaluation as one line, or in full as JSON."""
    if json:
        print(msgspec.json.encode(result).decode())
        return
    augmented = result.get("test_accuracy_augmented")
    note = "" if augmented is None else f", {augmented:.2%} with test-time augmentation"
    line = "{run}: {test_accuracy:.2%} on {test_images:,} test images of {dataset}".format(**result)
    print(f"{line}{note}")


def print_summaries(summaries: list[Summary], json: bool) -> None:
    """Prints the summary of one seed, or of several with their mean and standard deviation."""
    results = [msgspec.to_builtins(summary) for summary in summaries]
    if len(results) == 1:
        print_result(results[0], json)
        return
    accuracies = [summary.test_accuracy for summary in summaries]
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    if json:
        combined = {"runs": results, "test_accuracy_mean": mean, "test_accuracy_std": std}
        print(msgspec.json.encode(combined).decode())
        return
    for result in results:
        print_result(result, json=False)
    print(f"{len(results)} seeds: {mean:.2%} ± {std:.2%}")
