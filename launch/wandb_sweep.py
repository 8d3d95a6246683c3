"""The same grid for those who prefer W&B's controller: its definition, and what its agent calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.console import UserError
from launch.trials import Trial
from runner.runs import write_atomically

HEADER = """\
# For a Bayesian search: method: bayes, and under parameters any option of `runner train` with its range, such as
#   recipe.optimizer.lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-1}
"""


def write(path: Path, names: Sequence[str], trials: list[Trial], common: list[str]) -> None:
    """Writes the definition and says how to start it.

    Raises:
        UserError: the file cannot be written.
    """
    import yaml

    try:
        text = HEADER + yaml.safe_dump(definition(names, trials, common), sort_keys=False)
        write_atomically(path, text.encode())
    except OSError as error:
        raise UserError(f"--as-wandb-sweep {path}: cannot write there ({error.strerror})") from None
    print(f"{path}: {len(trials)} trials; start with: wandb sweep {path}, and on each machine: wandb agent SWEEP")


def definition(names: Sequence[str], trials: list[Trial], common: list[str]) -> dict[str, Any]:
    """What `wandb sweep` takes."""
    experiments = list(dict.fromkeys(trial.request.experiment for trial in trials))
    seeds = sorted({trial.request.seeds[0] for trial in trials})
    return {
        "name": "+".join(names),
        "method": "grid",
        "metric": {"name": "test/accuracy", "goal": "maximize"},
        "parameters": {"experiment": {"values": experiments}, "seed": {"values": seeds}},
        "command": ["${env}", "python", "-m", "launch", "agent", "${args}", *common],
    }
